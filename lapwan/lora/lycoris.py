"""LyCORIS' kinds of update with products of more than two factors: LoKr and LoHa. See `lapwan.lora.kinds`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lapwan.checkpoints.rewrite import AddRows, BaseRows
from lapwan.lora.state import WeightUpdate
from lapwan.lora.svd import LeadingSvd, kronecker_svd, matrix_svd, product_svd, singular_values
from lapwan.lora.tucker import flat

_SMALLER = 8  # how much smaller than ΔW's dimensions a product of two ranks must be for its QR to cost less than ΔW


@dataclass
class LoKr(WeightUpdate):
    """alpha / r · w1 ⊗ w2, each factor whole (`lokr_w1`) or a product (`lokr_w1_a` [p, r], `lokr_w1_b` [r, q]).

    Source: LyCORIS (arXiv 2309.14859).

    Args:
        tensors: the factors by part.
        alpha: numerator of the scale; None: scale 1.
    """

    KIND = "LoKr"
    PARTS: ClassVar[Mapping[str, str]] = {
        part: f"{part} factor" for w in ("lokr_w1", "lokr_w2") for part in (w, f"{w}_a", f"{w}_b")}
    FORM = "the factors w1 [p, q] and w2 [m, n] of a Kronecker product"
    tensors: dict[str, Tensor]
    alpha: float | None

    def __post_init__(self) -> None:
        for whole in ("lokr_w1", "lokr_w2"):
            a, b = self.tensors.get(f"{whole}_a"), self.tensors.get(f"{whole}_b")
            fits = self.tensors[whole].dim() == 2 if a is None or b is None else (
                whole not in self.tensors and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0])
            if not fits:
                raise ValueError(self.FORM)

    @classmethod
    def missing(cls, parts: Collection[str]) -> str | None:
        for whole in ("lokr_w1", "lokr_w2"):
            pair = [part for part in (f"{whole}_a", f"{whole}_b") if part not in parts]
            if whole not in parts and pair:
                return cls.PARTS[whole if len(pair) == 2 else pair[0]]
        return None

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> LoKr:
        # Of a convolution, the kernel is counted into the columns: rows of w1 ⊗ w2 are then as those of a Linear.
        return cls({part: flat(parts[part]) for part in cls.PARTS if part in parts}, alpha)

    def parts(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    @property
    def rank(self) -> int | None:
        factor = self.tensors.get("lokr_w2_b", self.tensors.get("lokr_w1_b"))
        return None if factor is None else factor.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        (p, q), (m, n) = (self._factor_shape(whole) for whole in ("lokr_w1", "lokr_w2"))
        return p * m, q * n

    def _factor_shape(self, whole: str) -> tuple[int, int]:
        if whole in self.tensors:
            return self.tensors[whole].shape[0], self.tensors[whole].shape[1]
        return self.tensors[f"{whole}_a"].shape[0], self.tensors[f"{whole}_b"].shape[1]

    def _factor(self, whole: str, dtype: torch.dtype) -> Tensor:
        if whole in self.tensors:
            return self.tensors[whole].to(dtype)
        return self.tensors[f"{whole}_a"].to(dtype) @ self.tensors[f"{whole}_b"].to(dtype)

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        # Whole factors in their stored dtype: w2 may be nearly as large as W.
        w1, w2 = (self.tensors[whole] if whole in self.tensors else self._factor(whole, dtype)
                  for whole in ("lokr_w1", "lokr_w2"))
        scale = multiplier * self.scale

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            rows = torch.arange(first, first + len(work))
            # Row i of w1 ⊗ w2 is row i // m of w1 times row i % m of w2, m the rows of w2.
            tile = w1[rows // len(w2), :, None].to(dtype) * w2[rows % len(w2), None, :].to(dtype)
            work.add_(tile.flatten(1), alpha=scale)

        return add_rows

    def svd(self, count: int) -> LeadingSvd:
        """From the SVDs of w1 and w2."""
        first, second = (self._factor_svd(whole, count) for whole in ("lokr_w1", "lokr_w2"))
        return kronecker_svd(first, second, count).times(self.scale)

    def singular_values(self) -> Tensor | None:
        """Products of one of w1 and one of w2."""
        first, second = (
            singular_values(self.tensors[whole]) if whole in self.tensors
            else singular_values(self.tensors[f"{whole}_a"], self.tensors[f"{whole}_b"])
            for whole in ("lokr_w1", "lokr_w2"))
        return None if first is None or second is None else torch.outer(first, second).flatten() * abs(self.scale)

    def _factor_svd(self, whole: str, count: int) -> LeadingSvd:
        if whole in self.tensors:
            return matrix_svd(self.tensors[whole].float(), count)
        return product_svd(self.tensors[f"{whole}_a"], self.tensors[f"{whole}_b"])

    def norm(self, weight: Tensor | None = None) -> float:
        """alpha / r · ‖w1‖ ‖w2‖."""
        norms = (torch.linalg.vector_norm(self._factor(w, torch.float64)).item() for w in ("lokr_w1", "lokr_w2"))
        return abs(self.scale) * float(math.prod(norms))


@dataclass
class LoHa(WeightUpdate):
    """alpha / r · (A1 B1) ∘ (A2 B2): `hada_w1_a` [out, r], `hada_w1_b` [r, in] and the same of w2.

    Source: FedPara (arXiv 2108.06098), as in LyCORIS.

    Args:
        tensors: the four factors by part.
        alpha: numerator of the scale; None: scale 1.
    """

    KIND = "LoHa"
    PARTS: ClassVar[Mapping[str, str]] = {
        part: f"{part} factor" for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    FORM = "the factors [out, r] and [r, in] of two products of one shape"
    tensors: dict[str, Tensor]
    alpha: float | None

    def __post_init__(self) -> None:
        a1, b1, a2, b2 = (self.tensors[part].shape for part in self.PARTS)
        fits = all(len(shape) == 2 for shape in (a1, b1, a2, b2)) and a1[1] == b1[0] and a2[1] == b2[0]
        if not fits or (a1[0], b1[1]) != (a2[0], b2[1]):
            raise ValueError(self.FORM)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> LoHa:
        return cls({part: flat(parts[part]) for part in cls.PARTS}, alpha)

    def parts(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    @property
    def rank(self) -> int:
        return self.tensors["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["hada_w1_a"].shape[0], self.tensors["hada_w1_b"].shape[1]

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Column r1·r2 of B is the product of a column of A1 and one of A2, and A likewise: rank r1 · r2 at most."""
        a1, b1, a2, b2 = (self.tensors[part].double() for part in self.PARTS)
        if len(b1) * len(b2) * _SMALLER > min(self.shape):
            return None
        up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
        return up * self.scale, (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        a1, b1, a2, b2 = (self.tensors[part].to(dtype) for part in self.PARTS)
        scale = multiplier * self.scale

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            rows = slice(first, first + len(work))
            work.addcmul_(a1[rows] @ b1, a2[rows] @ b2, value=scale)

        return add_rows
