"""Facts about Wan2.2 that need no torch: the noise experts, their sigma bands, and module names in each key layout.

Source: the official Wan2.2 configs and diffusers' WanTransformer3DModel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class NoiseExpert(StrEnum):
    """One of the two transformers. `HIGH` works at sigma >= boundary, `LOW` below it."""

    HIGH = "high"
    LOW = "low"

    @property
    def component(self) -> str:
        """The component's name in a diffusers folder."""
        return "transformer" if self is NoiseExpert.HIGH else "transformer_2"

    @property
    def file_suffix(self) -> str:
        """`{name}_{file_suffix}.safetensors` is this noise expert's LoRA file."""
        return f"{self.value}_noise"


class Precision(StrEnum):
    """Forms of the frozen base's Linears in fewer bits than they are computed in: see `lapwan.wan.quantise`."""

    FP8 = "fp8"
    INT8 = "int8"
    NF4 = "nf4"


@dataclass(frozen=True)
class Band:
    """An interval of sigma in [0, 1] (1 = pure noise) that a noise expert serves."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


def bands(boundary: float | None) -> dict[NoiseExpert, Band]:
    """Sigma bands by noise expert; without a boundary one transformer serves all of [0, 1]."""
    if boundary is None:
        return {NoiseExpert.HIGH: Band(0.0, 1.0)}
    return {NoiseExpert.HIGH: Band(boundary, 1.0), NoiseExpert.LOW: Band(0.0, boundary)}


def noise_expert_for(sigma: float, boundary: float | None) -> NoiseExpert:
    """The noise expert for `sigma`; sigma equal to the boundary belongs to the high one."""
    return NoiseExpert.HIGH if boundary is None or sigma >= boundary else NoiseExpert.LOW


# The ten Linear modules of a Wan block: short name as users say it -> path inside the block in diffusers' layout.
PROJECTIONS: dict[str, str] = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}

# Modules outside the blocks: original path -> diffusers path.
OUTER_MODULES: dict[str, str] = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_TO_DIFFUSERS = PROJECTIONS
_TO_ORIGINAL = {diffusers: original for original, diffusers in PROJECTIONS.items()}
_OUTER_TO_ORIGINAL = {diffusers: original for original, diffusers in OUTER_MODULES.items()}


def to_diffusers(path: str) -> str | None:
    """A Linear's path, original layout (`blocks.0.self_attn.q`) to diffusers' (`blocks.0.attn1.to_q`); else None."""
    if match := _BLOCK.match(path):
        inner = _TO_DIFFUSERS.get(match[2])
        return f"blocks.{match[1]}.{inner}" if inner else None
    return OUTER_MODULES.get(path)


def to_original(path: str) -> str | None:
    """The inverse of `to_diffusers`."""
    if match := _BLOCK.match(path):
        inner = _TO_ORIGINAL.get(match[2])
        return f"blocks.{match[1]}.{inner}" if inner else None
    return _OUTER_TO_ORIGINAL.get(path)


_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_ORIGINAL_NORMS = {
    "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k", "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k", "norm3": "norm2",  # the original numbers the norms in another order
}


def tensor_to_diffusers(name: str) -> str:
    """A transformer tensor's name in diffusers' layout; a name that is not of the original layout stays as it is.

    `model.diffusion_model.blocks.0.self_attn.q.weight` -> `blocks.0.attn1.to_q.weight`.
    """
    plain = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
    path, _, leaf = plain.rpartition(".")
    if leaf == "modulation":
        return "scale_shift_table" if path == "head" else f"{path}.scale_shift_table"
    if (known := to_diffusers(path)) is not None:
        return f"{known}.{leaf}"
    match = _BLOCK.match(path)
    if match and match[2] in _ORIGINAL_NORMS:  # diffusers' own norm3 has no tensors
        return f"blocks.{match[1]}.{_ORIGINAL_NORMS[match[2]]}.{leaf}"
    return plain


def split_block(path: str) -> tuple[int, str] | None:
    """`blocks.7.attn1.to_q` -> (7, 'self_attn.q'); None for a module outside the blocks."""
    match = _BLOCK.match(path)
    if match is None or match[2] not in _TO_ORIGINAL:
        return None
    return int(match[1]), _TO_ORIGINAL[match[2]]
