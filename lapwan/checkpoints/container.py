"""The safetensors container without torch: header, byte ranges and raw reads.

Layout of a file: 8 bytes little-endian header length n, n bytes JSON `{name: {dtype, shape, data_offsets}}` with
offsets counted from the end of the header, and an optional `__metadata__` of strings; then the tensors' bytes.
Source: the safetensors format description (github.com/huggingface/safetensors).

Files are read with `pread`, not memory-mapped, so that no pages of a 28 GB file stay resident.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwan.errors import UserError

# Bytes per element by safetensors dtype name.
ITEM_SIZE: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype, shape and byte range [start, end), counted from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class TensorFile:
    """The header of one safetensors file; `tensors` in the order of their bytes."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_start: int
    size: int

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytearray:
        """`size` bytes of tensor `name` from its byte `offset` on (all by default)."""
        buffer = bytearray(self.tensors[name].size - offset if size is None else size)
        self.read_into(memoryview(buffer), name, offset)
        return buffer

    def read_into(self, view: memoryview, name: str, offset: int = 0) -> None:
        """Fill `view` with the bytes of tensor `name` from its byte `offset` on.

        Raises:
            UserError: the file ends inside the tensor.
        """
        position = self.tensors[name].start + offset
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            while view:
                count = os.preadv(descriptor, [view], position)
                if count == 0:
                    raise UserError(f"{self.path} is truncated inside tensor '{name}'; copy or download it again")
                view, position = view[count:], position + count
        finally:
            os.close(descriptor)


def read_header(path: Path) -> TensorFile:
    """Parse the header of a safetensors file.

    Raises:
        UserError: the file is missing, not a safetensors file, or cut short.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; a .safetensors file is needed here")
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise UserError(f"{path} is not a safetensors file (no header); expected a .safetensors file")
            raw = stream.read(length)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return _parse(path, raw, 8 + length, size)


def _parse(path: Path, raw: bytes, data_start: int, size: int) -> TensorFile:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file (broken header); expected a .safetensors file")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a safetensors file (broken metadata); expected a .safetensors file")
    tensors = [_info(path, name, item, data_start) for name, item in header.items()]
    if tensors and (end := max(info.end for info in tensors)) > size:
        raise UserError(f"{path} is truncated: it has {size} bytes, but needs {end}; copy or download it again")
    tensors.sort(key=lambda info: (info.start, info.end))
    strings = {str(key): str(value) for key, value in metadata.items()}
    return TensorFile(path, strings, {info.name: info for info in tensors}, data_start, size)


def _info(path: Path, name: str, item: Any, data_start: int) -> TensorInfo:
    entry = item if isinstance(item, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{path} is not a safetensors file (broken entry {name!r}); expected a .safetensors file")
    info = TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    if dtype in ITEM_SIZE and math.prod(info.shape) * ITEM_SIZE[dtype] != info.size:
        raise UserError(f"{path}: tensor {name!r} {shape} {dtype} does not fill its {info.size} bytes; the file is "
                        "damaged, copy or download it again")
    return info


def _counts(value: Any) -> list[int] | None:
    """`value` if it is a list of integers >= 0, else None."""
    return value if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None
