"""Torch tensors from safetensors files, and from files of `torch.save`."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo, file_kind, read_header, sort_metadata
from lapwan.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}

PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # suffixes of files that torch.save writes


def load_tensor(file: TensorFile, name: str) -> Tensor:
    """Tensor `name` in its stored dtype.

    Raises:
        UserError: a dtype torch does not have, or a file that is cut short.
    """
    info = file.tensors[name]
    if info.dtype not in DTYPES:
        raise UserError(f"{file.path}: tensor '{name}' has dtype {info.dtype}; supported: {', '.join(DTYPES)}")
    if info.size == 0:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(file.read(name), dtype=DTYPES[info.dtype]).reshape(info.shape)


def load_rows(file: TensorFile, name: str, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of tensor `name`, dimensions after the first flattened: [count, ...]."""
    info = file.tensors[name]
    columns = math.prod(info.shape[1:])
    row_bytes = columns * ITEM_SIZE[info.dtype]
    raw = file.read(name, first * row_bytes, count * row_bytes)
    return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).reshape(count, columns)


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
        why = file_kind(path) if not _is_zip(path) else None
        reason = f"it is {why}" if why else str(error).splitlines()[0]
        raise UserError(f"cannot read {path} as weights: {reason}") from None


def _no_pickle(path: Path) -> str:
    if not _is_zip(path) and (kind := file_kind(path)) is not None:
        return f"it is {kind}"
    return ("it was not written by torch.save, or it holds more than plain tensors (nothing in it is executed); is it "
            "the right file?")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


@dataclass(frozen=True)
class PickledFile(TensorFile):
    """A file of `torch.save` read as if it were a safetensors file."""

    content: Mapping[str, Tensor] = field(compare=False, repr=False)

    def read_into(self, view: memoryview, name: str, offset: int = 0) -> None:
        """As `TensorFile.read_into`."""
        data = self.content[name].detach().contiguous().reshape(-1).view(torch.uint8)
        view[:] = data[offset : offset + len(view)].numpy().data


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file, or of a `.bin`, `.pt`, `.pth` or `.ckpt` of `torch.save`.

    Of nested dictionaries (`{"state_dict": {...}}`, DeepSpeed's `{"module": {...}}`) it is the one with most tensors.

    Raises:
        UserError: as `read_header` and `load_pickle`, or no tensors in it.
    """
    if path.suffix.lower() not in PICKLED:
        return read_header(path)
    tensors = max(_dictionaries(load_pickle(path)), key=len, default={})
    names = {dtype: name for name, dtype in DTYPES.items()}
    content = {name: value for name, value in tensors.items() if value.dtype in names}
    if not content:
        raise UserError(f"{path} holds no tensors by name; is it the right file?")
    infos, position = {}, 0
    for name, value in content.items():
        infos[name] = TensorInfo(name, names[value.dtype], tuple(value.shape), position, position + value.nbytes)
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
