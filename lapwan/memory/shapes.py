"""A noise expert by its shapes alone: its bytes and flops, and the memory a pass takes, before any weight is read.

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
from lapwan.memory.trace import measure
from lapwan.models.spec import TEXT_LENGTH, ModelSpec
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.backbone import velocity
from lapwan.wan.quantise.linears import KINDS
from lapwan.wan.quantise.load import Recipe, linears_of
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.options import forward_options

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_META = torch.device("meta")
# fp32 numbers kept for a trained one: itself and two moments (its gradient is part of the work).
_TRAINED_NUMBERS = 3
_SIMULATED: dict[tuple[Any, ...], StepWork] = {}
_BACKWARD = 2.5  # attention's backward over its forward, as fused kernels do it


@dataclass(frozen=True)
class GroupShape:
    """A LoRA by rank of module path."""

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
    found: dict[str, Any] = json.loads((spec.component(noise_expert) / "config.json").read_text(encoding="utf-8"))
    return found


def width_of(spec: ModelSpec) -> int:
    """D of its transformers."""
    config = _config_of(spec, spec.noise_experts[0])
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def heads_of(spec: ModelSpec) -> int:
    """Heads of attention of its transformers."""
    return int(_config_of(spec, spec.noise_experts[0])["num_attention_heads"])


def tokens_of(spec: ModelSpec, bucket: tuple[int, int, int]) -> int:
    """N of a clip of (frames, height, width) in pixels."""
    _, frames, height, width = spec.latent_shape(*bucket)
    patch = spec.pixel_multiple // spec.spatial_stride
    return frames * (height // patch) * (width // patch)


@dataclass(frozen=True)
class StepWork:
    """Bytes a training step takes beside the weights: `base`, and what each trained block adds, in their order.

    `first_whole`: what the first one adds instead where it is computed again whole. (Kept, it takes less than others:
    nothing before it receives a gradient.)
    """

    base: int
    each: tuple[int, ...] = ()
    first_whole: int = 0

    @property
    def total(self) -> int:
        """With every block."""
        return self.base + sum(self.each)

    def times(self, factor: float) -> StepWork:
        """All of it `factor` times."""
        each = tuple(int(one * factor) for one in self.each)
        return StepWork(int(self.base * factor), each, int(self.first_whole * factor))

    def with_whole(self, whole: StepWork, count: int) -> int:
        """Where the first `count` trained blocks are computed again whole, as in `whole`.

        They are the last of the backward: by then the others have let go of what they kept.
        """
        if count == 0:
            return self.total
        return max(self.base + sum(self.each[count:]) + self.first_whole + sum(whole.each[1:count]), whole.total)


@dataclass(frozen=True)
class _Kind:
    """What tells a block from another: whether it is quantised, and the ranks of each group in it."""

    quantised: bool
    ranks: tuple[tuple[tuple[str, int], ...], ...]


class NoiseExpertShape:
    """One noise expert's transformer without values, with its adapters; blocks of one kind are looked at once."""

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
    def _inner(self) -> int:
        """D."""
        return int(self._config["num_attention_heads"]) * int(self._config["attention_head_dim"])

    def _kind(self, index: int, groups: Sequence[GroupShape]) -> _Kind:
        begin = f"blocks.{index}."
        ranks = tuple(tuple(sorted((path.removeprefix(begin), rank) for path, rank in group.ranks.items()
                                   if path.startswith(begin))) for group in groups)
        return _Kind(self._recipe is not None and index not in self._recipe.full_blocks, ranks)

    def _model(self, kinds: Sequence[_Kind]) -> tuple[WanTransformer3DModel, Adapter | None]:
        """A transformer of these blocks, and the adapters on it."""
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
    def _distinct(self) -> list[_Kind]:
        return list(dict.fromkeys(self.kinds))

    def bytes(self, numbers: int = _TRAINED_NUMBERS) -> NoiseExpertBytes:
        """Weights by block, and adapters with `numbers` fp32 numbers for each trained one."""
        model, adapter = self._model(self._distinct)
        own = {id(t) for t in (() if adapter is None else adapter.own_tensors())}

        def size(module: nn.Module, rows: bool) -> int:
            return sum(t.nbytes * (numbers if t.requires_grad else 1)
                       for t in tensors_of(module) if (id(t) in own) is rows)

        of_kind = {kind: (size(b, False), size(b, True)) for kind, b in zip(self._distinct, model.blocks, strict=True)}
        outer = size(model, False) - sum(base for base, _ in of_kind.values())
        return NoiseExpertBytes(tuple(of_kind[kind][0] for kind in self.kinds), outer,
                           sum(of_kind[kind][1] for kind in self.kinds))

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of all that is trained."""
        shapes = [(path, rank) for kind in self.kinds for own, trained in zip(kind.ranks, self._trainable, strict=True)
                  if trained for path, rank in own]
        inner = self._inner
        wide = inner + self._config["ffn_dim"]
        return sum(4 * rank * (wide if path.startswith("ffn") else 2 * inner) for path, rank in shapes)

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

    def text_bytes(self, rows: int) -> int:
        """Of every block's keys and values of `rows` rows of text."""
        return 2 * rows * self._inner * self._dtype.itemsize * len(self.kinds)

    def forward_work(self, clip: ClipShape, processes: int = 1) -> int:
        """The most one evaluation without gradients takes beside the weights, in each process that shares it."""
        model, adapter = self._model(self._distinct)
        forward_options(model).spread = ContextParallel(0, processes) if processes > 1 else None
        inputs = self._inputs(clip)
        with self._gates(adapter, clip, False), torch.no_grad():
            return measure(lambda: velocity(model, *inputs)).peak

    def training_work(self, clip: ClipShape, checkpointing: Checkpointing, processes: int = 1) -> StepWork:
        """The most a forward and backward take beside the weights, gradients of what is trained included.

        From a third block of a kind on each adds the same: it is simulated for two and for three. Both noise experts
        are often of one shape: what has been simulated in this process is not simulated again.
        """
        spec = self.spec
        key = (json.dumps(self._config, sort_keys=True), self._dtype, self._recipe, tuple(self.kinds),
               tuple(self._trainable), self._gated, spec.latent_shape(clip.frames, clip.height, clip.width),
               spec.in_channels, spec.text_dim, clip.batch, checkpointing, processes, kernels.HAS_TRITON)
        if key not in _SIMULATED:
            _SIMULATED[key] = self._training_work(clip, checkpointing, processes)
        return _SIMULATED[key]

    def _training_work(self, clip: ClipShape, checkpointing: Checkpointing, processes: int) -> StepWork:
        trained = self.kinds[self.first_trained :]
        if not trained:
            return StepWork(self.forward_work(clip, processes))
        prefix = list(dict.fromkeys(self.kinds[: self.first_trained]))
        counts = {kind: min(2, trained.count(kind)) for kind in dict.fromkeys(trained)}

        def peak(of: Mapping[_Kind, int], whole_blocks: int = 0) -> int:
            return self._step([*prefix, *(kind for kind, count in of.items() for _ in range(count))], clip,
                              checkpointing, processes, whole_blocks)

        first = peak(counts)
        more = {kind: peak({**counts, kind: count + 1}) - first for kind, count in counts.items()}
        base = first - sum(count * more[kind] for kind, count in counts.items())
        first_whole = 0 if checkpointing == "block" else peak(counts, 1) - first + more[trained[0]]
        return StepWork(base, tuple(more[kind] for kind in trained), first_whole)

    def _step(
        self, kinds: Sequence[_Kind], clip: ClipShape, checkpointing: Checkpointing, processes: int = 1,
        whole_blocks: int = 0,
    ) -> int:
        model, adapter = self._model(kinds)
        forward_options(model).spread = ContextParallel(0, processes) if processes > 1 else None
        inputs = self._inputs(clip)
        forward_options(model).checkpointing, forward_options(model).whole_blocks = checkpointing, whole_blocks
        with self._gates(adapter, clip, True):
            return measure(lambda: torch.autograd.backward((velocity(model, *inputs) - inputs[0]).square().mean())).peak

    def flops(self, clip: ClipShape, blocks: Sequence[int]) -> Flops:
        """Of the forward of some blocks, adapters left out; multiply and add are two."""
        each = tokens_of(self.spec, (clip.frames, clip.height, clip.width))
        inner = self._inner
        tokens, text = clip.batch * each, clip.batch * TEXT_LENGTH
        of_tokens = inner * (6 * inner + 2 * self._config["ffn_dim"])
        product = 2.0 * (tokens * of_tokens + text * 2 * inner * inner)
        attention = 4.0 * inner * tokens * (each + TEXT_LENGTH)
        eight = self._recipe is not None and self._recipe.precision is Precision.FP8
        in_eight = sum(eight and self.kinds[index].quantised for index in blocks)
        return Flops(product * (len(blocks) - in_eight), product * in_eight, attention * len(blocks))

    def step_flops(self, clip: ClipShape, again: float) -> tuple[Flops, Flops]:
        """Of a training step: the blocks before the first trained one, and the rest with backward and recomputation.

        Of the rest a share `again` is computed twice. The gradient of an input is one product as large as the
        forward's, in the computing dtype.
        """
        count = len(self.kinds)
        prefix, rest = self.flops(clip, range(self.first_trained)), self.flops(clip, range(self.first_trained, count))
        backward = Flops(rest.product + rest.product8, 0.0, rest.attention * _BACKWARD)
        own = rest.times(1.0 + again)
        return prefix, Flops(own.product + backward.product, own.product8, own.attention + backward.attention)


def _shape_model(config: Mapping[str, Any], dtype: torch.dtype, recipe: Recipe | None) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    with _META:
        model = WanTransformer3DModel.from_config(dict(config))
    wide = tuple(model._keep_in_fp32_modules)
    for name, parameter in list(model.named_parameters()):
        if not any(part in wide for part in name.split(".")):
            _put(model, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype)))
    if recipe is not None:
        kind = KINDS[recipe.precision]
        for block in linears_of(model.blocks, "blocks", recipe.full_blocks):
            for path in block.linears:
                linear = model.get_submodule(path)
                assert isinstance(linear, nn.Linear)
                if kind.serves(linear.in_features, linear.out_features):
                    biased = linear.bias is not None
                    _put(model, path, kind.shaped(linear.in_features, linear.out_features, biased, dtype))
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
