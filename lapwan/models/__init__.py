"""From MODEL to weights: the folder (`resolve`; `separate_files` for single files), its spec (`spec`) and config files
(`configs`), and a base with LoRAs merged in memory (`base`). `original_layout` loads the release's files; `merge` is
the merge command."""
