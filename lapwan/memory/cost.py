"""A noise expert on the meta device: its bytes and flops, and the memory of a pass, before any weight is read.

Shapes: B samples, N latent tokens, L text tokens, D width, G gate columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lapwan.lora.attach import Adapter, Group, attach
from lapwan.lora.layer import FrozenLinear
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate
from lapwan.memory.plan import Flops, NoiseExpertBytes
from lapwan.memory.shape_model import META, ShapeModel
from lapwan.memory.step import BlockSegments, StepMemory, trace_step
from lapwan.memory.streaming import tensors_of
from lapwan.memory.trace import Memo, Segment, trace_memory, without_kernels
from lapwan.models.configs import component_config
from lapwan.models.spec import TEXT_LENGTH, ModelSpec
from lapwan.names import Checkpointing, NoiseExpert, Precision
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import LINEAR_CLASSES, QuantisedLinear
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.forward import ForwardOptions, TokenTimes, first_frame_times

# fp32 copies of a trained parameter: itself and two moments (its gradient counts as activation memory).
TRAINED_COPIES = 3
_TRACED: dict[tuple[Any, ...], StepMemory] = {}
_MEMO: Memo = {}
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


def width_of(spec: ModelSpec) -> int:
    """D of the model's transformers."""
    config = component_config(spec.component(spec.noise_experts[0]))
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def heads_of(spec: ModelSpec) -> int:
    """Attention heads of the model's transformers."""
    return int(component_config(spec.component(spec.noise_experts[0]))["num_attention_heads"])


def tokens_of(spec: ModelSpec, bucket: tuple[int, int, int]) -> int:
    """N of a clip of (frames, height, width) in pixels."""
    _, frames, height, width = spec.latent_shape(*bucket)
    return frames * (height // spec.patch) * (width // spec.patch)


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
        self.spec, self.dtype, self._recipe = spec, dtype, recipe
        self.config = component_config(spec.component(noise_expert))
        self._trainable, self._gated = [group.trainable for group in groups], gated
        self.kinds = [self._kind(index, groups) for index in range(spec.num_layers)]
        # Gates carry gradient into every adapter they act on, a frozen one too.
        trained = [any(r and (t or gated) for r, t in zip(kind.ranks, self._trainable, strict=True))
                   for kind in self.kinds]
        self.first_trained = trained.index(True) if True in trained else len(trained)

    @property
    def _width(self) -> int:
        """D."""
        return int(self.config["num_attention_heads"]) * int(self.config["attention_head_dim"])

    def _kind(self, index: int, groups: Sequence[GroupShape]) -> _BlockKind:
        prefix = f"blocks.{index}."
        ranks = tuple(tuple(sorted((path.removeprefix(prefix), rank) for path, rank in group.ranks.items()
                                   if path.startswith(prefix))) for group in groups)
        return _BlockKind(self._recipe is not None and index not in self._recipe.full_blocks, ranks)

    def _model(self, kinds: Sequence[_BlockKind]) -> tuple[ShapeModel, Adapter | None]:
        with without_kernels(_MEMO):
            model = ShapeModel(self.config, len(kinds), self.dtype)
            return model, self.equip(model, kinds)

    def equip(self, model: nn.Module, kinds: Sequence[_BlockKind]) -> Adapter | None:
        """Quantise a transformer of these blocks on the meta device, and attach the adapters to it."""
        blocks = model.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        for kind, block in zip(kinds, blocks, strict=True):
            if self._recipe is not None and kind.quantised:
                _quantise(block, LINEAR_CLASSES[self._recipe.precision], self.dtype)
        groups = []
        for number, trainable in enumerate(self._trainable):
            ranks = {f"blocks.{i}.{path}": r for i, kind in enumerate(kinds) for path, r in kind.ranks[number]}
            groups.append(Group(f"{number}", _state(model, ranks), trainable))
        if not any(group.state.entries for group in groups):
            return None
        return attach(model, groups, gates_required=self._gated)

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

        blocks = model.get_submodule("blocks").children()
        of_kind = {kind: (size(b, False), size(b, True)) for kind, b in zip(self._distinct, blocks, strict=True)}
        outer = size(model, False) - sum(base for base, _ in of_kind.values())
        return NoiseExpertBytes(
            tuple(of_kind[kind][0] for kind in self.kinds), outer, sum(of_kind[kind][1] for kind in self.kinds))

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of all trained parameters."""
        groups = [ranks for kind in self.kinds
                  for ranks, trained in zip(kind.ranks, self._trainable, strict=True) if trained]
        width = self._width
        ffn = width + self.config["ffn_dim"]  # features in and out
        return sum(4 * rank * (ffn if path.startswith("ffn") else 2 * width)
                   for ranks in groups for path, rank in ranks)

    def inputs(self, clip: ClipShape) -> tuple[Tensor, Tensor | TokenTimes, Tensor, Tensor | None]:
        """What `velocity` takes: latents, timesteps, text and the condition of an image.

        A model with a clean first frame gets its timesteps too, which a batch of text-to-video needs not.
        """
        channels, *size = self.spec.latent_shape(clip.frames, clip.height, clip.width)
        extra = self.spec.in_channels - channels
        x = torch.empty(clip.batch, channels, *size, device=META)
        condition = torch.empty(clip.batch, extra, *size, device=META) if extra > 0 else None
        text = torch.empty(clip.batch, TEXT_LENGTH, self.spec.text_dim, device=META)
        times_B = torch.empty(clip.batch, device=META)
        if not self.spec.clean_first_frame:
            return x, times_B, text, condition
        clean_B = torch.empty(clip.batch, dtype=torch.bool, device=META)
        return x, first_frame_times(times_B, clean_B, size, (1, self.spec.patch, self.spec.patch)), text, condition

    def gates(self, adapter: Adapter | None, clip: ClipShape, trained: bool) -> AbstractContextManager[object]:
        """A scope that holds gates for a batch; with gradient if they are `trained`."""
        if adapter is None:
            return nullcontext()
        gates = torch.empty(clip.batch, len(self._trainable), device=META, requires_grad=trained and self._gated)
        return adapter.holder.scope(gates)

    def text_cache_bytes(self, rows: int) -> int:
        """Cached cross-attention keys and values of all blocks, for `rows` text tokens."""
        return 2 * rows * self._width * self.dtype.itemsize * len(self.kinds)

    def forward_memory(self, clip: ClipShape, processes: int = 1) -> int:
        """Peak bytes of an evaluation without gradients beside the weights, in each of the processes that share it."""
        model, adapter = self._model(self._distinct)
        options = ForwardOptions(context_parallel=ContextParallel(0, processes) if processes > 1 else None)
        backbone, inputs = WanBackbone(model, options), self.inputs(clip)
        with self.gates(adapter, clip, False), torch.no_grad():
            return trace_memory(lambda: backbone.velocity(*inputs), _MEMO).peak

    def step_memory(self, clip: ClipShape, kinds: Sequence[Checkpointing], processes: int = 1) -> StepMemory:
        """The memory of a forward and backward, for each of the `kinds` of recomputation.

        Both noise experts often have the same shape: results are cached in the process.
        """
        spec = self.spec
        key = (json.dumps(self.config, sort_keys=True), self.dtype, self._recipe, tuple(self.kinds),
               tuple(self._trainable), self._gated, spec.latent_shape(clip.frames, clip.height, clip.width),
               spec.in_channels, spec.text_dim, spec.clean_first_frame, clip.batch, tuple(kinds), processes,
               kernels.TRITON.works)
        if key not in _TRACED:
            _TRACED[key] = self._traced(clip, kinds, processes)
        return _TRACED[key]

    def _traced(self, clip: ClipShape, kinds: Sequence[Checkpointing], processes: int) -> StepMemory:
        if self.first_trained == len(self.kinds):
            forward = self.forward_memory(clip, processes)
            return StepMemory(Segment(0, forward))
        # The first block with a graph has no gradient to pass on; of the others, equal ones take the same.
        first, *others = self.kinds[self.first_trained :]
        distinct = list(dict.fromkeys(others))
        prefix = list(dict.fromkeys(self.kinds[: self.first_trained]))
        before, after = Segment(0, 0), {}
        of_first: dict[Checkpointing, BlockSegments] = {}
        of_others: dict[_BlockKind, dict[Checkpointing, BlockSegments]] = {block: {} for block in distinct}
        for index, kind in enumerate(kinds):
            start, after[kind], (of_first[kind], *traced) = self._segments(
                [] if index else prefix, [first, *distinct], clip, kind, processes)
            before = before if index else start
            for block, segments in zip(distinct, traced, strict=True):
                of_others[block][kind] = segments
        return StepMemory(before, after, (of_first, *(of_others[block] for block in others)))

    def _segments(
        self, prefix: Sequence[_BlockKind], blocks: Sequence[_BlockKind], clip: ClipShape,
        checkpointing: Checkpointing, processes: int,
    ) -> tuple[Segment, Segment, list[BlockSegments]]:
        model, adapter = self._model([*prefix, *blocks])
        context_parallel, inputs = ContextParallel(0, processes) if processes > 1 else None, self.inputs(clip)

        def step(block: Callable[..., Tensor]) -> None:
            # Its checkpointing is off: `trace_step` recomputes.
            backbone = WanBackbone(model, ForwardOptions(block, context_parallel=context_parallel))
            torch.autograd.backward((backbone.velocity(*inputs) - inputs[0]).square().mean())

        with self.gates(adapter, clip, True):
            return trace_step(step, len(blocks), checkpointing, _MEMO)

    def flops(self, clip: ClipShape, blocks: Sequence[int]) -> Flops:
        """Of the forward of some blocks, without adapters; a multiply-add counts as two."""
        tokens_per_clip = tokens_of(self.spec, (clip.frames, clip.height, clip.width))
        width = self._width
        tokens, text = clip.batch * tokens_per_clip, clip.batch * TEXT_LENGTH
        per_token = width * (6 * width + 2 * self.config["ffn_dim"])
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


def _quantise(block: nn.Module, kind: type[QuantisedLinear], dtype: torch.dtype) -> None:
    for path, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear) and kind.supports(linear.in_features, linear.out_features):
            block.set_submodule(
                path, kind.shaped(linear.in_features, linear.out_features, linear.bias is not None, dtype))


def _state(model: nn.Module, ranks: Mapping[str, int]) -> AdapterState:
    entries: dict[str, WeightUpdate] = {}
    for path, rank in ranks.items():
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear | FrozenLinear)
        down = torch.empty(rank, base.in_features, device=META)
        entries[path] = LowRank(down, torch.empty(base.out_features, rank, device=META), float(rank))
    return AdapterState(entries, {})
