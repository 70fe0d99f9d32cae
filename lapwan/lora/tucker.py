"""Products of a convolution: kernels counted into the columns, and Tucker cores multiplied into a factor.

LyCORIS stores a convolution's product as A [out, r], a core [r, r, *kernel] and B [r, in]; in LoHa and LoKr A is stored
transposed. The core times B is a factor [r, in, *kernel] in B's place, so that no kind needs to know of cores.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Core -> (its two factors, whether the first one is stored transposed).
CORES = {
    "mid": ("up", "down", False), "lokr_t1": ("lokr_w1_a", "lokr_w1_b", True),
    "lokr_t2": ("lokr_w2_a", "lokr_w2_b", True), "hada_t1": ("hada_w1_a", "hada_w1_b", True),
    "hada_t2": ("hada_w2_a", "hada_w2_b", True),
}


def flat(tensor: Tensor) -> Tensor:
    """The factor as a matrix."""
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


def without_cores(parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same update without Tucker cores.

    Raises:
        ValueError: a core that does not fit its factors, or has none.
    """
    for core, (left, right, transposed) in CORES.items():
        if core not in parts:
            continue
        if left not in parts or right not in parts:
            raise ValueError("a Tucker core without its factors")
        a, b, t = _matrix(parts[left]), _matrix(parts[right]), parts[core]
        if t.dim() < 2 or t.shape[1] != b.shape[0] or a.shape[0 if transposed else 1] != t.shape[0]:
            raise ValueError(f"a Tucker core {list(t.shape)} between {list(a.shape)} and {list(b.shape)}")
        kernel = t.double().reshape(*t.shape[:2], -1)
        product = torch.einsum("pqk,qi->pik", kernel, b.double()).float()
        parts = {part: tensor for part, tensor in parts.items() if part != core} | {
            left: a.T.contiguous() if transposed else parts[left],
            right: product.reshape(*product.shape[:2], *t.shape[2:])}
    return parts


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, columns] of a factor whose kernel is 1."""
    if tensor.dim() < 2 or tensor.shape[2:].numel() != 1:
        raise ValueError(f"a factor {list(tensor.shape)} of a Tucker decomposition is not a matrix")
    return tensor.flatten(1)
