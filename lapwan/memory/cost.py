"""A noise expert on the meta device: its bytes and flops, and the memory of a pass, before any weight is read.

Shapes: B samples, N latent tokens, L text tokens, D width, G gate columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapwan.lora.attach import Adapter, Group, attach
from lapwan.lora.layer import FrozenLinear
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.memory.plan import Checkpointing, Flops, NoiseExpertBytes
from lapwan.memory.streaming import tensors_of
from lapwan.memory.trace import trace_memory
from lapwan.models.spec import TEXT_LENGTH, ModelSpec
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import LINEAR_CLASSES
from lapwan.wan.quantise.load import Recipe, linears_of
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.forward import ForwardOptions

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_META = torch.device("meta")
# fp32 copies of a trained parameter: itself and two moments (its gradient counts as activation memory).
TRAINED_COPIES = 3
_TRACED: dict[tuple[Any, ...], StepMemory] = {}
_BACKWARD = 2.5  # flops of attention's backward relative to its forward, in fused kernels


@dataclass(frozen=True)
class GroupShape:
    """The shape of a LoRA: rank by module path."""

    ranks: Mapping[str, int]
    trainable: bool


@dataclass(frozen=True)
class ClipShape:
    """A batch: samples, pixel frames, height, width."""

    batch: int
    frames: int
    height: int
    width: int


def _config_of(spec: ModelSpec, noise_expert: NoiseExpert) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((spec.component(noise_expert) / "config.json").read_text(encoding="utf-8"))
    return config


def width_of(spec: ModelSpec) -> int:
    """D of the model's transformers."""
    config = _config_of(spec, spec.noise_experts[0])
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def heads_of(spec: ModelSpec) -> int:
    """Attention heads of the model's transformers."""
    return int(_config_of(spec, spec.noise_experts[0])["num_attention_heads"])


def tokens_of(spec: ModelSpec, bucket: tuple[int, int, int]) -> int:
    """N of a clip of (frames, height, width) in pixels."""
    _, frames, height, width = spec.latent_shape(*bucket)
    patch = spec.pixel_multiple // spec.spatial_stride
    return frames * (height // patch) * (width // patch)


@dataclass(frozen=True)
class StepMemory:
    """Memory of a training step beside the weights: `base` bytes, and what each trained block adds, in order.

    `first_recomputed`: what the first trained block adds instead if it is recomputed whole. (If its activations are
    kept, it takes less than the others: nothing before it receives a gradient.)
    """

    base: int
    each: tuple[int, ...] = ()
    first_recomputed: int = 0

    @property
    def total(self) -> int:
        """Base and all blocks."""
        return self.base + sum(self.each)

    def times(self, factor: float) -> StepMemory:
        """Every size multiplied by `factor`."""
        each = tuple(int(size * factor) for size in self.each)
        return StepMemory(int(self.base * factor), each, int(self.first_recomputed * factor))

    def with_recomputed(self, whole: StepMemory, count: int) -> int:
        """Bytes if the first `count` trained blocks are recomputed whole; `whole`: all of them recomputed.

        They come last in the backward: by then the others have freed their activations.
        """
        if count == 0:
            return self.total
        return max(self.base + sum(self.each[count:]) + self.first_recomputed + sum(whole.each[1:count]), whole.total)


@dataclass(frozen=True)
class _BlockKind:
    """What distinguishes blocks: whether a block is quantised, and the ranks of each group in it."""

    quantised: bool
    ranks: tuple[tuple[tuple[str, int], ...], ...]


class NoiseExpertShape:
    """One noise expert's transformer on the meta device, with its adapters; of equal blocks only one is built."""

    def __init__(
        self, spec: ModelSpec, noise_expert: NoiseExpert, dtype: torch.dtype, recipe: Recipe | None = None,
        groups: Sequence[GroupShape] = (), gated: bool = False,
    ) -> None:
        self.spec, self._dtype, self._recipe = spec, dtype, recipe
        self._config = _config_of(spec, noise_expert)
        self._trainable, self._gated = [group.trainable for group in groups], gated
        self.kinds = [self._kind(index, groups) for index in range(spec.num_layers)]
        # Gates carry gradient into every adapter they act on, a frozen one too.
        trained = [any(r and (t or gated) for r, t in zip(kind.ranks, self._trainable, strict=True))
                   for kind in self.kinds]
        self.first_trained = trained.index(True) if True in trained else len(trained)

    @property
    def _width(self) -> int:
        """D."""
        return int(self._config["num_attention_heads"]) * int(self._config["attention_head_dim"])

    def _kind(self, index: int, groups: Sequence[GroupShape]) -> _BlockKind:
        prefix = f"blocks.{index}."
        ranks = tuple(tuple(sorted((path.removeprefix(prefix), rank) for path, rank in group.ranks.items()
                                   if path.startswith(prefix))) for group in groups)
        return _BlockKind(self._recipe is not None and index not in self._recipe.full_blocks, ranks)

    def _model(self, kinds: Sequence[_BlockKind]) -> tuple[WanTransformer3DModel, Adapter | None]:
        """A transformer of these blocks, and the adapters attached to it."""
        recipe = None if self._recipe is None else Recipe(
            self._recipe.precision, frozenset(i for i, kind in enumerate(kinds) if not kind.quantised))
        model = _shape_model({**self._config, "num_layers": len(kinds)}, self._dtype, recipe)
        groups = []
        for number, trainable in enumerate(self._trainable):
            ranks = {f"blocks.{i}.{path}": r for i, kind in enumerate(kinds) for path, r in kind.ranks[number]}
            groups.append(Group(f"{number}", _state(model, ranks), trainable))
        if not any(group.state.entries for group in groups):
            return model, None
        return model, attach(model, groups, gates_required=self._gated)

    @cached_property
    def _distinct(self) -> list[_BlockKind]:
        return list(dict.fromkeys(self.kinds))

    def bytes(self, copies: int = TRAINED_COPIES) -> NoiseExpertBytes:
        """Weights by block, and adapters with `copies` fp32 numbers for each trained parameter."""
        model, adapter = self._model(self._distinct)
        adapters = {id(t) for t in (() if adapter is None else adapter.adapter_tensors())}

        def size(module: nn.Module, of_adapters: bool) -> int:
            return sum(t.nbytes * (copies if t.requires_grad else 1)
                       for t in tensors_of(module) if (id(t) in adapters) is of_adapters)

        of_kind = {kind: (size(b, False), size(b, True)) for kind, b in zip(self._distinct, model.blocks, strict=True)}
        outer = size(model, False) - sum(base for base, _ in of_kind.values())
        return NoiseExpertBytes(tuple(of_kind[kind][0] for kind in self.kinds), outer,
                           sum(of_kind[kind][1] for kind in self.kinds))

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of all trained parameters."""
        groups = [ranks for kind in self.kinds
                  for ranks, trained in zip(kind.ranks, self._trainable, strict=True) if trained]
        width = self._width
        ffn = width + self._config["ffn_dim"]  # features in and out
        return sum(4 * rank * (ffn if path.startswith("ffn") else 2 * width)
                   for ranks in groups for path, rank in ranks)

    def _inputs(self, clip: ClipShape) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        channels, *size = self.spec.latent_shape(clip.frames, clip.height, clip.width)
        extra = self.spec.in_channels - channels
        x = torch.empty(clip.batch, channels, *size, device=_META)
        condition = torch.empty(clip.batch, extra, *size, device=_META) if extra > 0 else None
        text = torch.empty(clip.batch, TEXT_LENGTH, self.spec.text_dim, device=_META)
        return x, torch.empty(clip.batch, device=_META), text, condition

    def _gates(self, adapter: Adapter | None, clip: ClipShape, trained: bool) -> AbstractContextManager[object]:
        if adapter is None:
            return nullcontext()
        gates = torch.empty(clip.batch, len(self._trainable), device=_META, requires_grad=trained and self._gated)
        return adapter.holder.scope(gates)

    def text_cache_bytes(self, rows: int) -> int:
        """Cached cross-attention keys and values of all blocks, for `rows` text tokens."""
        return 2 * rows * self._width * self._dtype.itemsize * len(self.kinds)

    def forward_memory(self, clip: ClipShape, processes: int = 1) -> int:
        """Peak bytes of an evaluation without gradients beside the weights, in each of the processes that share it."""
        model, adapter = self._model(self._distinct)
        options = ForwardOptions(context_parallel=ContextParallel(0, processes) if processes > 1 else None)
        backbone, inputs = WanBackbone(model, options), self._inputs(clip)
        with self._gates(adapter, clip, False), torch.no_grad():
            return trace_memory(lambda: backbone.velocity(*inputs)).peak

    def training_memory(self, clip: ClipShape, checkpointing: Checkpointing, processes: int = 1) -> StepMemory:
        """Peak bytes of a forward and backward beside the weights, gradients of trained parameters included.

        From the third of equal blocks on, each adds the same: two and three are traced. Both noise experts often have
        the same shape: results are cached in the process.
        """
        spec = self.spec
        key = (json.dumps(self._config, sort_keys=True), self._dtype, self._recipe, tuple(self.kinds),
               tuple(self._trainable), self._gated, spec.latent_shape(clip.frames, clip.height, clip.width),
               spec.in_channels, spec.text_dim, clip.batch, checkpointing, processes, kernels.HAS_TRITON)
        if key not in _TRACED:
            _TRACED[key] = self._training_work(clip, checkpointing, processes)
        return _TRACED[key]

    def _training_work(self, clip: ClipShape, checkpointing: Checkpointing, processes: int) -> StepMemory:
        trained = self.kinds[self.first_trained :]
        if not trained:
            return StepMemory(self.forward_memory(clip, processes))
        prefix = list(dict.fromkeys(self.kinds[: self.first_trained]))
        counts = {kind: min(2, trained.count(kind)) for kind in dict.fromkeys(trained)}

        def peak(of: Mapping[_BlockKind, int], whole_blocks: int = 0) -> int:
            return self._step([*prefix, *(kind for kind, count in of.items() for _ in range(count))], clip,
                              checkpointing, processes, whole_blocks)

        first = peak(counts)
        more = {kind: peak({**counts, kind: count + 1}) - first for kind, count in counts.items()}
        base = first - sum(count * more[kind] for kind, count in counts.items())
        first_recomputed = 0 if checkpointing == "block" else peak(counts, 1) - first + more[trained[0]]
        return StepMemory(base, tuple(more[kind] for kind in trained), first_recomputed)

    def _step(
        self, kinds: Sequence[_BlockKind], clip: ClipShape, checkpointing: Checkpointing, processes: int = 1,
        whole_blocks: int = 0,
    ) -> int:
        model, adapter = self._model(kinds)
        options = ForwardOptions(
            checkpointing=checkpointing, whole_blocks=whole_blocks,
            context_parallel=ContextParallel(0, processes) if processes > 1 else None)
        backbone, inputs = WanBackbone(model, options), self._inputs(clip)

        def step() -> None:
            torch.autograd.backward((backbone.velocity(*inputs) - inputs[0]).square().mean())

        with self._gates(adapter, clip, True):
            return trace_memory(step).peak

    def flops(self, clip: ClipShape, blocks: Sequence[int]) -> Flops:
        """Of the forward of some blocks, without adapters; a multiply-add counts as two."""
        tokens_per_clip = tokens_of(self.spec, (clip.frames, clip.height, clip.width))
        width = self._width
        tokens, text = clip.batch * tokens_per_clip, clip.batch * TEXT_LENGTH
        per_token = width * (6 * width + 2 * self._config["ffn_dim"])
        matmul = 2.0 * (tokens * per_token + text * 2 * width * width)
        attention = 4.0 * width * tokens * (tokens_per_clip + TEXT_LENGTH)
        fp8 = self._recipe is not None and self._recipe.precision is Precision.FP8
        fp8_blocks = sum(fp8 and self.kinds[index].quantised for index in blocks)
        return Flops(matmul * (len(blocks) - fp8_blocks), matmul * fp8_blocks, attention * len(blocks))

    def step_flops(self, clip: ClipShape, recomputed: float) -> tuple[Flops, Flops]:
        """Of a training step: the blocks before the first trained one, and the rest with backward and recomputation.

        A share `recomputed` of the rest is computed twice. The gradient of an input is one matrix product as large as
        the forward's, in the compute dtype.
        """
        count = len(self.kinds)
        prefix, rest = self.flops(clip, range(self.first_trained)), self.flops(clip, range(self.first_trained, count))
        backward = Flops(rest.matmul + rest.matmul_fp8, 0.0, rest.attention * _BACKWARD)
        forward = rest.times(1.0 + recomputed)
        return prefix, Flops(
            forward.matmul + backward.matmul, forward.matmul_fp8, forward.attention + backward.attention)


def _shape_model(config: Mapping[str, Any], dtype: torch.dtype, recipe: Recipe | None) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    with _META:
        model = WanTransformer3DModel.from_config(dict(config))
    fp32_modules = tuple(model._keep_in_fp32_modules)
    for name, parameter in list(model.named_parameters()):
        if not any(part in fp32_modules for part in name.split(".")):
            _put(model, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
    if recipe is not None:
        kind = LINEAR_CLASSES[recipe.precision]
        for block in linears_of(model.blocks, "blocks", recipe.full_blocks):
            for path in block.linears:
                linear = model.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                if kind.supports(linear.in_features, linear.out_features):
                    has_bias = linear.bias is not None
                    _put(model, path, kind.shaped(linear.in_features, linear.out_features, has_bias, dtype))
    return model.requires_grad_(False).eval()


def _put(model: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def _state(model: nn.Module, ranks: Mapping[str, int]) -> LoraState:
    entries = {}
    for path, rank in ranks.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | FrozenLinear)
        down = torch.empty(rank, base.in_features, device=_META)
        entries[path] = LoraEntry(down, torch.empty(base.out_features, rank, device=_META), float(rank))
    return LoraState(entries, {})
