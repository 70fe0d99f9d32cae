"""Load a model with the Linears of its blocks quantised one by one as they are read.

    files --threads--> weights as stored, a few --device--> codes --> the model; --another thread--> cache on disk

Peak memory is the quantised model, a few weights as stored, and a tile of one in fp32. Quantised blocks are cached on
disk, one file per block, so that the next load reads a half or a quarter of the bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lapwan import console
from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.tensors import load_tensor, save_tensors
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.checkpoints.weights import read_weights
from lapwan.errors import UserError
from lapwan.files import atomic_file, cache_root
from lapwan.models.configs import component_config
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.quantise.linears import LINEAR_CLASSES, RECIPE_VERSION, QuantisedLinear

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_DISK_HEADROOM = 2 << 30  # bytes of disk that the cache leaves free
_READERS = 4  # threads; reading waits for the disk, or copies from the page cache, without Python's lock
_PREFETCHED = 6  # tensors read before they are needed: 0.8 GB of an A14B transformer's largest
_UNWRITTEN = 2  # blocks that wait for the disk
ReadTensor = Callable[[], Tensor]
Move = Callable[[Tensor], Tensor]


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
    work_on: torch.device | str | None = None, to_host: Move | None = None,
) -> None:
    """Give every parameter of a model on the meta device its tensor, on `device`.

    Args:
        source: functions that read a tensor as stored, by parameter name; called from several threads.
        cast: (name, stored tensor) -> the tensor in the model, for those that are not quantised.
        cache: folder of quantised blocks, to read and, while the disk has space, to extend; None: no cache.
        work_on: device that quantises; None: `device`. The bytes are the same.
        to_host: copies a tensor to where it stays, in host memory that is pinned, say; None: moved to `device`.

    Raises:
        UserError: `source` lacks a parameter.
    """
    put: Move = to_host or (lambda tensor: tensor.to(device))
    remaining = dict(source)
    with _Writer() as writer, ThreadPoolExecutor(_READERS) as readers:
        for block in blocks:
            paths = [p for p in block.linears if _can_quantise(model.get_submodule(p), precision)]
            file = None if cache is None else cache / f"{block.name}.safetensors"
            weights = {path: remaining.pop(f"{path}.weight") for path in paths}
            names = {path: f"{path}.bias" for path in paths if f"{path}.bias" in remaining}
            biases = {path: cast(name, remaining.pop(name)()) for path, name in names.items()}
            cached = None if file is None else _read_cached(file, paths)
            if cached is None:
                layers = _quantise(weights, biases, precision, readers, work_on or device, put)
            else:
                layers = _cached_linears(cached, paths, biases, precision, readers, put)
            quantised: dict[str, Tensor] = {}
            for path, layer in layers:
                quantised |= {f"{path}.codes": layer.codes, f"{path}.scale": layer.scale}
                model.set_submodule(path, layer)
            if file is not None and cached is None and quantised:
                writer.write(file, quantised)
        for name, tensor in _prefetched(remaining, readers):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(put(cast(name, tensor)), requires_grad=False))
    empty = [name for name, value in model.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"the weights lack {len(empty)} tensors, such as '{empty[0]}'; is the download complete?")


def _prefetched(source: Mapping[str, ReadTensor], readers: ThreadPoolExecutor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name, in order; the next ones are read meanwhile."""
    waiting: deque[tuple[str, Future[Tensor]]] = deque()
    for name, read in source.items():
        waiting.append((name, readers.submit(read)))
        if len(waiting) > _PREFETCHED:
            name, reading = waiting.popleft()
            yield name, reading.result()
    for name, reading in waiting:
        yield name, reading.result()


def _quantise(
    weights: Mapping[str, ReadTensor], biases: Mapping[str, Tensor], precision: Precision, readers: ThreadPoolExecutor,
    work_on: torch.device | str, put: Move,
) -> Iterator[tuple[str, QuantisedLinear]]:
    linear = LINEAR_CLASSES[precision]
    for path, weight in _prefetched(weights, readers):
        codes, scale = linear.quantise_rows(weight.to(work_on))
        yield path, linear(put(codes), put(scale), _put_bias(biases, path, put), weight.shape[1])


def _cached_linears(
    cached: TensorFile, paths: Iterable[str], biases: Mapping[str, Tensor], precision: Precision,
    readers: ThreadPoolExecutor, put: Move,
) -> Iterator[tuple[str, QuantisedLinear]]:
    names = [f"{path}.{part}" for path in paths for part in ("codes", "scale")]
    tensors = _prefetched({name: partial(load_tensor, cached, name) for name in names}, readers)
    for path, (_, codes), (_, scale) in zip(paths, tensors, tensors, strict=True):
        in_features = codes.shape[1] * (2 if precision is Precision.NF4 else 1)
        codes, scale = put(codes), put(scale)  # in the order in which a block's tensors are copied to the device
        bias = _put_bias(biases, path, put)
        yield path, LINEAR_CLASSES[precision](codes, scale, bias, in_features)


def _put_bias(biases: Mapping[str, Tensor], path: str, put: Move) -> Tensor | None:
    return put(biases[path]) if path in biases else None


class _Writer(ExitStack):
    """Writes quantised blocks in a thread; `write` waits while `_UNWRITTEN` blocks are behind, the exit for all."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = self.enter_context(ThreadPoolExecutor(1))
        self._waiting: deque[Future[None]] = deque()

    def write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        self._waiting.append(self._thread.submit(_write_cached, file, tensors))
        if len(self._waiting) > _UNWRITTEN:
            self._waiting.popleft().result()


def _can_quantise(linear: nn.Module, precision: Precision) -> bool:
    return isinstance(linear, nn.Linear) and LINEAR_CLASSES[precision].supports(linear.in_features, linear.out_features)


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
            save_tensors(tensors, temporary)
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
    work_on: torch.device | str | None = None, to_host: Move | None = None,
) -> WanTransformer3DModel:
    """A noise expert's transformer with its blocks' Linears quantised from the stored weights; the rest in `dtype`.

    Args:
        fingerprint: of the weights, including the `merged` ones.
        merged: functions that read the weights that LoRAs are merged into, by name.
        work_on, to_host: as in `fill`.
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
    if not cache.is_dir():
        console.log(f"quantising the {spec.title_of(noise_expert)} to {recipe.precision.value}; later runs read "
                    f"the codes from {cache}")
    fill(model, {**source, **(merged or {})}, blocks, recipe.precision, cast, device, cache, work_on,
         to_host)
    return model.eval().to(device)
