"""Every number of the pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

SEED = 20220722


@dataclass(frozen=True)
class VaeSettings:
    """Of the autoencoder."""

    clips: int = 20_000
    steps: int = 6_200
    batch: int = 24  # of crops
    whole_batch: int = 12
    whole_every: int = 3  # every third step sees whole clips, the others crops around the instrument's head
    crop: int = 64  # pixels; all frames
    first_clips: int = 1_500  # training starts with as many and sees `clips_per_step` more at every step
    clips_per_step: float = 8.0
    lr: float = 1.5e-3
    warmup: int = 200
    ema: float = 0.998
    head_weight: float = 6.0  # added to 1 inside the box around the head
    square_weight: float = 2.0
    edge_weight: float = 1.0
    edge_warmup: int = 1_000
    bf16: bool = True
    kl_weight: float = 2e-4


@dataclass(frozen=True)
class DiffusionSettings:
    """Of both noise experts and the text encoder."""

    clips: int = 48_000
    steps: int = 6_500
    batch: int = 256
    first_clips: int = 6_000
    clips_per_step: float = 6.0
    lr: float = 1.2e-3
    text_lr: float = 6e-4
    warmup: int = 400
    weight_decay: float = 0.01
    ema: float = 0.9985
    condition_dropout: float = 0.5  # text-to-video: mask and image channels exactly zero
    caption_dropout: float = 0.1  # half of them the empty caption, half the official negative prompt
    head_weight: float = 3.0
    low_shift: float = 2.0
    bands: dict[str, tuple[float, float]] = field(default_factory=lambda: {"high": (0.875, 1.0), "low": (0.0, 0.9)})


@dataclass(frozen=True)
class EvaluatorSettings:
    """Of the instrument classifier with its tip detector."""

    clips: int = 3_000
    checks: int = 400
    steps: int = 2_000
    batch: int = 128  # frames
    lr: float = 2e-3


@dataclass(frozen=True)
class JudgeSettings:
    """Of the second judge: clips that train by kind, `tests` of each kind to calibrate on and as many to test on."""

    one: int = 3_000
    two: int = 1_500
    empty: int = 1_500
    early: int = 640
    broken: int = 640
    tests: int = 500
    steps: int = 4_000
    batch: int = 128  # frames
    lr: float = 2e-3


S = TypeVar("S", VaeSettings, DiffusionSettings, EvaluatorSettings, JudgeSettings)


def shorter(settings: S, scale: float) -> S:
    """The same settings at `scale` of their length, for a trial run."""
    names = [name for name in ("clips", "steps", "first_clips", "checks", "warmup", "one", "two", "empty", "early",
                          "broken", "tests") if name in vars(settings)]
    return replace(settings, **{name: max(8, round(vars(settings)[name] * scale)) for name in names})
