"""How each transformer's forward runs: which function a block is, what brings its weights, what is recomputed.

None of it changes a result beyond the rounding that the compiler's fusion changes. The state belongs to a transformer
and lives as long as it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lapwan.lora.layer import StackedLoraLinear
from lapwan.wan.transformer.block import KeysValues, Rope, block_forward, text_keys_values
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.text_padding import cut, fold, repeat_last

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Checkpointing = Literal["off", "op", "block"]
BlockFunction = Callable[..., Tensor]
_ROPES = 4  # tables kept: one a bucket in turn


class Residency(Protocol):
    """Brings the weights of blocks to the device."""

    def ready(self, index: int) -> None:
        """Before block `index` computes: its weights are there, or come before what the stream does next."""

    def done(self, index: int) -> None:
        """Block `index` has been launched."""


@dataclass(eq=False)
class ForwardOptions:
    """One transformer's way. `checkpointing` None: blocks, where diffusers' own switch is on.

    `whole_blocks`: the first blocks with a graph that are recomputed whole, whatever `checkpointing` says.
    `selective`: the block that itself keeps no more than "op" says, for compiled ones. `modules`: by diffusers' own
    forward, since sharding puts weights together where a module is called. `spread`: the processes that share a
    sequence's tokens.
    """

    block: BlockFunction = block_forward
    selective: BlockFunction | None = None
    residency: Residency | None = None
    checkpointing: Checkpointing | None = None
    whole_blocks: int = 0
    modules: bool = False
    spread: ContextParallel | None = None
    ropes: dict[tuple[Any, ...], Rope] = field(default_factory=dict)

    def rope(self, transformer: WanTransformer3DModel, latents_BCTHW: Tensor) -> Rope:
        """cos and ±sin [N, 1, d] in fp32 for latents of this size, made once a size."""
        key = (*latents_BCTHW.shape[2:], latents_BCTHW.device)
        if key not in self.ropes:
            while len(self.ropes) >= _ROPES:
                self.ropes.pop(next(iter(self.ropes)))
            cos, sin = (table[0].contiguous() for table in transformer.rope(latents_BCTHW))
            sign = sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)
            self.ropes[key] = (cos, sin * sign)
        return self.ropes[key]


_PATHS: WeakKeyDictionary[nn.Module, ForwardOptions] = WeakKeyDictionary()


def forward_options(transformer: nn.Module) -> ForwardOptions:
    """The transformer's way, made on first use."""
    return _PATHS.setdefault(transformer, ForwardOptions())


class Prompt:
    """A generation's text: embedded once a transformer, with each block's cross-attention keys and values.

    A block whose k or v carries an adapter is computed anew at every step, since its gates may change with sigma.
    Only the last transformer's are kept. For use without gradients.
    """

    def __init__(self, text_BLD: Tensor, whole: Prompt | None = None) -> None:
        self.text_BLD, self.bias = (text_BLD, None) if whole is not None else fold(text_BLD)
        self.stands = 1  # as often stands the last row
        if whole is not None:
            self.bias, self.stands = None if whole.bias is None else whole.bias[: len(text_BLD)], whole.stands
        elif self.bias is None:
            self.text_BLD, self.stands = cut(text_BLD)
        self._whole = whole  # this one is the first samples of
        self._owner: Callable[[], nn.Module | None] = lambda: None
        self._embedded: Tensor | None = None
        self._kept: dict[int, KeysValues] = {}

    def first(self, samples: int) -> Prompt:
        """The first samples of this one, without computing or keeping anything twice."""
        return Prompt(self.text_BLD[:samples], self)

    def embedded(self, transformer: WanTransformer3DModel) -> Tensor:
        """The text as the blocks see it."""
        if self._whole is not None:
            return self._whole.embedded(transformer)[: len(self.text_BLD)]
        if self._owner() is not transformer or self._embedded is None:
            self._kept.clear()
            self._owner = ref(transformer)
            dtype = transformer.patch_embedding.weight.dtype
            self._embedded = transformer.condition_embedder.text_embedder(self.text_BLD.to(dtype))
        return self._embedded

    def keys_values(self, index: int, block: Any) -> KeysValues | None:
        """Keys and values of a block of the transformer last asked for; None where they may change."""
        if self._whole is not None:
            both, count = self._whole.keys_values(index, block), len(self.text_BLD)
            return None if both is None else (both[0][:count], both[1][:count])
        if isinstance(block.attn2.to_k, StackedLoraLinear) or isinstance(block.attn2.to_v, StackedLoraLinear):
            return None
        if index not in self._kept:
            assert self._embedded is not None
            self._kept[index] = text_keys_values(block.attn2, self._embedded)
        k, v = self._kept[index]
        return repeat_last(k, self.stands), repeat_last(v, self.stands)


@dataclass(frozen=True)
class TrainedInputs:
    """Of a block: whether its output needs a graph of its own, and whether dropout acts in it."""

    graph: bool
    dropout: bool


def look_at(block: nn.Module) -> TrainedInputs:
    """A block needs a graph if it holds a parameter that is trained, or gates that carry gradient."""
    graph, dropout = any(p.requires_grad for p in block.parameters()), False
    for module in block.modules():
        if isinstance(module, StackedLoraLinear):
            gates = module.holder.gates_BG
            graph = graph or (gates is not None and gates.requires_grad)
            dropout = dropout or module.holder.mask is not None
    return TrainedInputs(graph, dropout)


_aten = torch.ops.aten
_ATTENTION = frozenset({
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
})


_FACTORS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten._scaled_mm.default: 0}


def _worth_keeping(operation: Any, args: tuple[Any, ...]) -> bool:
    """Attention, and products that cost more than their result takes: not a low-rank one, nor the feed-forward's last,
    whose result no backward needs."""
    if operation not in _FACTORS:
        return operation in _ATTENTION
    left, right = args[_FACTORS[operation]], args[_FACTORS[operation] + 1]
    inner, outer = left.shape[-1], right.shape[-1]
    return bool(outer <= 8 * inner <= 16 * outer)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _worth_keeping(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _op_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def run_checkpointed(run: Callable[..., Tensor], kind: Checkpointing, *tensors: Tensor | None) -> Tensor:
    """`run(*tensors)`: with "block" its input alone is kept for the backward, with "op" attention and products too."""
    # Nothing in a block draws from a global generator (dropout's masks are keyed), so none needs restoring.
    whole = partial(checkpoint, run, *tensors, use_reentrant=False, preserve_rng_state=False)
    if kind == "block":
        out: Tensor = whole()
    elif kind == "op":
        out = whole(context_fn=_op_contexts)
    else:
        out = run(*tensors)
    return out


def selective_block(block: Any, *given: Any) -> Tensor:
    """`block_forward` that keeps what "op" keeps: once compiled, a block cannot be told so from outside."""

    def run(*inputs: Any) -> Tensor:
        return block_forward(block, *inputs)

    return run_checkpointed(run, "op", *given)
