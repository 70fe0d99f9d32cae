"""Fill a model with weights, the Linears of its blocks quantised one by one as they are read.

At no time is there more than the quantised model, one weight as stored, and a tile of it in fp32. What was quantised is
kept under the cache folder, a file a block, so that the next load reads a half or a quarter of the bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lapwan import console
from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.tensors import load
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.errors import UserError
from lapwan.files import atomic_file, cache_root
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.quantise.linears import KINDS, RECIPE_VERSION, QuantisedLinear

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_ROOM = 2 << 30  # bytes of disk a kept quantisation leaves free
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Which form the block Linears take; `full_blocks` stay as they are (blocks that are trained)."""

    precision: Precision
    full_blocks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Block:
    """A block's Linears by path; `name` is its file in the cache."""

    name: str
    linears: tuple[str, ...]


def kept_folder(fingerprint: str, precision: Precision) -> Path:
    """Where the quantised blocks of weights with this fingerprint are kept."""
    digest = hashlib.sha256(f"{RECIPE_VERSION}\0{precision.value}\0{fingerprint}".encode()).hexdigest()[:24]
    return cache_root() / "quantised" / f"{precision.value}-{digest}"


def fill(
    model: nn.Module, source: Mapping[str, Read], blocks: Iterable[Block], precision: Precision,
    cast: Callable[[str, Tensor], Tensor], device: torch.device | str, kept: Path | None,
    work_on: torch.device | str | None = None,
) -> None:
    """Give every parameter of a model without storage its tensor, on `device`.

    Args:
        source: reads a tensor as stored, by parameter name.
        cast: name and stored tensor -> what a tensor that is not quantised becomes.
        work_on: device that quantises; None: `device`. The bytes are the same.
        kept: folder of quantised blocks, read where it has one and added to where the disk has room; None: not kept.
    """
    left = dict(source)
    for block in blocks:
        paths = [p for p in block.linears if _serves(model.get_submodule(p), precision)]
        file = None if kept is None else kept / f"{block.name}.safetensors"
        stored = None if file is None else _stored(file, paths)
        made: dict[str, Tensor] = {}
        for path in paths:
            read, biased = left.pop(f"{path}.weight"), f"{path}.bias"
            bias = cast(biased, left.pop(biased)()).to(device) if biased in left else None
            if stored is None:
                layer = KINDS[precision].from_weight(read().to(work_on or device), bias).to(device)
            else:
                layer = _take(stored, path, precision, bias, device)
            made |= {f"{path}.codes": layer.codes, f"{path}.scale": layer.scale}
            _put(model, path, layer)
        if file is not None and stored is None and made:
            _keep(file, made)
    for name, read in left.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(cast(name, read()).to(device), requires_grad=False))
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"the weights lack {len(empty)} tensors, such as '{empty[0]}'; is the download complete?")


def _serves(linear: nn.Module, precision: Precision) -> bool:
    return isinstance(linear, nn.Linear) and KINDS[precision].serves(linear.in_features, linear.out_features)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _take(
    stored: TensorFile, path: str, precision: Precision, bias: Tensor | None, device: torch.device | str
) -> QuantisedLinear:
    codes, scale = (load(stored, f"{path}.{part}").to(device) for part in ("codes", "scale"))
    in_features = codes.shape[1] * (2 if precision is Precision.NF4 else 1)
    return KINDS[precision](codes, scale, bias, in_features)


def _stored(file: Path, paths: Iterable[str]) -> TensorFile | None:
    """A kept block with all of these, if there is one; an unreadable one is made again."""
    if not file.is_file():
        return None
    try:
        found = read_header(file)
    except UserError as error:
        console.detail(f"quantising again: {error}")
        return None
    return found if all(f"{path}.codes" in found.tensors for path in paths) else None


def _keep(file: Path, tensors: Mapping[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < size + _ROOM:
            return
        with atomic_file(file) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    except OSError as error:  # keeping spares the next run some work; this run needs none of it
        console.detail(f"{file} is not kept: {error}")


def linears_of(blocks: nn.ModuleList, prefix: str, skip: frozenset[int] = frozenset()) -> Iterator[Block]:
    """The Linears of every block but `skip`, by path in the model that has `blocks` under `prefix`."""
    for index, block in enumerate(blocks):
        if index not in skip:
            names = (name for name, module in block.named_modules() if isinstance(module, nn.Linear))
            yield Block(f"block_{index:03d}", tuple(f"{prefix}.{index}.{name}" for name in names))


def load_quantised_transformer(
    spec: ModelSpec, noise_expert: NoiseExpert, recipe: Recipe, fingerprint: str, dtype: torch.dtype,
    device: torch.device | str = "cpu", merged: Mapping[str, Read] | None = None,
    work_on: torch.device | str | None = None,
) -> WanTransformer3DModel:
    """A noise expert's transformer with its blocks' Linears quantised from the weights as stored; the rest in `dtype`.

    Args:
        fingerprint: identity of the weights, of the `merged` ones too.
        merged: reads the weights that LoRAs are merged into, by name.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    folder = spec.component(noise_expert)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with init_empty_weights():  # buffers (the rope tables) are made for real
        model = WanTransformer3DModel.from_config(config)
    kept_wide = tuple(model._keep_in_fp32_modules)

    def cast(name: str, stored: Tensor) -> Tensor:
        return stored.to(torch.float32 if any(part in kept_wide for part in name.split(".")) else dtype)

    headers = [read_header(file) for file in weight_files(folder)]
    source: dict[str, Read] = {
        tensor_to_diffusers(name): partial(load, file, name) for file in headers for name in file.tensors}
    blocks = linears_of(model.blocks, "blocks", recipe.full_blocks)
    kept = kept_folder(fingerprint, recipe.precision)
    fill(model, {**source, **(merged or {})}, blocks, recipe.precision, cast, device, kept, work_on or device)
    return model.eval().to(device)
