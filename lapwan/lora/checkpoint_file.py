"""Rewrite a safetensors file with some Linears changed, without ever holding more than a tile of it.

    W' = round(W + Σ_t m_t · (alpha_t / r_t) · B_t A_t),    accumulated in fp32, rounded once to W's dtype

Untouched byte ranges are copied by the kernel (copy_file_range, else sendfile); touched tensors go by row tiles.
The data keeps its order, so an index of shards stays valid.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.lora.state import LoraEntry
from lapwan.lora.tensorfile import ITEM_SIZE, TensorFile, TensorInfo
from lapwan.lora.tensors import DTYPES
from lapwan.lora.threads import one_thread

TILE_BYTES = 16 << 20  # of a touched tensor as fp32
_COPY_BYTES = 64 << 20  # per call into the kernel, so that progress moves
_MERGEABLE = ("F64", "F32", "F16", "BF16")
_WORKERS = 2
Advance = Callable[[int], None]


class Entry(Protocol):
    """A LoRA module that can be read when it is needed (`LoraModule`, or a state's entry in memory)."""

    @property
    def rank(self) -> int:
        """r."""

    def entry(self) -> LoraEntry:
        """A, B and alpha."""


@dataclass(frozen=True)
class Term:
    """One LoRA module and its multiplier m."""

    module: Entry
    multiplier: float


def merged_rows(rows: Tensor, terms: Sequence[tuple[LoraEntry, float]], first: int = 0) -> Tensor:
    """Rows [first, first + n) of W' for `rows` [n, in] of W: fp32 accumulation (fp64 for an fp64 W), one rounding."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.to(wide, copy=True)
    for entry, multiplier in terms:
        up = entry.up[first : first + rows.shape[0]].to(wide) * (multiplier * entry.scale)
        total.addmm_(up, entry.down.to(wide))
    return total.to(rows.dtype)


def check_mergeable(file: TensorFile, name: str) -> None:
    """Refuse a weight that cannot take an update.

    Raises:
        UserError: a quantised dtype.
    """
    info = file.tensors[name]
    if info.dtype not in _MERGEABLE:
        raise UserError(f"{file.path}: '{name}' is {info.dtype}; a LoRA merges into {', '.join(_MERGEABLE)} weights: "
                        "merge into the unquantised model, then quantise")


def rewrite(
    source: TensorFile, target: Path, terms: Mapping[str, Sequence[Term]], metadata: Mapping[str, str],
    advance: Advance = lambda _: None, check: Callable[[Path], None] | None = None,
) -> None:
    """Write `source` to `target` with the weights named in `terms` merged and the header's metadata replaced.

    Atomic: a failure or an interrupt leaves nothing at `target`. `advance` is told of bytes written; `check` looks at
    the finished file before it gets its name.

    Raises:
        UserError: a merged weight that is not finite, a quantised dtype, a source that is cut short.
    """
    for name in terms:
        check_mergeable(source, name)
    header = _header(source, metadata)
    shift = len(header) - source.data_start
    end = max((info.end for info in source.tensors.values()), default=source.data_start)
    with atomic_file(target) as temporary, source.path.open("rb") as reader, temporary.open("wb") as writer:
        writer.write(header)
        writer.flush()
        position = source.data_start
        with one_thread(), ThreadPoolExecutor(_WORKERS) as pool:  # one tile is read or written while another is added
            for name in sorted(terms, key=lambda n: source.tensors[n].start):
                info = source.tensors[name]
                _copy(reader.fileno(), writer.fileno(), position, info.start, shift, advance)
                for done in pool.map(_tile_job(source, info, terms[name], writer.fileno(), shift), _tiles(info)):
                    advance(done)
                position = info.end
        _copy(reader.fileno(), writer.fileno(), position, end, shift, advance)
        if check is not None:
            check(temporary)


def _header(source: TensorFile, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in source.tensors.items():
        offsets = [info.start - source.data_start, info.end - source.data_start]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format pads with spaces so that tensors stay aligned
    return struct.pack("<Q", len(text)) + text


def _tiles(info: TensorInfo) -> list[tuple[int, int]]:
    """(first row, rows) of each tile."""
    rows, columns = info.shape
    step = max(1, TILE_BYTES // (columns * 4))
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]


def _tile_job(
    source: TensorFile, info: TensorInfo, terms: Sequence[Term], writer: int, shift: int
) -> Callable[[tuple[int, int]], int]:
    """What merges one tile of a tensor and writes it in its place; each LoRA module is read once per tensor."""
    row_bytes = info.shape[1] * ITEM_SIZE[info.dtype]
    read = [(term.module.entry(), term.multiplier) for term in terms]

    def job(tile: tuple[int, int]) -> int:
        first, count = tile
        raw = source.read(info.name, first * row_bytes, count * row_bytes)
        rows = torch.frombuffer(raw, dtype=DTYPES[info.dtype]).reshape(count, info.shape[1])
        merged = merged_rows(rows, read, first)
        # NaN passes through aminmax, which is twenty times as fast as isfinite over all.
        if not torch.stack(torch.aminmax(merged)).isfinite().all():
            raise UserError(f"merging makes '{info.name}' non-finite (in {info.dtype}): the LoRA or the base holds "
                            "NaN or too large values; look at the LoRA with `lapwan inspect-weights`")
        data = memoryview(merged.contiguous().view(torch.uint8).numpy().data).cast("B")
        _write(writer, data, info.start + first * row_bytes + shift)
        return len(data)

    return job


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, position)
        data, position = data[done:], position + done


def _copy(reader: int, writer: int, start: int, end: int, shift: int, advance: Advance) -> None:
    """Copy bytes [start, end) of the source to the same place plus `shift` in the target."""
    while start < end:
        done = _copy_some(reader, writer, start, start + shift, min(_COPY_BYTES, end - start))
        if done == 0:
            raise UserError("the model file became shorter while it was read; is something writing to it?")
        start += done
        advance(done)


def _copy_some(reader: int, writer: int, source: int, target: int, size: int) -> int:
    """Bytes copied, by the best way this system has: in the kernel across files, else through a buffer."""
    if sys.platform == "linux":
        try:
            return os.copy_file_range(reader, writer, size, source, target)
        except OSError as error:  # another file system, or one that cannot: the next best way
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
        os.lseek(writer, target, os.SEEK_SET)
        return os.sendfile(writer, reader, source, size)
    data = os.pread(reader, min(size, TILE_BYTES), source)
    return os.pwrite(writer, data, target)
