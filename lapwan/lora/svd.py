"""Leading singular values and vectors of ΔW, from its factors where it has them:

    product             B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, exact and without ΔW
    Kronecker product   w1 ⊗ w2 = (U1 ⊗ U2) (S1 ⊗ S2) (V1 ⊗ V2)ᵀ, of which the largest values are kept
    of a whole ΔW       exact up to 1024 rows or columns, else randomised with power iterations
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EXACT_SIZE = 1024  # the smaller dimension of ΔW up to which its SVD is computed whole
_OVERSAMPLING = 16


class LeadingSvd(NamedTuple):
    """U [out, k], V [in, k] and s [k] of leading singular values, and the energy Σ s² of all of them."""

    left: Tensor
    right: Tensor
    values: Tensor
    energy: float

    def times(self, multiplier: float) -> LeadingSvd:
        """Of multiplier · ΔW."""
        left = self.left if multiplier >= 0 else -self.left
        return LeadingSvd(left, self.right, self.values * abs(multiplier), self.energy * multiplier**2)


def product_svd(up: Tensor, down: Tensor) -> LeadingSvd:
    """The whole SVD of B A in fp64, by QR of the thin factors.

    Args:
        up: B [out, r].
        down: A [r, in].
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return LeadingSvd(q_up @ u, q_down @ vh.T, s, s.square().sum().item())


def singular_values(matrix: Tensor, down: Tensor | None = None) -> Tensor | None:
    """All singular values of a matrix or of B A in fp64, to 1e-8 of the largest; None beyond `_EXACT_SIZE`.

    Args:
        matrix: the whole matrix, or B [out, r].
        down: A [r, in].
    """
    if down is not None:
        matrix = torch.linalg.qr(matrix.double())[1] @ torch.linalg.qr(down.double().T)[1].T
    if min(matrix.shape) > _EXACT_SIZE:
        return None
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.T)  # a fourth of the time of an SVD
    return squares.clamp_min(0).sqrt()


def kronecker_svd(first: LeadingSvd, second: LeadingSvd, count: int) -> LeadingSvd:
    """The SVD of w1 ⊗ w2 from those of w1 and w2, which need `count` values each at most.

    Args:
        first, second: of w1 and w2.
        count: values wanted; fewer if there are no more.
    """
    values, indices = (first.values[:, None] * second.values).flatten().sort(descending=True, stable=True)
    i, j = (index[:count] for index in (indices // len(second.values), indices % len(second.values)))
    left, right = ((a[:, None, i] * b[None, :, j]).flatten(0, 1) for a, b in zip(first[:2], second[:2], strict=True))
    return LeadingSvd(left, right, values[:count], first.energy * second.energy)


def matrix_svd(matrix: Tensor, count: int) -> LeadingSvd:
    """At least the `count` largest singular values of a matrix, or all that it has.

    Args:
        matrix: ΔW [out, in], fp32 or fp64.
        count: values wanted.
    """
    if min(matrix.shape) <= _EXACT_SIZE:
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return LeadingSvd(u, vh.T, s, s.square().sum().item())
    energy = sum(torch.linalg.vector_norm(row, dtype=torch.float64).item() ** 2 for row in matrix)
    return LeadingSvd(*leading_directions(matrix, count, iterations=4), energy)


def leading_directions(delta: Tensor, count: int, iterations: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(U [out, l], V [in, l], s [l]) of the leading singular values, l >= min(count, out, in); the same each time.

    Exact for a large `count`, else a randomised SVD with power iterations and a fixed seed (Halko et al.,
    arXiv 0909.4061).

    Args:
        delta: matrix [out, in], fp32 or fp64.
        count: directions wanted, at least 1.
        iterations: power iterations; more are nearer to the exact SVD where singular values fall slowly.
    """
    smallest, size = min(delta.shape), count + _OVERSAMPLING
    if 2 * size >= smallest:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        return u, vh.T, s
    generator = torch.Generator(delta.device).manual_seed(0)
    omega = torch.randn(delta.shape[1], size, generator=generator, device=delta.device, dtype=delta.dtype)
    q = torch.linalg.qr(delta @ omega).Q
    for _ in range(iterations):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    right, lower = torch.linalg.qr(delta.T @ q)
    u, s, vh = torch.linalg.svd(lower.T.double(), full_matrices=False)
    return q @ u.to(q.dtype), right @ vh.T.to(q.dtype), s.to(q.dtype)
