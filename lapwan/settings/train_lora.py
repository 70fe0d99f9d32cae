"""Settings of `lapwan train-lora`."""

from __future__ import annotations

from lapwan.settings.train import TrainSettings


class TrainLoraSettings(TrainSettings):
    """Stage 1: one LoRA for each noise expert, from one run."""
