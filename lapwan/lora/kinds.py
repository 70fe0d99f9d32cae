"""The kinds of update that an adapter makes to one tensor W of a model; each can compute its ΔW.

    LoRA        ΔW = alpha / r · B A                          `LowRank`, in `lapwan.lora.state` with the base class
    full delta  ΔW as stored: of a weight, a bias, a norm or a modulation table
    LoKr        ΔW = alpha / r · w1 ⊗ w2                      a factor may be a product of rank r (arXiv 2309.14859)
    LoHa        ΔW = alpha / r · (A1 B1) ∘ (A2 B2)            (arXiv 2108.06098)
    DoRA        ΔW = m · (W + V) / ‖W + V‖_row − W            V = the ΔW of another kind (arXiv 2402.09353)

Sums and merges take ΔW in tiles of rows (`prepare`), so that no whole ΔW is formed. W of more than two dimensions
counts as the matrix [out, all others], a vector as one column.

How to add a kind: a subclass of `WeightUpdate` here, in `KINDS`, with its abstract methods and, where the defaults do
not serve, `missing`, `rank`, `norm` or `needs_weight`; the names of its parts in `PARTS` of
`lapwan.checkpoints.lora_keys`. Reading, writing, merging and `inspect-weights` then know it; generation merges it into
the weights at load; training, and the sum of two files that both change one tensor by it, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lapwan.checkpoints.rewrite import AddRows, matrix_shape
from lapwan.errors import UserError
from lapwan.lora.state import LowRank, WeightUpdate


@dataclass
class FullDelta(WeightUpdate):
    """ΔW itself, in its stored dtype."""

    KIND = "full delta"
    PARTS: ClassVar[Mapping[str, str]] = {"diff": "difference"}
    FORM = "a difference of at least one dimension"
    alpha = None
    value: Tensor

    def __post_init__(self) -> None:
        if self.value.dim() < 1:
            raise ValueError(self.FORM)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> FullDelta:
        return cls(parts["diff"])

    def parts(self) -> dict[str, Tensor]:
        return {"diff": self.value}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def prepare(self, multiplier: float, dtype: torch.dtype) -> AddRows:
        matrix = self.value.reshape(matrix_shape(self.shape))

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            work.add_(matrix[first : first + len(work)].to(dtype), alpha=multiplier)

        return add_rows


@dataclass
class LoKr(WeightUpdate):
    """alpha / r · w1 ⊗ w2, each factor whole (`lokr_w1`) or a product (`lokr_w1_a` [p, r], `lokr_w1_b` [r, q])."""

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
        return cls({part: parts[part] for part in cls.PARTS if part in parts}, alpha)

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

    def prepare(self, multiplier: float, dtype: torch.dtype) -> AddRows:
        w1, w2 = self._factor("lokr_w1", dtype), self._factor("lokr_w2", dtype)
        scale = multiplier * self.scale

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            rows = torch.arange(first, first + len(work))
            # Row i of w1 ⊗ w2 is row i // m of w1 times row i % m of w2, m the rows of w2.
            tile = w1[rows // len(w2), :, None] * w2[rows % len(w2), None, :]
            work.add_(tile.flatten(1), alpha=scale)

        return add_rows

    def norm(self, weight: Tensor | None = None) -> float:
        """alpha / r · ‖w1‖ ‖w2‖."""
        norms = (torch.linalg.vector_norm(self._factor(w, torch.float64)).item() for w in ("lokr_w1", "lokr_w2"))
        return abs(self.scale) * float(math.prod(norms))


@dataclass
class LoHa(WeightUpdate):
    """alpha / r · (A1 B1) ∘ (A2 B2): `hada_w1_a` [out, r], `hada_w1_b` [r, in] and the same of w2."""

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
        return cls({part: parts[part] for part in cls.PARTS}, alpha)

    def parts(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    @property
    def rank(self) -> int:
        return self.tensors["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors["hada_w1_a"].shape[0], self.tensors["hada_w1_b"].shape[1]

    def prepare(self, multiplier: float, dtype: torch.dtype) -> AddRows:
        a1, b1, a2, b2 = (self.tensors[part].to(dtype) for part in self.PARTS)
        scale = multiplier * self.scale

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            rows = slice(first, first + len(work))
            work.addcmul_(a1[rows] @ b1, a2[rows] @ b2, value=scale)

        return add_rows


@dataclass
class DoRA(WeightUpdate):
    """m · (W + V) / ‖W + V‖ − W, norms by row of W; V is the ΔW of `direction`, m has a number for each row."""

    KIND = "DoRA"
    PARTS: ClassVar[Mapping[str, str]] = {"magnitude": "magnitude"}
    FORM = "a DoRA with a magnitude for each row of the weight"
    direction: WeightUpdate
    magnitude: Tensor

    def __post_init__(self) -> None:
        # [1, in] is a magnitude for each column, which some tools write.
        columns = self.magnitude.dim() == 2 and self.magnitude.shape[0] == 1 < self.magnitude.shape[1]
        if columns or self.magnitude.numel() != self.direction.shape[0]:
            raise ValueError(self.FORM)
        self.alpha = self.direction.alpha

    @classmethod
    def missing(cls, parts: Collection[str]) -> str | None:
        direction = [part for part in parts if part not in cls.PARTS]
        return kind_of(direction).missing(direction)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> DoRA:
        direction = build_update({part: tensor for part, tensor in parts.items() if part not in cls.PARTS}, alpha)
        return cls(direction, parts["magnitude"])

    def parts(self) -> dict[str, Tensor]:
        return {**self.direction.parts(), "magnitude": self.magnitude}

    @property
    def rank(self) -> int | None:
        return self.direction.rank

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    def prepare(self, multiplier: float, dtype: torch.dtype) -> AddRows:
        add_direction = self.direction.prepare(1.0, dtype)
        magnitude = self.magnitude.to(dtype).reshape(-1, 1)

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            before = base.to(dtype)
            moved = before.clone()
            add_direction(moved, base, first)
            length = torch.linalg.vector_norm(moved, dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
            work.add_(moved * (magnitude[first : first + len(work)] / length) - before, alpha=multiplier)

        return add_rows

    def scaled(self, multiplier: float) -> WeightUpdate:
        if multiplier == 1.0:
            return self
        raise UserError(f"a DoRA cannot be written at strength {multiplier:g}: its update is not a multiple of another "
                        "DoRA's; merge it into the model at this strength instead: lapwan merge --model")

    def _times(self, factor: float, dtype: torch.dtype | None) -> WeightUpdate:
        return DoRA(self.direction.folded(dtype), self.magnitude)


KINDS: tuple[type[WeightUpdate], ...] = (LowRank, FullDelta, LoKr, LoHa, DoRA)


def kind_of(parts: Collection[str]) -> type[WeightUpdate]:
    """The kind that has these parts; a LoRA if none of them identifies another.

    Raises:
        ValueError: parts of two kinds.
    """
    if "magnitude" in parts:
        return DoRA
    kinds = [kind for kind in KINDS if any(part in kind.PARTS for part in parts)] or [LowRank]
    if len(kinds) > 1:
        raise ValueError(" and ".join(kind.KIND for kind in kinds))
    return kinds[0]


def build_update(parts: Mapping[str, Tensor], alpha: float | None) -> WeightUpdate:
    """The update with these tensors by part, and `alpha` (None: scale 1).

    Raises:
        ValueError: shapes that do not fit each other.
    """
    return kind_of(parts).from_parts(parts, alpha)
