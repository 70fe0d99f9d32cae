"""Pretraining of the embedded model: `python -m examples.pretrain --work DIR`. Not needed to use the model."""
