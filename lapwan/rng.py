"""Random numbers by key instead of by order: the same key gives the same numbers whatever was drawn before.

Noise, sigma, order and initial weights are keyed by (seed, step, sample, purpose). So a batch of two equals two batches
of one, two processes draw the same as one, and a resumed run continues bitwise.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RandomKey = tuple[int | str, ...]


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key; sha256, so it is the same on every machine and Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key. Draw on the CPU, then move: a GPU's generator gives other numbers."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))


def uniform(*key: int | str) -> float:
    """A number in [0, 1) for a key."""
    import torch

    return float(torch.rand((), dtype=torch.float64, generator=generator(*key)))
