"""Wan2.2's two noise experts, their sigma bands, the negative prompt, and the precisions of a frozen base. No torch.

Module and tensor names in each key layout are in `lapwan.checkpoints.wan_keys`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Checkpointing = Literal["off", "op", "block"]  # what a backward recomputes: nothing, cheap operations, whole blocks

# Wan2.2's official default (sample_neg_prompt of its shared configuration).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class NoiseExpert(StrEnum):
    """One of the two transformers. `HIGH` works at sigma >= boundary, `LOW` below it."""

    HIGH = "high"
    LOW = "low"

    @property
    def component(self) -> str:
        """The component's name in a diffusers folder."""
        return "transformer" if self is NoiseExpert.HIGH else "transformer_2"

    @property
    def one_file_component(self) -> str:
        """The component's name in the keys of a LoRA file for all noise experts."""
        return "transformer_1" if self is NoiseExpert.HIGH else "transformer_2"

    @property
    def file_suffix(self) -> str:
        """`{name}_{file_suffix}.safetensors` is this noise expert's LoRA file."""
        return f"{self.value}_noise"


class Precision(StrEnum):
    """Quantised formats of the frozen base's Linears: see `lapwan.wan.quantise`."""

    FP8 = "fp8"
    INT8 = "int8"
    NF4 = "nf4"


@dataclass(frozen=True)
class Band:
    """The interval of sigma in [0, 1] (1 = pure noise) in which a noise expert is used."""

    low: float
    high: float

    def __contains__(self, sigma: float) -> bool:
        """A boundary belongs to the band above it, and sigma 1 to the highest band."""
        return self.low <= sigma < self.high or sigma == self.high == 1.0

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


def bands(boundary: float | None) -> dict[NoiseExpert, Band]:
    """Sigma bands by noise expert; without a boundary a single transformer covers [0, 1]."""
    if boundary is None:
        return {NoiseExpert.HIGH: Band(0.0, 1.0)}
    return {NoiseExpert.HIGH: Band(boundary, 1.0), NoiseExpert.LOW: Band(0.0, boundary)}


def noise_expert_for(level: float, boundary: float | None) -> NoiseExpert:
    """The noise expert for a sigma, or for a timestep if `boundary` is one; the boundary belongs to the high one."""
    return NoiseExpert.HIGH if boundary is None or level >= boundary else NoiseExpert.LOW
