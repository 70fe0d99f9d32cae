"""A LoRA in memory, as file formats, merging, training and diagnostics exchange it.

    ΔW = alpha / r · B A,    A = `down` [r, in],  B = `up` [out, r]

Paths are diffusers' module paths (`blocks.0.attn1.to_q`), whatever the layout of the file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class LoraEntry:
    """One Linear's low-rank update, in its stored dtype.

    Raises:
        ValueError: A and B are not [r, in] and [out, r].
    """

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        fits = self.down.dim() == 2 and self.up.dim() == 2 and self.down.shape[0] == self.up.shape[1]
        if not fits:
            raise ValueError(f"A {list(self.down.shape)} and B {list(self.up.shape)} are not [r, in] and [out, r]")

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the Linear's weight."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW = alpha / r · B A, [out, in], computed in `dtype` (float32 or float64)."""
        return (self.up.to(dtype) @ self.down.to(dtype)).mul_(self.scale)

    def entry(self) -> LoraEntry:
        """Itself: an entry in memory can be used in place of a module of a file."""
        return self


class Entry(Protocol):
    """A LoRA module that is read when needed: `formats.LoraModule`, or a `LoraEntry` in memory."""

    @property
    def rank(self) -> int:
        """r."""

    def entry(self) -> LoraEntry:
        """A, B and alpha."""


@dataclass(frozen=True)
class Term:
    """One LoRA module and its multiplier m: m · (alpha / r) · B A is added to a weight."""

    module: Entry
    multiplier: float

    def prepare(self, dtype: torch.dtype) -> Callable[[Tensor, int], None]:
        """Implements `checkpoints.rewrite.Update`: A and B are converted once, not for every tile.

        Copied even if the dtype is right: the rounding of products depends on alignment, which differs between files.
        """
        entry = self.module.entry()
        down, up = entry.down.to(dtype, copy=True), entry.up.to(dtype, copy=True)
        scale = self.multiplier * entry.scale

        def add_rows(work: Tensor, first: int) -> None:
            work.addmm_(up[first : first + work.shape[0]] * scale, down)

        return add_rows


def entries_fingerprint(entries: Iterable[tuple[str, LoraEntry]]) -> str:
    """`LoraState.fingerprint` over (path, entry) sorted by path, so that a file can be read module by module."""
    digest = hashlib.sha256()
    for path, entry in entries:
        out_features, in_features = entry.shape
        digest.update(path.encode() + b"\0")
        digest.update(struct.pack("<QQQd", entry.rank, in_features, out_features, entry.alpha))
        for tensor in (entry.down, entry.up):
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


@dataclass
class LoraState:
    """The LoRA of one noise expert: entries by diffusers' module path, and the file's metadata (all strings)."""

    entries: dict[str, LoraEntry]
    metadata: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """sha256 over (path, r, in, out, alpha as fp64, A as fp32, B as fp32), paths sorted: 64 hex digits.

        Independent of layout, metadata and a cast to a wider dtype; a narrowing cast changes it, as it changes ΔW.
        """
        return entries_fingerprint((path, self.entries[path]) for path in sorted(self.entries))

    def ranks(self) -> dict[str, int]:
        """Rank by path."""
        return {path: entry.rank for path, entry in self.entries.items()}
