"""Reading a merged file back against its source: untouched bytes equal, touched weights within one rounding.

    |W' − (W + Σ m·s·B A)| ≤ ½ ulp of the exact value (+ the fp32 accumulation's own error),  recomputed in fp64
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo
from lapwan.checkpoints.rewrite import Advance
from lapwan.checkpoints.tensors import DTYPES
from lapwan.errors import UserError
from lapwan.lora.state import LoraEntry, Term

_CHUNK = 16 << 20  # bytes of an untouched tensor, or of a touched one in fp64, at a time
# The accumulation's own error over the largest magnitude in the tile: fp32 (measured: 8e-8 at r = 256) and fp64.
_SLACK, _SLACK_F64 = 2e-6, 1e-14


def verify(source: TensorFile, merged: TensorFile, terms: Mapping[str, Sequence[Term]], advance: Advance) -> float:
    """Compare every tensor; `advance` is told of bytes compared.

    Returns:
        The largest rounding error of a touched weight beyond the accumulation's own, in units in the last place of
        its dtype: at most 0.5.

    Raises:
        UserError: a tensor that is not what it should be: the disk or the memory is at fault.
    """
    worst = 0.0
    for name, info in source.tensors.items():
        other = merged.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            raise _wrong(merged, name)
        if name in terms:
            entries = [(term.module.entry(), term.multiplier) for term in terms[name]]
            worst = max(worst, _touched(source, merged, info, entries, advance))
        else:
            _untouched(source, merged, info, advance)
    return worst


def _untouched(source: TensorFile, merged: TensorFile, info: TensorInfo, advance: Advance) -> None:
    for offset in range(0, info.size, _CHUNK):
        size = min(_CHUNK, info.size - offset)
        if source.read(info.name, offset, size) != merged.read(info.name, offset, size):
            raise _wrong(merged, info.name)
        advance(size)


def _touched(
    source: TensorFile, merged: TensorFile, info: TensorInfo, entries: Sequence[tuple[LoraEntry, float]],
    advance: Advance,
) -> float:
    rows, columns = info.shape
    row_bytes, step, worst = columns * ITEM_SIZE[info.dtype], max(1, _CHUNK // (columns * 8)), 0.0
    for first in range(0, rows, step):
        count = min(step, rows - first)
        before, after = (_rows(file, info, first, count) for file in (source, merged))
        exact = before.double()
        for entry, multiplier in entries:
            exact.addmm_(entry.up[first : first + count].double() * (multiplier * entry.scale), entry.down.double())
        error = (after.double() - exact).abs_()
        ulp = _ulp(exact, after.dtype)
        largest = max(exact.abs().max().item(), before.double().abs().max().item())
        error -= (_SLACK_F64 if info.dtype == "F64" else _SLACK) * largest
        if not (error <= 0.5 * ulp).all():
            raise _wrong(merged, info.name)
        worst = max(worst, (error / ulp).max().item())
        advance(count * row_bytes)
    return worst


def _rows(file: TensorFile, info: TensorInfo, first: int, count: int) -> Tensor:
    row_bytes = info.shape[1] * ITEM_SIZE[info.dtype]
    raw = file.read(info.name, first * row_bytes, count * row_bytes)
    return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).reshape(count, info.shape[1])


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each value: 2^(exponent) · eps, no finer than among its subnormals."""
    facts = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp_min(facts.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(values, facts.eps), exponent)


def _wrong(merged: TensorFile, name: str) -> UserError:
    return UserError(f"{merged.path}: tensor '{name}' is not base + LoRA when read back; check the disk and the "
                     "memory, then merge again")
