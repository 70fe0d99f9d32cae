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
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo
from lapwan.checkpoints.tensors import DTYPES
from lapwan.distributed import one_thread
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.lora.state import LoraEntry

TILE_BYTES = 4 << 20  # of a touched tensor as fp32: a few hundred rows, which stay in a core's cache
_COPY_BYTES = 64 << 20  # per call into the kernel, so that progress moves
_MERGEABLE = ("F64", "F32", "F16", "BF16")
_MOST_WORKERS = 8
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


def merge_rows_(rows: Tensor, terms: Sequence[tuple[LoraEntry, float]], first: int, work: Tensor) -> None:
    """Rows [first, first + n) of W become those of W', through a workspace of the same shape in the accumulation's
    dtype: fp32, or fp64 for an fp64 W."""
    work.copy_(rows)
    for entry, multiplier in terms:
        up = entry.up[first : first + rows.shape[0]].to(work.dtype) * (multiplier * entry.scale)
        work.addmm_(up, entry.down.to(work.dtype))
    rows.copy_(work)


def _widened(entry: LoraEntry, dtype: torch.dtype) -> LoraEntry:
    """Converted once, not at every tile; a copy, since products round by alignment, and a file has any."""
    return LoraEntry(entry.down.to(dtype, copy=True), entry.up.to(dtype, copy=True), entry.alpha)


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
        touched = sorted((source.tensors[name] for name in terms), key=lambda info: info.start)
        told = _Told(advance)
        pool = ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1))
        try:
            with one_thread():  # a tensor a worker; this thread copies what lies between them
                jobs = [pool.submit(_merge_tensor, source, info, terms[info.name], writer.fileno(), shift, told)
                        for info in touched]
                position = source.data_start
                for info in touched:
                    _copy(reader.fileno(), writer.fileno(), position, info.start, shift, told)
                    position = info.end
                _copy(reader.fileno(), writer.fileno(), position, end, shift, told)
                for job in as_completed(jobs):
                    job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if check is not None:
            check(temporary)


class _Told:
    """`advance`, called from several threads one at a time."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._lock = advance, threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self._advance(size)


def _header(source: TensorFile, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in source.tensors.items():
        offsets = [info.start - source.data_start, info.end - source.data_start]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format pads with spaces so that tensors stay aligned
    return struct.pack("<Q", len(text)) + text


def _merge_tensor(
    source: TensorFile, info: TensorInfo, terms: Sequence[Term], writer: int, shift: int, advance: Advance
) -> None:
    """Merge one tensor and write each of its tiles in its place."""
    for offset, view, _ in _merged_tiles(source, info, terms):
        _write(writer, view, info.start + offset + shift)
        advance(len(view))


def merged_tensor(source: TensorFile, name: str, terms: Sequence[Term]) -> Tensor:
    """W' of the tensor `name`, in memory: bit for bit what `rewrite` writes, in the file's own dtype.

    Raises:
        UserError: as `rewrite`.
    """
    check_mergeable(source, name)
    info = source.tensors[name]
    with one_thread():
        return torch.cat([tile.clone() for *_, tile in _merged_tiles(source, info, terms)])


def _merged_tiles(
    source: TensorFile, info: TensorInfo, terms: Sequence[Term]
) -> Iterator[tuple[int, memoryview, Tensor]]:
    """(offset in the tensor, bytes, the same as rows) of W', tile by tile; two buffers serve all of them."""
    rows, columns = info.shape
    dtype, row_bytes = DTYPES[info.dtype], columns * ITEM_SIZE[info.dtype]
    step = max(1, min(rows, TILE_BYTES // (columns * 4)))
    buffer = memoryview(bytearray(step * row_bytes))
    work = torch.empty(step, columns, dtype=torch.promote_types(dtype, torch.float32))
    read = [(_widened(term.module.entry(), work.dtype), term.multiplier) for term in terms]
    for first in range(0, rows, step):
        count = min(step, rows - first)
        view = buffer[: count * row_bytes]
        source.read_into(view, info.name, first * row_bytes)
        tile = torch.frombuffer(view, dtype=dtype).reshape(count, columns)
        merge_rows_(tile, read, first, work[:count])
        # NaN passes through aminmax, which is twenty times as fast as isfinite over all.
        if not torch.stack(torch.aminmax(tile)).isfinite().all():
            raise UserError(f"merging makes '{info.name}' non-finite (in {info.dtype}): the LoRA or the base holds "
                            "NaN or too large values; look at the LoRA with `lapwan inspect-weights`")
        yield first * row_bytes, view, tile


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
