"""Settings of every command: frozen pydantic models, read from TOML, the environment, --set and options. No torch.

One file per command (`train.py` holds what both training commands share), `load.py` merges and validates the sources,
`aliases.py` lists short forms and older keys, `base.py` is what all models share.
"""
