"""Rewrite a safetensors file with updates added to some tensors, holding one tile of it in memory at a time.

    W' = round(W + Σ_t U_t(W)),    accumulated in fp64, rounded once to W's dtype;  of a LoRA U = m · (alpha / r) · B A

In fp32, where W and its updates cancel, the accumulation's error would be several units in the last place of the small
bf16 that is left. fp64 takes 1.3 to 1.7 times the CPU time at rank 64, and no more memory: tiles have the same bytes.

Untouched byte ranges are copied by the kernel (copy_file_range, else sendfile); touched tensors in row tiles.
The order of the data is kept, so an index of shards stays valid.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo, header_bytes
from lapwan.checkpoints.tensors import DTYPES, all_finite, load_rows
from lapwan.distributed import one_thread
from lapwan.errors import UserError
from lapwan.files import atomic_file

TILE_BYTES = 4 << 20  # of a touched tensor as fp64: a hundred rows, which fit into a core's cache
COPY_BYTES = 64 << 20  # per call into the kernel, so that progress moves
_MERGEABLE = ("F64", "F32", "F16", "BF16")
_FLOATS = (*_MERGEABLE, "F8_E4M3", "F8_E5M2")
_MAX_WORKERS = 8
Advance = Callable[[int], None]  # called with a number of bytes, for a progress bar
# (work [n, in], base [n, in], first): adds rows [first, first + n) of an update to `work`; `base` are W's, as stored.
AddRows = Callable[[Tensor, Tensor, int], None]
BaseRows = Callable[[int, int], Tensor]  # (first, count) -> rows of W as stored: [count, in]


class Update(Protocol):
    """An update added to a weight, such as multiplier · ΔW of a LoRA."""

    def prepare(self, dtype: torch.dtype, base_rows: BaseRows) -> AddRows:
        """Read and convert tensors once; `dtype` is that of the accumulation, fp64.

        `base_rows` reads W, for an update that needs a pass over all of it first.
        """


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The tensor as rows, as updates are added to it: [out, all other dimensions]; a vector is one column."""
    return shape[0], math.prod(shape[1:])


def check_mergeable(file: TensorFile, name: str) -> None:
    """Refuse a weight in a dtype that updates cannot be added to.

    Raises:
        UserError: a quantised dtype.
    """
    info = file.tensors[name]
    if info.dtype not in _MERGEABLE:
        raise UserError(f"{file.path}: '{name}' is {info.dtype}; a LoRA merges into {', '.join(_MERGEABLE)} weights: "
                        "merge into the unquantised model, then quantise")


def rewrite(
    source: TensorFile, target: Path, updates: Mapping[str, Sequence[Update]], metadata: Mapping[str, str],
    advance: Advance = lambda _: None, check: Callable[[Path], None] | None = None,
    tile_bytes: int = TILE_BYTES, copy_bytes: int = COPY_BYTES,
) -> None:
    """Write `source` to `target` with the weights named in `updates` changed and the header's metadata replaced.

    Atomic: a failure or an interrupt leaves nothing at `target`.

    Args:
        advance: called with the bytes written.
        check: called with the path of the finished file, before it is renamed to `target`.
        tile_bytes: of a touched tensor as fp64, merged at a time.
        copy_bytes: of untouched tensors, copied at a time.

    Raises:
        UserError: a weight of the result that is not finite, a quantised dtype, a source that is cut short.
    """
    for name in updates:
        check_mergeable(source, name)
    header = _header(source, metadata)
    shift = len(header) - source.data_start
    end = max((info.end for info in source.tensors.values()), default=source.data_start)
    with atomic_file(target) as temporary, source.path.open("rb") as reader, temporary.open("wb") as writer:
        writer.write(header)
        writer.flush()
        touched = sorted((source.tensors[name] for name in updates), key=lambda info: info.start)
        advance = _Locked(advance)
        pool = ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1))
        try:
            with one_thread():  # each worker merges one tensor at a time; this thread copies the bytes between them
                jobs = [pool.submit(_merge_tensor, source, info, updates[info.name], writer.fileno(), shift, advance,
                                    tile_bytes) for info in touched]
                if source.as_stored:  # copied in the kernel, while other threads read what is copied
                    jobs += [pool.submit(check_stored, source, info) for name, info in source.tensors.items()
                             if name not in updates]
                position = source.data_start
                copy = partial(_copy, reader.fileno()) if source.as_stored else partial(_copy_decoded, source)
                for info in touched:
                    copy(writer.fileno(), position, info.start, shift, advance, copy_bytes)
                    position = info.end
                copy(writer.fileno(), position, end, shift, advance, copy_bytes)
                for job in as_completed(jobs):
                    job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if check is not None:
            check(temporary)


def check_stored(source: TensorFile, info: TensorInfo, piece: int = 8 << 20) -> None:
    """Refuse a tensor that holds NaN or infinity as stored; one that is no floating point is not read.

    Args:
        piece: bytes read at a time.

    Raises:
        UserError: it does.
    """
    if info.dtype not in _FLOATS:
        return
    for offset in range(0, info.size, piece):
        data = source.read(info.name, offset, min(piece, info.size - offset))
        if not all_finite(torch.frombuffer(data, dtype=DTYPES[info.dtype])):
            raise UserError(f"{source.path}: '{info.name}' holds NaN or infinity, which would be copied into the "
                            "result; download the file again, or use another base")


class _Locked:
    """`advance` behind a lock, since several threads call it."""

    def __init__(self, advance: Advance) -> None:
        self._advance, self._lock = advance, threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            self._advance(size)


def _header(source: TensorFile, metadata: Mapping[str, str]) -> bytes:
    start = source.data_start
    return header_bytes(((info.name, info.dtype, info.shape, info.start - start, info.end - start)
                         for info in source.tensors.values()), metadata)


def _merge_tensor(
    source: TensorFile, info: TensorInfo, updates: Sequence[Update], writer: int, shift: int, advance: Advance,
    tile_bytes: int,
) -> None:
    """Merge one tensor and write its tiles at their offsets."""
    for offset, view, _ in _merged_tiles(source, info, updates, tile_bytes):
        _write(writer, view, info.start + offset + shift)
        advance(len(view))


def merged_tensor(
    source: TensorFile, name: str, updates: Sequence[Update], tile_bytes: int = TILE_BYTES
) -> Tensor:
    """W' of the tensor `name` in memory, in the file's dtype: bit for bit what `rewrite` writes.

    Raises:
        UserError: as `rewrite`.
    """
    check_mergeable(source, name)
    info = source.tensors[name]
    with one_thread():
        tiles = [tile.clone() for *_, tile in _merged_tiles(source, info, updates, tile_bytes)]
        return torch.cat(tiles).reshape(info.shape)


def _merged_tiles(
    source: TensorFile, info: TensorInfo, updates: Sequence[Update], tile_bytes: int
) -> Iterator[tuple[int, memoryview, Tensor]]:
    """(offset in the tensor, bytes, the same bytes as rows) of W', tile by tile, in two buffers that are reused."""
    rows, columns = matrix_shape(info.shape)
    dtype, row_bytes = DTYPES[info.dtype], columns * ITEM_SIZE[info.dtype]
    step = max(1, min(rows, tile_bytes // (columns * 8)))
    buffer = memoryview(bytearray(step * row_bytes))
    work = torch.empty(step, columns, dtype=torch.float64)
    base_rows = partial(load_rows, source.unrounded, info.name)
    additions = [update.prepare(work.dtype, base_rows) for update in updates]
    for first in range(0, rows, step):
        count = min(step, rows - first)
        view = buffer[: count * row_bytes]
        base = tile = torch.frombuffer(view, dtype=dtype).reshape(count, columns)
        if source.as_stored:
            source.read_into(view, info.name, first * row_bytes)
        else:
            base = base_rows(first, count)
        wide = work[:count].copy_(base)
        for add_rows in additions:
            add_rows(wide, base, first)
        tile.copy_(wide)
        if not all_finite(tile):
            if source.as_stored:  # the base was overwritten
                source.read_into(view, info.name, first * row_bytes)
            raise _non_finite(source, info, base, wide)
        yield first * row_bytes, view, tile


def _non_finite(source: TensorFile, info: TensorInfo, base: Tensor, merged: Tensor) -> UserError:
    """The error for a merged weight that is not finite, by its cause; `merged` is the sum before it is rounded."""
    message = f"merging makes '{info.name}' non-finite"
    if not all_finite(base):
        return UserError(f"{message}: {source.path} itself holds NaN or infinity there; download it again, or use "
                         "another base")
    if all_finite(merged):
        return UserError(f"{message}: the sum has values up to {merged.abs().max().item():.3g}, which {info.dtype} "
                         "cannot hold; lower the LoRA's strength, or merge into a bf16 or fp32 copy of the model")
    return UserError(f"{message}: the LoRA's update of it is not finite; check the file with `lapwan inspect-weights`")


def _write(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _copy(reader: int, writer: int, start: int, end: int, shift: int, advance: Advance, piece: int) -> None:
    """Copy bytes [start, end) of the source to offset start + `shift` of the target, `piece` bytes at a time."""
    while start < end:
        count = _copy_some(reader, writer, start, start + shift, min(piece, end - start))
        if count == 0:
            raise UserError("the model file became shorter while it was read; is something writing to it?")
        start += count
        advance(count)


def _copy_decoded(
    source: TensorFile, writer: int, start: int, end: int, shift: int, advance: Advance, piece: int
) -> None:
    """As `_copy`, tensor by tensor, of a source whose tensors are decoded while they are read."""
    for info in source.tensors.values():
        if start <= info.start and info.end <= end:
            for offset in range(0, info.size, piece):
                size = min(piece, info.size - offset)
                data = source.read(info.name, offset, size)
                if not all_finite(torch.frombuffer(data, dtype=DTYPES[info.dtype])):
                    raise UserError(f"'{info.name}' has values that {info.dtype} cannot hold, or NaN or infinity in "
                                    f"{source.path} itself; dequantise to another dtype, such as --dtype bfloat16")
                _write(writer, memoryview(data), info.start + offset + shift)
                advance(size)


def _copy_some(reader: int, writer: int, source: int, target: int, size: int) -> int:
    """Copy up to `size` bytes and return how many: in the kernel if the system can, else through a buffer."""
    if sys.platform == "linux":
        try:
            return os.copy_file_range(reader, writer, size, source, target)
        except OSError as error:  # across file systems, or not supported: fall back to sendfile
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
        os.lseek(writer, target, os.SEEK_SET)
        return os.sendfile(writer, reader, source, size)
    data = os.pread(reader, min(size, TILE_BYTES), source)
    return os.pwrite(writer, data, target)
