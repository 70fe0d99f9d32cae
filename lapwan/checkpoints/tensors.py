"""Torch tensors from safetensors files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile
from lapwan.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}


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
