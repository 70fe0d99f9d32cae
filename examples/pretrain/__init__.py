"""Pretraining of the embedded model: `python -m examples.pretrain`. Not needed to use it."""
