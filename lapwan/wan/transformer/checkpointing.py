"""Activation checkpointing of a block: what the backward recomputes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lapwan.names import Checkpointing
from lapwan.wan.transformer.block import block_forward

_aten = torch.ops.aten
_ATTENTION = frozenset({
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
})
# Matrix products, with the position of their left factor among the arguments.
_LEFT_FACTOR = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten._scaled_mm.default: 0}


def is_saved(operation: Any, args: tuple[Any, ...]) -> bool:
    """Attention, and products that cost more to recompute than their result costs to keep.

    Not a low-rank product, nor the last one of the feed-forward, whose result no backward needs.
    """
    if operation not in _LEFT_FACTOR:
        return operation in _ATTENTION
    left, right = args[_LEFT_FACTOR[operation]], args[_LEFT_FACTOR[operation] + 1]
    inner, outer = left.shape[-1], right.shape[-1]
    return bool(outer <= 8 * inner <= 16 * outer)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_saved(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


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
