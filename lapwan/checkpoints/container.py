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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lapwan.documents import parse_json
from lapwan.errors import UserError

# Bytes per element by safetensors dtype name.
ITEM_SIZE: dict[str, int] = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}
_MAX_COUNT = 2**63
_MAX_HEADER = 100_000_000  # the format's own limit
# A header of this size is first read by safetensors itself, which refuses what is no header while it reads; in Python
# a hostile one would take gigabytes.
_LARGE_HEADER = 8_000_000


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

    @property
    def as_stored(self) -> bool:
        """Whether the tensors' bytes are those of the file, at their offsets; False: they are decoded by `read`."""
        return True

    @property
    def unrounded(self) -> TensorFile:
        """The same tensors before they were rounded to the dtypes of `tensors`, if they are decoded."""
        return self

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


def header_bytes(tensors: Iterable[tuple[str, str, Sequence[int], int, int]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of a file's header, metadata in the order of their keys: equal input gives equal bytes.

    safetensors' own writer has metadata in the order of a hash table, another one in each process.

    Args:
        tensors: (name, dtype, shape, start, end) each, start and end counted from the end of the header.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, dtype, shape, start, end in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format pads with spaces so that tensors stay aligned
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class RawTensor:
    """A tensor to be written: its safetensors dtype, and its bytes as anything that a file takes."""

    name: str
    dtype: str
    shape: Sequence[int]
    data: bytes | memoryview

    @property
    def size(self) -> int:
        """Bytes."""
        return memoryview(self.data).nbytes


def packed_header(tensors: Iterable[RawTensor], metadata: Mapping[str, str]) -> bytes:
    """`header_bytes` of tensors that follow each other without gaps."""
    entries, end = [], 0
    for tensor in tensors:
        entries.append((tensor.name, tensor.dtype, tensor.shape, end, end + tensor.size))
        end += tensor.size
    return header_bytes(entries, metadata)


def write_packed(stream: BinaryIO, tensors: Sequence[RawTensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file: the header and the tensors in their order."""
    stream.write(packed_header(tensors, metadata))
    for tensor in tensors:
        stream.write(tensor.data)


_KINDS: tuple[tuple[bytes, str], ...] = (  # by the first bytes, without white space in front and in lower case
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch the file with `git lfs pull` or "
                                 "`hf download`"),
    (b"<!doctype", "an HTML page, saved in place of the file; log in where the file is from and download it again"),
    (b"<html", "an HTML page, saved in place of the file; log in where the file is from and download it again"),
    (b"<?xml", "an XML page, such as a server's error, saved in place of the file; download it again"),
    (b"pk\x03\x04", "a zip archive; if torch.save wrote it, it is a .pth or .pt file and needs that suffix, else "
                     "unpack it"),
    (b"gguf", "a GGUF file; a .safetensors file is needed here"),
    (b"\x80\x02", "a pickle, as an old torch.save wrote it; it is a .pth or .pt file and needs that suffix"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"rar!", "a RAR archive; unpack it"),
)


def file_kind(path: Path) -> str | None:
    """What a file is that was taken for weights, and what to do, for an error message; None: not known."""
    size = path.stat().st_size
    if size == 0:
        return "an empty file; download it again"
    with path.open("rb") as stream:
        start = stream.read(256)
    if not start.strip(b"\0"):
        return "a file that begins with zeros, an unfinished download; download it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((kind for magic, kind in _KINDS if text.startswith(magic)), None)


def is_pickled(path: Path) -> bool:
    """Whether a file begins as `torch.save` writes one, a zip archive or an old pickle, whatever its name.

    Except .safetensors: torch reads a file of that name as one.
    """
    if path.suffix.lower() == ".safetensors":
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))
    except OSError:  # `read_header` says what is wrong
        return False


def read_header(path: Path) -> TensorFile:
    """Parse the header of a safetensors file.

    Raises:
        UserError: the file is missing, not a safetensors file (with what it is, if known), or cut short.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; a .safetensors file is needed here")
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _no_header(path, length, size)
            raw = stream.read(length)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return _parse(path, raw, 8 + length, size)


def _no_header(path: Path, length: int, size: int) -> UserError:
    kind = file_kind(path)
    if path.suffix.lower() not in ("", ".safetensors", ".sft"):
        kind = kind or "neither a safetensors, a GGUF nor a torch.save file; is it the right file?"
        return UserError(f"cannot read {path} as weights: it is {kind}")
    if kind is not None:
        return UserError(f"{path} is not a safetensors file but {kind}")
    with path.open("rb") as stream:
        stream.seek(8)
        if size - 8 < length <= _MAX_HEADER and stream.read(1) in (b"{", b""):
            return UserError(f"{path} is truncated inside its header: it has {size} bytes, but needs more than "
                             f"{length + 8}; copy or download it again")
    return UserError(f"{path} is not a safetensors file (no header); expected a .safetensors file")


def _parse(path: Path, raw: bytes, data_start: int, size: int) -> TensorFile:
    if len(raw) > _LARGE_HEADER:
        _check_with_library(path)
    try:
        header = parse_json(raw, path)
    except UserError as error:
        raise UserError(f"{path} is not a safetensors file (broken header: {str(error).removeprefix(str(path)).strip()}"
                        "); expected a .safetensors file") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file (broken header); expected a .safetensors file")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} is not a safetensors file (broken metadata); expected a .safetensors file")
    tensors = [_info(path, name, item, data_start) for name, item in header.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_layout(path, tensors, data_start, size)
    return TensorFile(path, metadata, {info.name: info for info in tensors}, data_start, size)


def _check_with_library(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file (broken header: {error}); expected a .safetensors "
                        "file") from None


def _check_layout(path: Path, tensors: Sequence[TensorInfo], data_start: int, size: int) -> None:
    """The tensors, in the order of their bytes, must fill the file behind the header, without gaps or overlaps."""
    position = data_start
    for info in tensors:
        if info.start != position:
            what = "overlaps the one before it" if info.start < position else "has unused bytes before it"
            raise UserError(f"{path}: tensor {info.name!r} {what}; the file is damaged, copy or download it again")
        position = info.end
    if position > size:
        raise UserError(f"{path} is truncated: it has {size} bytes, but needs {position}; copy or download it again")
    if position < size:
        raise UserError(f"{path} has {size - position} bytes behind its last tensor; the file is damaged, copy or "
                        "download it again")


def _info(path: Path, name: str, item: Any, data_start: int) -> TensorInfo:
    entry = item if isinstance(item, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{path} is not a safetensors file (broken entry {name!r}); expected a .safetensors file")
    if not all(n < _MAX_COUNT for n in (*shape, *offsets)):
        raise UserError(f"{path}: tensor {name!r} has a size of more than 64 bits; the file is damaged, copy or "
                        "download it again")
    info = TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    if dtype in ITEM_SIZE and math.prod(info.shape) * ITEM_SIZE[dtype] != info.size:
        raise UserError(f"{path}: tensor {name!r} {shape} {dtype} does not fill its {info.size} bytes; the file is "
                        "damaged, copy or download it again")
    return info


def _counts(value: Any) -> list[int] | None:
    """`value` if it is a list of integers >= 0, else None."""
    return value if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None
