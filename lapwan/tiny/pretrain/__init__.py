"""Pretraining of the embedded model: `python -m lapwan.tiny.pretrain`. Not needed to use it."""
