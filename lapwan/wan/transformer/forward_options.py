"""How a transformer's forward runs: compiled blocks, activation checkpointing, residency of weights, context parallel.

None of it changes a result, except for the rounding of the compiler's fused kernels. The options belong to a
transformer and live as long as it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lapwan.wan.transformer.block import Rope, block_forward
from lapwan.wan.transformer.context_parallel import ContextParallel

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Checkpointing = Literal["off", "op", "block"]
BlockFunction = Callable[..., Tensor]
_MAX_ROPE_TABLES = 4  # one per bucket, the oldest is dropped


class Residency(Protocol):
    """Brings the weights of blocks to the device."""

    def ready(self, index: int) -> None:
        """Called before block `index` computes: makes its weights available to the current stream."""

    def done(self, index: int) -> None:
        """Called when block `index` has been launched."""


@dataclass(eq=False)
class ForwardOptions:
    """How one transformer's forward runs.

    Args:
        block: the function that computes a block; `block_forward` or its compiled form.
        selective: a compiled block that applies "op" checkpointing inside; None: not compiled.
        residency: brings a block's weights to the device; None: they are there.
        checkpointing: what the backward recomputes; None: whole blocks if diffusers' `gradient_checkpointing` is on.
        whole_blocks: how many of the first blocks with a graph are recomputed whole, whatever `checkpointing` is.
        diffusers_forward: run diffusers' own forward, because FSDP gathers weights where a module is called.
        context_parallel: the processes that share a sequence's tokens.
    """

    block: BlockFunction = block_forward
    selective: BlockFunction | None = None
    residency: Residency | None = None
    checkpointing: Checkpointing | None = None
    whole_blocks: int = 0
    diffusers_forward: bool = False
    context_parallel: ContextParallel | None = None
    rope_tables: dict[tuple[Any, ...], Rope] = field(default_factory=dict)

    def rope(self, transformer: WanTransformer3DModel, latents_BCTHW: Tensor) -> Rope:
        """cos and ±sin [N, 1, d] in fp32 for latents of this size; computed once per size."""
        key = (*latents_BCTHW.shape[2:], latents_BCTHW.device)
        if key not in self.rope_tables:
            while len(self.rope_tables) >= _MAX_ROPE_TABLES:
                self.rope_tables.pop(next(iter(self.rope_tables)))
            cos, sin = (table[0].contiguous() for table in transformer.rope(latents_BCTHW))
            sign = sin.new_tensor([-1.0, 1.0]).repeat(sin.shape[-1] // 2)
            self.rope_tables[key] = (cos, sin * sign)
        return self.rope_tables[key]


_OPTIONS: WeakKeyDictionary[nn.Module, ForwardOptions] = WeakKeyDictionary()


def forward_options(transformer: nn.Module) -> ForwardOptions:
    """The transformer's options, created at the first call."""
    return _OPTIONS.setdefault(transformer, ForwardOptions())


_aten = torch.ops.aten
_ATTENTION = frozenset({
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
})
# Matrix products, with the position of their left factor among the arguments.
_LEFT_FACTOR = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten._scaled_mm.default: 0}


def _is_saved(operation: Any, args: tuple[Any, ...]) -> bool:
    """Attention, and products that cost more to recompute than their result costs to keep.

    Not a low-rank product, nor the last one of the feed-forward, whose result no backward needs.
    """
    if operation not in _LEFT_FACTOR:
        return operation in _ATTENTION
    left, right = args[_LEFT_FACTOR[operation]], args[_LEFT_FACTOR[operation] + 1]
    inner, outer = left.shape[-1], right.shape[-1]
    return bool(outer <= 8 * inner <= 16 * outer)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_saved(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def run_checkpointed(run: Callable[..., Tensor], kind: Checkpointing, *tensors: Tensor | None) -> Tensor:
    """`run(*tensors)` under activation checkpointing.

    Args:
        kind: "block" keeps only the inputs for the backward, "op" attention and large products too, "off" everything.
    """
    # Nothing in a block draws from a global generator (dropout's masks are keyed), so none needs restoring.
    checkpointed = partial(checkpoint, run, *tensors, use_reentrant=False, preserve_rng_state=False)
    if kind == "block":
        out: Tensor = checkpointed()
    elif kind == "op":
        out = checkpointed(context_fn=_selective_contexts)
    else:
        out = run(*tensors)
    return out


def selective_block(block: Any, *inputs: Any) -> Tensor:
    """`block_forward` under "op" checkpointing: a compiled block cannot be given a policy from outside."""

    def run(*tensors: Any) -> Tensor:
        return block_forward(block, *tensors)

    return run_checkpointed(run, "op", *inputs)
