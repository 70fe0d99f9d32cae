"""Torch tensors from safetensors files, and from files of `torch.save`."""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from lapwan.checkpoints.container import (
    ITEM_SIZE,
    RawTensor,
    TensorFile,
    TensorInfo,
    file_kind,
    is_pickled,
    read_header,
    write_packed,
)
from lapwan.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
# In a written file, as in those of safetensors' own writer.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")


def load_tensor(file: TensorFile, name: str) -> Tensor:
    """Tensor `name` in its stored dtype.

    Raises:
        UserError: a dtype torch does not have, or a file that is cut short.
    """
    info = file.tensors[name]
    if info.dtype not in DTYPES:
        raise UserError(f"{file.path}: tensor '{name}' has dtype {info.dtype}; supported: {', '.join(DTYPES)}")
    tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    if info.size:
        # Into torch's own memory: a bytearray would be filled with zeros first.
        file.read_into(tensor.view(-1).view(torch.uint8).numpy().data, name)
    return tensor


def load_rows(file: TensorFile, name: str, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of tensor `name`, dimensions after the first flattened: [count, ...]."""
    info = file.tensors[name]
    columns = math.prod(info.shape[1:])
    row_bytes = columns * ITEM_SIZE[info.dtype]
    raw = file.read(name, first * row_bytes, count * row_bytes)
    return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).reshape(count, columns)


def spacing(values: Tensor) -> Tensor:
    """Distance of neighbouring numbers of the values' dtype at each of them, in fp32: 2^exponent · eps."""
    info = torch.finfo(values.dtype)
    exponent = torch.frexp(values.float().abs().clamp_min(info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(values, info.eps, dtype=torch.float32), exponent)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    aminmax propagates NaN and is twenty times as fast as isfinite over all values; it has no fp8.
    """
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    values = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whose bytes depend on its contents alone: wide dtypes first, then by name.

    Args:
        tensors: by name, on any device.
        path: written directly: give a temporary one (`lapwan.files.atomic_file`).
        metadata: strings for the header.
    """
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER.index(DTYPE_NAMES[item[1].dtype]), item[0]))
    with path.open("wb") as stream:
        write_packed(stream, [raw_tensor(name, tensor) for name, tensor in ordered], metadata or {})


def raw_tensor(name: str, tensor: Tensor) -> RawTensor:
    """A tensor for `write_packed`; its bytes are a view of it if it is on the CPU and contiguous."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return RawTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), values.data)


# What torch raises for a damaged file: its unpickler works on whatever values the file puts on its stack.
DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError,
            AssertionError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile)
_UNPACK_KEY = "LAPWAN_UNPACK_GIB"  # environment
_PICKLE_BYTES, _PICKLE_OPERATIONS, _TABLE_BYTES = 32 << 20, 4 << 20, 8 << 20
_OLD_PICKLES = 5  # in front of the storages of a file of before torch 1.6
_DEPTH = 64  # of the values in a pickle
_END_RECORD = b"PK\5\6"  # of a zip's table of contents; 22 bytes and a comment at the end of the file


def check_pickle(path: Path) -> None:
    """Refuse a file of `torch.save` that would take far more memory than its size, before it is unpacked.

    The parts of a zip may take as much as the file, since torch.save does not compress, and 0.5 GiB more, or what the
    environment variable LAPWAN_UNPACK_GIB says. Its pickle may have 32 MiB, and four million operations.

    Raises:
        UserError: larger, or no complete zip.
    """
    if not _is_zip(path):
        with path.open("rb") as stream:
            _check_values(path, stream)
        return
    limit = path.stat().st_size + int(_unpack_gib() * 2**30)
    try:
        _check_table(path)
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if (size := sum(part.file_size for part in parts)) > limit:
                raise UserError(f"{path} unpacks to {size / 2**30:.3g} GiB, but has {path.stat().st_size / 2**20:.3g} "
                                f"MiB: such a file is not of torch.save; if you trust it, set {_UNPACK_KEY} to the GiB "
                                "that it may take")
            for part in parts:
                if part.filename.endswith("data.pkl"):
                    if part.file_size > _PICKLE_BYTES:
                        raise UserError(f"{path} holds a pickle of {part.file_size >> 20} MiB; at most "
                                        f"{_PICKLE_BYTES >> 20} are read: save its tensors as safetensors")
                    with archive.open(part) as inner:
                        _check_values(path, inner)
    except (*DAMAGED, zlib.error) as error:
        raise UserError(f"cannot read {path} as weights: it is a damaged zip ({error}); copy or download it "
                        "again") from None


def _unpack_gib() -> float:
    text = os.environ.get(_UNPACK_KEY, "0.5")
    try:
        return max(0.0, min(float(text), 2.0**20))
    except ValueError:
        raise UserError(f"environment: {_UNPACK_KEY} = {text!r}: must be a number of GiB, such as 4") from None


def _check_table(path: Path) -> None:
    """Refuse a zip with a table of contents of more than 8 MiB, some 70,000 parts, which `zipfile` would read whole."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, size - (22 + 65536)))
        end = stream.read()
    at = end.rfind(_END_RECORD)
    if at < 0 or len(end) - at < 22:
        raise UserError(f"cannot read {path} as weights: it is truncated (a zip archive that ends too soon); copy or "
                        "download it again")
    count, table = struct.unpack_from("<HI", end, at + 10)
    if table != 0xFFFFFFFF and table > _TABLE_BYTES:
        raise UserError(f"{path} is a zip with a table of contents of {table >> 20} MiB ({count} parts); is it the "
                        "right file?")


def _check_values(path: Path, stream: IO[bytes]) -> None:
    """Refuse pickles of more than four million operations (a tensor takes about 30), or with a text of more than
    32 MiB; what is no pickle is left to torch's unpickler."""
    operations = 0
    try:
        for _ in range(_OLD_PICKLES):
            for _ in pickletools.genops(cast(IO[bytes], _Limited(path, stream))):
                if (operations := operations + 1) > _PICKLE_OPERATIONS:
                    raise UserError(f"{path} holds a pickle of more than {_PICKLE_OPERATIONS} operations; save its "
                                    "tensors as safetensors")
    except ValueError:
        return


@dataclass(frozen=True)
class _Limited:
    """The stream of a pickle, which refuses to read a long text whatever length the pickle states."""

    path: Path
    stream: IO[bytes]

    def read(self, size: int) -> bytes:
        if size > _PICKLE_BYTES:
            raise UserError(f"{self.path} holds a pickle with a value of {size >> 20} MiB; at most "
                            f"{_PICKLE_BYTES >> 20} are read: save its tensors as safetensors")
        return self.stream.read(size)

    def readline(self) -> bytes:
        return self.stream.readline(_PICKLE_BYTES)


def _checked_content(content: Any, path: Path) -> Any:
    """Refuse tensors that are larger than what is stored of them, which a copy would fill memory with, tensors of other
    kinds than dense ones on the CPU, and values nested too deep."""
    level = [content]
    for _ in range(_DEPTH):
        inner: dict[int, Any] = {}
        for item in level:
            for value in item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ():
                if isinstance(value, Tensor):
                    _check_dense(value, path)
                elif isinstance(value, Mapping | list | tuple):
                    inner[id(value)] = value
        if not inner:
            return content
        level = list(inner.values())
    raise UserError(f"cannot read {path} as weights: its values are nested more than {_DEPTH} deep")


def _check_dense(value: Tensor, path: Path) -> None:
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise UserError(f"cannot read {path} as weights: it holds a tensor {list(value.shape)} that is sparse, "
                        "quantised or without values; save plain tensors")
    if value.nbytes > (stored := value.untyped_storage().nbytes()):
        raise UserError(f"cannot read {path} as weights: it holds a tensor {list(value.shape)} of {value.nbytes} "
                        f"bytes, but stores {stored} of it; save plain tensors")


def load_pickle(path: Path) -> Any:
    """The content of a file of `torch.save`: nothing in it is executed. Memory-mapped if its format allows it.

    Raises:
        UserError: the file is missing, unreadable, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    check_pickle(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # as pickle.dumps writes by default
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:  # torch's message advises weights_only=False, which executes code in the file
        raise UserError(f"cannot read {path} as weights: {_no_pickle(path)}") from None
    except DAMAGED as error:
        raise UserError(f"cannot read {path} as weights: {_why(path, error)}") from None
    return _checked_content(content, path)


def _why(path: Path, error: Exception) -> str:
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not _is_zip(path):
        kind = file_kind(path)
        return f"it is {kind}" if kind else message
    if not zipfile.is_zipfile(path):  # a zip archive's directory is at its end
        return "it is truncated; copy or download it again"
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "it is a zip archive that torch.save did not write; unpack it"
    return message


def _no_pickle(path: Path) -> str:
    if not _is_zip(path) and (kind := file_kind(path)) is not None:
        return f"it is {kind}"
    return ("it was not written by torch.save, or it holds more than plain tensors (nothing in it is executed); load "
            "it in the tool that wrote it, and save its tensors with safetensors.torch.save_file")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@dataclass(frozen=True)
class PickledFile(TensorFile):
    """A file of `torch.save` read as if it were a safetensors file."""

    content: Mapping[str, Tensor] = field(compare=False, repr=False)

    @property
    def as_stored(self) -> bool:
        """As `TensorFile.as_stored`."""
        return False

    def read_into(self, view: memoryview, name: str, offset: int = 0) -> None:
        """As `TensorFile.read_into`."""
        data = self.content[name].detach().contiguous().reshape(-1).view(torch.uint8)
        view[:] = data[offset : offset + len(view)].numpy().data


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file, or of one of `torch.save`, by what is in it.

    Raises:
        UserError: as `read_header` and `open_pickle`.
    """
    return open_pickle(path) if is_pickled(path) else read_header(path)


def open_pickle(path: Path) -> PickledFile:
    """The tensors of a file of `torch.save`, memory-mapped if its format allows it.

    Of nested dictionaries (`{"state_dict": {...}}`, DeepSpeed's `{"module": {...}}`) it is the one with most tensors.

    Raises:
        UserError: as `load_pickle`, or no tensors in it.
    """
    tensors = max(_dictionaries(load_pickle(path)), key=len, default={})
    content = {name: value for name, value in tensors.items() if value.dtype in DTYPE_NAMES}
    if not content:
        raise UserError(f"{path} holds no tensors by name; is it the right file?")
    infos, position = {}, 0
    for name, value in content.items():
        infos[name] = TensorInfo(name, DTYPE_NAMES[value.dtype], tuple(value.shape), position, position + value.nbytes)
        position += value.nbytes
    return PickledFile(path, {}, infos, 0, path.stat().st_size, content)


def _dictionaries(content: Any) -> Iterator[dict[str, Tensor]]:
    """The tensors by name of a dictionary and of those inside it, each once; plain numbers are alphas."""
    level = {0: content} if isinstance(content, Mapping) else {}
    while level:
        for value in level.values():
            yield {key: item if isinstance(item, Tensor) else torch.tensor(float(item)) for key, item in value.items()
                   if isinstance(key, str) and (isinstance(item, Tensor) or
                                                (key.endswith("alpha") and isinstance(item, int | float)
                                                 and abs(item) < 2**64))}
        level = {id(inner): inner for value in level.values() for inner in value.values() if isinstance(inner, Mapping)}
