"""Torch tensors from safetensors files, and from files of `torch.save`."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lapwan.checkpoints.container import (
    ITEM_SIZE,
    TensorFile,
    TensorInfo,
    file_kind,
    is_pickled,
    read_header,
    sort_metadata,
)
from lapwan.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


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
    """Write a safetensors file whose bytes depend on its contents alone.

    Args:
        tensors: by name, contiguous, none sharing its storage with another.
        path: written in place: give a temporary one (`lapwan.files.atomic_file`).
        metadata: strings for the header.
    """
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    if metadata:
        sort_metadata(path)


def load_pickle(path: Path) -> Any:
    """The content of a file of `torch.save`: nothing in it is executed. Memory-mapped if its format allows it.

    Raises:
        UserError: the file is missing, unreadable, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:  # torch's message advises weights_only=False, which executes code in the file
        raise UserError(f"cannot read {path} as weights: {_no_pickle(path)}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"cannot read {path} as weights: {_why(path, error)}") from None


def _why(path: Path, error: Exception) -> str:
    if not _is_zip(path):
        kind = file_kind(path)
        return f"it is {kind}" if kind else str(error).splitlines()[0]
    if not zipfile.is_zipfile(path):  # a zip archive's directory is at its end
        return "it is truncated; copy or download it again"
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "it is a zip archive that torch.save did not write; unpack it"
    return str(error).splitlines()[0]


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


def _dictionaries(value: Any) -> list[dict[str, Tensor]]:
    """The tensors by name of a dictionary and of those inside it; plain numbers are alphas."""
    if not isinstance(value, Mapping):
        return []
    tensors = {key: item if isinstance(item, Tensor) else torch.tensor(float(item)) for key, item in value.items()
               if isinstance(key, str) and (isinstance(item, Tensor) or
                                            (key.endswith("alpha") and isinstance(item, int | float)))}
    return [tensors, *(inner for item in value.values() for inner in _dictionaries(item))]
