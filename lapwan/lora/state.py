"""An adapter in memory, as file formats, merging, training and diagnostics exchange it.

Each entry changes one tensor of the model, by one kind of update (`lapwan.lora.kinds`). It is named by diffusers' path,
whatever the layout of the file: `blocks.0.attn1.to_q` is a module's weight, `blocks.0.attn1.to_q.bias` its bias,
`blocks.0.scale_shift_table` a modulation (`wan_keys.target_path`).
"""

from __future__ import annotations

import hashlib
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from lapwan.checkpoints.rewrite import AddRows, BaseRows, matrix_shape
from lapwan.checkpoints.wan_keys import to_original
from lapwan.errors import UserError
from lapwan.lora.svd import LeadingSvd, product_svd, singular_values

_TILE = 1 << 20  # elements of ΔW at a time for a norm, in fp64


class WeightUpdate(ABC):
    """ΔW of one tensor. `alpha` is None where the kind has no scale."""

    KIND: ClassVar[str]
    PARTS: ClassVar[Mapping[str, str]]  # names of the tensors that a file has of it -> words for messages
    FORM: ClassVar[str]  # what the shapes must be, in words for messages
    alpha: float | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of W; of products [out, in], for convolutions with the kernel counted into `in`."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by part, in their stored dtype."""

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The inverse of `parts`.

        Args:
            parts: tensors by part.
            alpha: numerator of the scale; None: scale 1.

        Raises:
            ValueError: shapes that are not `FORM`.
        """

    @abstractmethod
    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        """A function that adds rows of multiplier · ΔW; tensors are converted to `dtype` once.

        Args:
            multiplier: of ΔW.
            dtype: of the computation.
            base_rows: reads rows of W; needed where ΔW depends on all of W at once.
        """

    @classmethod
    def missing(cls, parts: Collection[str]) -> str | None:
        """The first part that is needed beside `parts`, in words."""
        return next((words for part, words in cls.PARTS.items() if part not in parts), None)

    @property
    def kind(self) -> str:
        """The name for messages and tables."""
        return self.KIND

    @property
    def rank(self) -> int | None:
        """r of its low-rank factors; None where it has none."""
        return None

    @property
    def scale(self) -> float:
        """alpha / r; 1 without them."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    @property
    def stackable(self) -> bool:
        """A low-rank pair of a Linear, which can be trained and act beside the weights."""
        return False

    @property
    def needs_weight(self) -> bool:
        """ΔW depends on W."""
        return False

    def entry(self) -> WeightUpdate:
        """Itself: an update in memory can be used in place of a module of a file."""
        return self

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(B [out, k], A [k, in]) in fp64 with ΔW = B A, the scale in B; None if that is no smaller than ΔW."""
        return None

    def svd(self, count: int) -> LeadingSvd | None:
        """At least the `count` largest singular values from its factors; None if only ΔW itself has them.

        Args:
            count: values wanted.
        """
        factors = self.factors()
        return None if factors is None else product_svd(*factors)

    def singular_values(self) -> Tensor | None:
        """Those of ΔW that are not zero, in fp64, from its factors; None if only ΔW itself has them."""
        factors = self.factors()
        return None if factors is None else singular_values(*factors)

    def map(self, change: Callable[[Tensor], Tensor]) -> WeightUpdate:
        """The same update with `change` applied to each of its tensors, such as a cast."""
        return self.from_parts({part: change(tensor) for part, tensor in self.parts().items()}, self.alpha)

    def delta(self, dtype: torch.dtype = torch.float32, weight: Tensor | None = None) -> Tensor:
        """ΔW in the shape of W, computed in `dtype` (float32 or float64).

        Args:
            weight: W; needed where ΔW depends on it (`needs_weight`).
        """
        matrix, total = self._matrix(weight), torch.zeros(matrix_shape(self.shape), dtype=dtype)
        self.prepare(1.0, dtype, _rows_of(matrix))(total, total if matrix is None else matrix, 0)
        return total.reshape(self.shape)

    def norm(self, weight: Tensor | None = None) -> float:
        """‖ΔW‖_F in fp64, with one tile of it in memory; `weight` as in `delta`."""
        matrix, (rows, columns) = self._matrix(weight), matrix_shape(self.shape)
        add_rows = self.prepare(1.0, torch.float64, _rows_of(matrix))
        step, square = max(1, _TILE // columns), 0.0
        for first in range(0, rows, step):
            tile = torch.zeros(min(step, rows - first), columns, dtype=torch.float64)
            add_rows(tile, tile if matrix is None else matrix[first : first + len(tile)], first)
            square += torch.dot(tile.view(-1), tile.view(-1)).item()
        return math.sqrt(square)

    def _matrix(self, weight: Tensor | None) -> Tensor | None:
        if weight is None and self.needs_weight:
            raise ValueError(f"ΔW of a {self.kind} needs the weight")
        return None if weight is None else weight.reshape(matrix_shape(tuple(weight.shape)))

    def scaled(self, multiplier: float) -> WeightUpdate:
        """multiplier · ΔW: exact through alpha where there is one, else rounded once."""
        if self.rank is not None and self.alpha is not None:
            return self.from_parts(self.parts(), self.alpha * multiplier)
        return self._times(multiplier, None)

    def folded(self, dtype: torch.dtype | None) -> WeightUpdate:
        """The same ΔW at scale 1, its factor rounded once to `dtype` (None: its own)."""
        return self._times(self.scale, dtype) if self.scale != 1.0 else self

    def _times(self, factor: float, dtype: torch.dtype | None) -> WeightUpdate:
        """factor · ΔW / scale: the first part multiplied, in fp32; the result has scale 1."""
        parts = self.parts()
        first = next(iter(parts))
        parts[first] = (parts[first].float() * factor).to(dtype or parts[first].dtype)
        return self.from_parts(parts, None)


def _rows_of(matrix: Tensor | None) -> BaseRows | None:
    return None if matrix is None else lambda first, count: matrix[first : first + count]


@dataclass
class LowRank(WeightUpdate):
    """A low-rank pair in its stored dtype; of a convolution, A is [r, in, *kernel] and B [out, r, 1, ...].

    Source: LoRA (arXiv 2106.09685).

    Args:
        down: A [r, in].
        up: B [out, r].
        alpha: numerator of the scale alpha / r.

    Raises:
        ValueError: A and B are not [r, in] and [out, r].
    """

    KIND = "LoRA"
    PARTS: ClassVar[Mapping[str, str]] = {"down": "A matrix", "up": "B matrix"}
    FORM = "A [r, in] and B [out, r]"
    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        down, up = self.down.shape, self.up.shape
        fits = len(down) >= 2 and len(up) in (2, len(down)) and up[1] == down[0] and up[2:].numel() == 1
        if not fits:
            raise ValueError(f"A {list(down)} and B {list(up)} are not [r, in] and [out, r]")

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], alpha: float | None) -> LowRank:
        down, up = parts["down"], parts["up"]
        if down.dim() > 2 and down.shape[2:].numel() == up.shape[2:].numel() == 1:
            down, up = down.flatten(1), up.flatten(1)  # some tools write a Linear as a convolution of kernel 1
        return cls(down, up, float(down.shape[0]) if alpha is None else alpha)

    def parts(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    @property
    def kind(self) -> str:
        return self.KIND if self.stackable else "convolution LoRA"

    @property
    def stackable(self) -> bool:
        return self.down.dim() == 2

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], *self.down.shape[1:]

    def delta(self, dtype: torch.dtype = torch.float32, weight: Tensor | None = None) -> Tensor:
        """ΔW = alpha / r · B A, computed in `dtype` (float32 or float64)."""
        delta = (self.up.flatten(1).to(dtype) @ self.down.flatten(1).to(dtype)).mul_(self.scale)
        return delta.reshape(self.shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up.flatten(1).double() * self.scale, self.down.flatten(1).double()

    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows:
        """Copied even if the dtype is right: the rounding of products depends on alignment, which differs between
        files."""
        down, up = self.down.flatten(1).to(dtype, copy=True), self.up.flatten(1).to(dtype, copy=True)
        scale = multiplier * self.scale

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            work.addmm_(up[first : first + len(work)] * scale, down)

        return add_rows

    def scaled(self, multiplier: float) -> LowRank:
        return LowRank(self.down, self.up, self.alpha * multiplier)

    def _times(self, factor: float, dtype: torch.dtype | None) -> LowRank:
        up = (self.up.float() * factor).to(dtype or self.up.dtype)
        return LowRank(self.down, up, float(self.rank))


class Entry(Protocol):
    """An update that is read when needed: `formats.AdapterModule`, or a `WeightUpdate` in memory."""

    @property
    def kind(self) -> str: ...
    @property
    def rank(self) -> int | None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def stackable(self) -> bool: ...
    @property
    def needs_weight(self) -> bool: ...
    def entry(self) -> WeightUpdate: ...
    def prepare(self, multiplier: float, dtype: torch.dtype, base_rows: BaseRows | None = None) -> AddRows: ...


@dataclass(frozen=True)
class Term:
    """One update and its multiplier m: m · ΔW is added to a weight."""

    module: Entry
    multiplier: float

    def prepare(self, dtype: torch.dtype, base_rows: BaseRows) -> AddRows:
        """Implements `checkpoints.rewrite.Update`: tensors are converted once, not for every tile.

        Args:
            dtype: of the computation.
            base_rows: reads rows of the weight.
        """
        return self.module.prepare(self.multiplier, dtype, base_rows)


def entries_fingerprint(entries: Iterable[tuple[str, WeightUpdate]]) -> str:
    """`AdapterState.fingerprint` over (path, entry) sorted by path, so that a file can be read module by module."""
    digest = hashlib.sha256()
    for path, entry in entries:
        digest.update(path.encode() + b"\0")
        if isinstance(entry, LowRank) and entry.stackable:
            out_features, in_features = entry.shape
            digest.update(struct.pack("<QQQd", entry.rank, in_features, out_features, entry.alpha))
        else:
            digest.update(f"{entry.kind}\0".encode() + struct.pack("<d", entry.scale))
        for part, tensor in entry.parts().items():
            if not entry.stackable:
                digest.update(f"{part}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def low_rank_only(entries: Mapping[str, Entry], purpose: str) -> None:
    """Refuse updates that are not low-rank pairs of Linears.

    Args:
        entries: updates by path.
        purpose: what needs low-rank pairs, in words that begin the message.

    Raises:
        UserError: one of another kind; names the first, and the conversion or the merge to do first.
    """
    others = {path: entry for path, entry in entries.items() if not entry.stackable}
    for path, entry in others.items():
        more = f" (and {len(others) - 1} more such modules)" if len(others) > 1 else ""
        convertible = all(not other.needs_weight and to_original(other_path) is not None
                          and other_path != "patch_embedding" for other_path, other in others.items())
        remedy = "write the file as low-rank pairs first (lapwan merge --lora FILE --rank N -o PAIRS.safetensors)" if (
            convertible) else ("merge the file into the model first (lapwan merge --model MODEL --lora FILE -o MERGED) "
                               "and use the merged model")
        raise UserError(f"{purpose}: module '{path}'{more} is a {entry.kind}; only low-rank pairs (A, B and alpha) of "
                        f"Linears are possible here: {remedy}")


@dataclass
class AdapterState:
    """The adapter of one noise expert: entries by path, and the file's metadata (all strings).

    A plain LoRA is one whose entries are all low-rank pairs (`low_rank`).
    """

    entries: dict[str, WeightUpdate]
    metadata: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """sha256 over (path, r, in, out, alpha as fp64, A as fp32, B as fp32), paths sorted: 64 hex digits.

        Of other kinds it is over (path, kind, scale, parts with their shapes as fp32). Independent of layout, metadata
        and a cast to a wider dtype; a narrowing cast changes it, as it changes ΔW.
        """
        return entries_fingerprint((path, self.entries[path]) for path in sorted(self.entries))

    def low_rank(self, purpose: str) -> dict[str, LowRank]:
        """The entries of a plain LoRA.

        Raises:
            UserError: as `low_rank_only`.
        """
        low_rank_only(self.entries, purpose)
        return {path: entry for path, entry in self.entries.items() if isinstance(entry, LowRank)}
