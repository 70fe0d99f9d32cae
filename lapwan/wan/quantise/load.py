"""Load a model with the Linears of its blocks quantised one by one as they are read.

Peak memory is the quantised model, one weight as stored, and a tile of it in fp32. Quantised blocks are cached on disk,
one file per block, so that the next load reads a half or a quarter of the bytes.
"""

from __future__ import annotations

import hashlib
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
from lapwan.checkpoints.tensors import load_tensor
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.checkpoints.weights import read_weights
from lapwan.errors import UserError
from lapwan.files import atomic_file, cache_root
from lapwan.models.spec import ModelSpec, component_config, weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.quantise.linears import LINEAR_CLASSES, RECIPE_VERSION, QuantisedLinear

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_DISK_HEADROOM = 2 << 30  # bytes of disk that the cache leaves free
ReadTensor = Callable[[], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How the Linears of blocks are quantised; `full_blocks` are not (blocks that are trained)."""

    precision: Precision
    full_blocks: frozenset[int] = frozenset()


@dataclass(frozen=True)
class BlockLinears:
    """A block's Linears by path; `name` is its file's in the cache."""

    name: str
    linears: tuple[str, ...]


def cache_folder(fingerprint: str, precision: Precision) -> Path:
    """The folder that caches the quantised blocks of weights with this fingerprint."""
    digest = hashlib.sha256(f"{RECIPE_VERSION}\0{precision.value}\0{fingerprint}".encode()).hexdigest()[:24]
    return cache_root() / "quantised" / f"{precision.value}-{digest}"


def fill(
    model: nn.Module, source: Mapping[str, ReadTensor], blocks: Iterable[BlockLinears], precision: Precision,
    cast: Callable[[str, Tensor], Tensor], device: torch.device | str, cache: Path | None,
    work_on: torch.device | str | None = None,
) -> None:
    """Give every parameter of a model on the meta device its tensor, on `device`.

    Args:
        source: functions that read a tensor as stored, by parameter name.
        cast: (name, stored tensor) -> the tensor in the model, for those that are not quantised.
        cache: folder of quantised blocks, to read and, while the disk has space, to extend; None: no cache.
        work_on: device that quantises; None: `device`. The bytes are the same.

    Raises:
        UserError: `source` lacks a parameter.
    """
    remaining = dict(source)
    for block in blocks:
        paths = [p for p in block.linears if _can_quantise(model.get_submodule(p), precision)]
        file = None if cache is None else cache / f"{block.name}.safetensors"
        cached = None if file is None else _read_cached(file, paths)
        quantised: dict[str, Tensor] = {}
        for path in paths:
            read, bias_name = remaining.pop(f"{path}.weight"), f"{path}.bias"
            bias = cast(bias_name, remaining.pop(bias_name)()).to(device) if bias_name in remaining else None
            if cached is None:
                layer = LINEAR_CLASSES[precision].from_weight(read().to(work_on or device), bias).to(device)
            else:
                layer = _cached_linear(cached, path, precision, bias, device)
            quantised |= {f"{path}.codes": layer.codes, f"{path}.scale": layer.scale}
            model.set_submodule(path, layer)
        if file is not None and cached is None and quantised:
            _write_cached(file, quantised)
    for name, read in remaining.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(cast(name, read()).to(device), requires_grad=False))
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"the weights lack {len(empty)} tensors, such as '{empty[0]}'; is the download complete?")


def _can_quantise(linear: nn.Module, precision: Precision) -> bool:
    return isinstance(linear, nn.Linear) and LINEAR_CLASSES[precision].supports(linear.in_features, linear.out_features)


def _cached_linear(
    cached: TensorFile, path: str, precision: Precision, bias: Tensor | None, device: torch.device | str
) -> QuantisedLinear:
    codes, scale = (load_tensor(cached, f"{path}.{part}").to(device) for part in ("codes", "scale"))
    in_features = codes.shape[1] * (2 if precision is Precision.NF4 else 1)
    return LINEAR_CLASSES[precision](codes, scale, bias, in_features)


def _read_cached(file: Path, paths: Iterable[str]) -> TensorFile | None:
    """The cached block, if it exists and has all of these Linears; None if it must be quantised."""
    if not file.is_file():
        return None
    try:
        header = read_header(file)
    except UserError as error:
        console.detail(f"cannot read a cached block, so it is quantised again: {error}")
        return None
    return header if all(f"{path}.codes" in header.tensors for path in paths) else None


def _write_cached(file: Path, tensors: Mapping[str, Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < size + _DISK_HEADROOM:
            return
        with atomic_file(file) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    except OSError as error:  # the cache only saves the next run time
        console.detail(f"cannot cache {file}: {error}")


def linears_of(blocks: nn.ModuleList, prefix: str, skip: frozenset[int] = frozenset()) -> Iterator[BlockLinears]:
    """The Linears of every block but `skip`, by path in the model whose `blocks` are under `prefix`."""
    for index, block in enumerate(blocks):
        if index not in skip:
            names = (name for name, module in block.named_modules() if isinstance(module, nn.Linear))
            yield BlockLinears(f"block_{index:03d}", tuple(f"{prefix}.{index}.{name}" for name in names))


def load_quantised_transformer(
    spec: ModelSpec, noise_expert: NoiseExpert, recipe: Recipe, fingerprint: str, dtype: torch.dtype,
    device: torch.device | str = "cpu", merged: Mapping[str, ReadTensor] | None = None,
    work_on: torch.device | str | None = None,
) -> WanTransformer3DModel:
    """A noise expert's transformer with its blocks' Linears quantised from the stored weights; the rest in `dtype`.

    Args:
        fingerprint: of the weights, including the `merged` ones.
        merged: functions that read the weights that LoRAs are merged into, by name.
        work_on: device that quantises; None: `device`.
    """
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    folder = spec.component(noise_expert)
    config = component_config(folder)
    with init_empty_weights():  # buffers (the rope tables) are real
        model = WanTransformer3DModel.from_config(config)
    fp32_modules = tuple(model._keep_in_fp32_modules)

    def cast(name: str, stored: Tensor) -> Tensor:
        return stored.to(torch.float32 if any(part in fp32_modules for part in name.split(".")) else dtype)

    headers = [read_weights(file) for file in weight_files(folder)]
    source: dict[str, ReadTensor] = {
        tensor_to_diffusers(name): partial(load_tensor, file, name) for file in headers for name in file.tensors}
    blocks = linears_of(model.blocks, "blocks", recipe.full_blocks)
    cache = cache_folder(fingerprint, recipe.precision)
    fill(model, {**source, **(merged or {})}, blocks, recipe.precision, cast, device, cache, work_on)
    return model.eval().to(device)
