"""‖ΔW‖_F / ‖W‖_F: how large a LoRA's change is against the weights it changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lapwan.errors import UserError
from lapwan.lora.merge import linear_weights
from lapwan.lora.tensorfile import ITEM_SIZE, TensorFile, read_header
from lapwan.lora.tensors import DTYPES
from lapwan.lora.threads import one_thread

_TILE = 1 << 20  # elements, in fp64: a sum of squares in fp32 is off in the sixth digit


def weight_norms(
    files: Sequence[Path], paths: Iterable[str], advance: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """‖W‖_F of the Linears `paths` of a transformer, streamed by tiles of rows.

    Raises:
        UserError: a module that the transformer lacks.
    """
    headers = [read_header(path) for path in files]
    weights = linear_weights(headers)
    wanted = list(paths)
    for path in wanted:
        if path not in weights:
            raise UserError(f"--base {files[0].parent}: no module '{path}'; the LoRA was made for another model")
    with one_thread(), ThreadPoolExecutor(2) as pool:
        norms = pool.map(lambda path: _norm(headers[weights[path][0]], weights[path][1]), wanted)
        found: dict[str, float] = {}
        for path, norm in zip(wanted, norms, strict=True):
            found[path] = norm
            advance(1)
        return found


def _norm(file: TensorFile, name: str) -> float:
    info = file.tensors[name]
    if info.dtype not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{file.path}: '{name}' is {info.dtype}; norms need an unquantised model")
    item, squares = ITEM_SIZE[info.dtype], []
    for offset in range(0, info.size, _TILE * item):
        raw = file.read(name, offset, min(_TILE * item, info.size - offset))
        tile = torch.frombuffer(raw, dtype=DTYPES[info.dtype]).double()
        squares.append(torch.dot(tile, tile).item())
    return math.sqrt(math.fsum(squares))
