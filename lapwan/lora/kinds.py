"""The kinds of update that an adapter makes to one tensor W of a model; each can compute its ΔW.

    LoRA        ΔW = alpha / r · B A                          `LowRank`, in `lapwan.lora.state` with the base class
    full delta  ΔW as stored: of a weight, a bias, a norm or a modulation table
    LoKr        ΔW = alpha / r · w1 ⊗ w2                      a factor may be a product of rank r (arXiv 2309.14859)
    LoHa        ΔW = alpha / r · (A1 B1) ∘ (A2 B2)            (arXiv 2108.06098)
    GLoRA       ΔW = alpha / r · (W P Q + U D)                in its two orders of factors (arXiv 2306.07967)
    DoRA        ΔW = m · (W + V) / ‖W + V‖ − W                V = the ΔW of another kind (arXiv 2402.09353); norms by
                                                              row of W, or by column where m is [1, in]

A Tucker core (`lora_mid`, `hada_t1`, `lokr_t2`) is multiplied into a factor when it is read.
Sums and merges take ΔW in tiles of rows (`prepare`), so that no whole ΔW is formed. W of more than two dimensions
counts as the matrix [out, all others], a vector as one column.

How to add a kind: a subclass of `WeightUpdate` here (LoKr and LoHa: `lycoris`), in `KINDS`, with its abstract methods
and, where the defaults do not serve, `missing`, `rank`, `norm` or `needs_weight`; the names of its parts in `PARTS` of
`lapwan.checkpoints.lora_keys`. Reading, writing, merging and `inspect-weights` then know it; generation merges it into
the weights at load; training, and the sum of two files that both change one tensor by it, are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lapwan.checkpoints.rewrite import AddRows, BaseRows, matrix_shape
from lapwan.errors import UserError
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.state import LowRank, WeightUpdate
from lapwan.lora.tucker import CORES, flat, without_cores


@dataclass
class FullDelta(WeightUpdate):
    """ΔW itself, in its stored dtype.

    Args:
        value: ΔW, in the shape of W.
    """

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

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        matrix = self.value.reshape(matrix_shape(self.shape))

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            work.add_(matrix[first : first + len(work)].to(dtype) * multiplier)

        return add_rows


@dataclass
class GLoRA(WeightUpdate):
    """alpha / r · (W P Q + U D), P Q square in W's columns.

    LyCORIS stores (P, Q, U, D) as (a1, a2, b1, b2), and before its version 2 as (a2, a1, b2, b1).

    Source: arXiv 2306.07967.

    Args:
        tensors: the four factors by part.
        alpha: numerator of the scale; None: scale 1.
    """

    KIND = "GLoRA"
    PARTS: ClassVar[Mapping[str, str]] = {f"glora_{factor}": f"{factor} factor" for factor in ("a1", "a2", "b1", "b2")}
    FORM = "the factors [in, r], [r, in], [out, r] and [r, in] of a GLoRA"
    tensors: dict[str, Tensor]
    alpha: float | None

    def __post_init__(self) -> None:
        p, q, u, d = (tensor.shape for tensor in self._factors(None))
        if not (p[1] == q[0] == u[1] == d[0] and p[0] == q[1] and d[1] % p[0] == 0):
            raise ValueError(self.FORM)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> GLoRA:
        return cls({part: flat(parts[part]) for part in cls.PARTS}, alpha)

    def _factors(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(P, Q, U, D)."""
        a1, a2, b1, b2 = (tensor if dtype is None else tensor.to(dtype) for tensor in self.tensors.values())
        if b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]:
            return a2, a1, b2, b1
        return a1, a2, b1, b2

    def parts(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    @property
    def rank(self) -> int:
        return self._factors(None)[3].shape[0]

    @property
    def needs_weight(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        _, _, u, d = self._factors(None)
        return u.shape[0], d.shape[1]

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        p, q, u, d = self._factors(dtype)
        scale = multiplier * self.scale

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            product = base.to(dtype).reshape(len(work), len(p), -1)  # [rows, in, kernel]
            product = torch.einsum("nik,ir,rj->njk", product, p, q).flatten(1)
            work.add_(product.addmm_(u[first : first + len(work)], d), alpha=scale)

        return add_rows

    def scaled(self, multiplier: float) -> WeightUpdate:
        return GLoRA(self.tensors, (self.rank if self.alpha is None else self.alpha) * multiplier)

    def _times(self, factor: float, dtype: torch.dtype | None) -> WeightUpdate:
        """One factor of each product is multiplied."""
        tensors = {part: (tensor.float() * factor).to(dtype or tensor.dtype) if part.endswith("2") else tensor
                   for part, tensor in self.tensors.items()}
        return GLoRA(tensors, None)


@dataclass
class DoRA(WeightUpdate):
    """m · (W + V) / ‖W + V‖ − W, V the ΔW of `direction`.

    m has a number for each row of W and norms are by row; if it is [1, in, ...], for each column and by column (of a
    convolution, input channel), as LyCORIS writes it with `wd_on_output=False`.

    Source: arXiv 2402.09353.

    Args:
        direction: the update that changes W's direction.
        magnitude: m.
    """

    KIND = "DoRA"
    PARTS: ClassVar[Mapping[str, str]] = {"magnitude": "magnitude"}
    FORM = "a DoRA with a magnitude for each row [out, 1] or column [1, in] of the weight"
    direction: WeightUpdate
    magnitude: Tensor

    def __post_init__(self) -> None:
        rows, columns = matrix_shape(self.direction.shape)
        count = self.magnitude.numel()
        fits = columns % max(1, count) == 0 if self.by_column else count == rows
        if not fits:
            raise ValueError(self.FORM)
        self.alpha = self.direction.alpha

    @property
    def by_column(self) -> bool:
        """Norms are of W's columns."""
        shape, count = self.magnitude.shape, self.magnitude.numel()
        rows, columns = matrix_shape(self.direction.shape)
        # PEFT writes those by row of a convolution as [1, out, 1, ...].
        return len(shape) > 1 and shape[0] == 1 and (count == columns > 1 or count != rows)

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

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        add_direction = self.direction.prepare(1.0, dtype, base_rows)

        def moved(base: Tensor, first: int) -> Tensor:
            rows = base.to(dtype, copy=True)
            add_direction(rows, base, first)
            return rows

        magnitude, tiny = self.magnitude.to(dtype).reshape(-1, 1), torch.finfo(dtype).tiny
        ratio = self._column_ratio(moved, base_rows).to(dtype) if self.by_column else None

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            rows = moved(base, first)
            if ratio is not None:
                rows *= ratio
            else:
                length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(tiny)
                rows *= magnitude[first : first + len(work)] / length
            work.add_(rows - base.to(dtype), alpha=multiplier)

        return add_rows

    def _column_ratio(self, moved: Callable[[Tensor, int], Tensor], base_rows: BaseRows | None) -> Tensor:
        """m / ‖W + V‖ of every column in fp64, by one pass over W in tiles."""
        if base_rows is None:
            raise ValueError("a DoRA by columns needs all of the weight")
        rows, columns = matrix_shape(self.shape)
        step, squares = max(1, _TILE // columns), torch.zeros(columns, dtype=torch.float64)
        for first in range(0, rows, step):
            squares += moved(base_rows(first, min(step, rows - first)), first).double().square().sum(0)
        channels = squares.reshape(self.magnitude.numel(), -1)
        length = channels.sum(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        return (self.magnitude.double().reshape(-1, 1) / length).expand_as(channels).flatten()

    def scaled(self, multiplier: float) -> WeightUpdate:
        if multiplier == 1.0:
            return self
        raise UserError(f"a DoRA cannot be written at strength {multiplier:g}: its update is not a multiple of another "
                        "DoRA's; merge it into the model at this strength instead: lapwan merge --model")

    def _times(self, factor: float, dtype: torch.dtype | None) -> WeightUpdate:
        return DoRA(self.direction.folded(dtype), self.magnitude)


_TILE = 1 << 20  # elements of W at a time
KINDS: tuple[type[WeightUpdate], ...] = (LowRank, FullDelta, LoKr, LoHa, GLoRA, DoRA)


def kind_of(parts: Collection[str]) -> type[WeightUpdate]:
    """The kind that has these parts; a LoRA if none of them identifies another.

    Raises:
        ValueError: parts of two kinds.
    """
    if "magnitude" in parts:
        return DoRA
    names = {CORES[part][0] if part in CORES else part for part in parts}
    kinds = [kind for kind in KINDS if any(name in kind.PARTS for name in names)] or [LowRank]
    if len(kinds) > 1:
        raise ValueError(" and ".join(kind.KIND for kind in kinds))
    return kinds[0]


def build_update(parts: Mapping[str, Tensor], alpha: float | None) -> WeightUpdate:
    """The update that a file's tensors describe; its kind follows from the parts.

    Args:
        parts: tensors by part, as in `PARTS` of a kind.
        alpha: numerator of the scale; None: scale 1.

    Raises:
        ValueError: shapes that do not fit each other.
        ValueError: parts of two kinds.
    """
    parts = without_cores(parts)
    return kind_of(parts).from_parts(parts, alpha)
