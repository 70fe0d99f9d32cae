"""The memory of a training step: a few blocks are traced, and a step of all blocks is put together from their segments.

    before  block 0  block 1  ...  block n  after  block n  ...  block 1  block 0
            forward ───────────────────────  loss  ────────────────────── backward

A segment changes the live bytes by the same whatever came before it, so the peak of any sequence of blocks follows.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lapwan.memory.trace import Memo, Segment, trace_segments
from lapwan.names import Checkpointing
from lapwan.wan.transformer.block import block_forward
from lapwan.wan.transformer.checkpointing import is_saved


@dataclass(frozen=True)
class BlockSegments:
    """A block's forward and its backward, recomputation included."""

    forward: Segment
    backward: Segment


@dataclass(frozen=True)
class StepMemory:
    """Memory of a forward and backward beside the weights, gradients of trained parameters included.

    Args:
        before: all that comes before the first trained block.
        after: the head, the loss, and their backward, by what is recomputed: that decides what they free.
        blocks: the trained blocks and those after them, by what is recomputed.
    """

    before: Segment
    after: Mapping[Checkpointing, Segment] = field(default_factory=dict)
    blocks: tuple[Mapping[Checkpointing, BlockSegments], ...] = ()

    def peak(
        self, checkpointing: Checkpointing, whole_blocks: int = 0, scale: Mapping[Checkpointing, float] | None = None
    ) -> int:
        """Peak bytes.

        Args:
            whole_blocks: the first trained blocks, recomputed whole whatever `checkpointing` is for the others.
            scale: what the kernels take relative to the traced ones.
        """
        if not self.blocks:
            return self.before.peak
        kinds: list[Checkpointing] = [
            "block" if index < whole_blocks else checkpointing for index in range(len(self.blocks))]
        chosen = [(block[kind], kind) for block, kind in zip(self.blocks, kinds, strict=True)]
        sequence = [(self.before, checkpointing), *((block.forward, kind) for block, kind in chosen),
                    # Blocks recomputed whole hold the text until their backward, also beside others that do not.
                    (self.after["block" if whole_blocks else checkpointing], checkpointing),
                    *((block.backward, kind) for block, kind in reversed(chosen))]
        live = peak = 0.0
        for segment, kind in sequence:
            factor = 1.0 if scale is None else scale[kind]
            peak = max(peak, live + factor * segment.peak)
            live += factor * segment.change
        return int(peak)


def trace_step(
    step: Callable[[Callable[..., Tensor]], None], count: int, checkpointing: Checkpointing, memo: Memo
) -> tuple[Segment, Segment, list[BlockSegments]]:
    """The segments before and after the blocks that have a graph, and those of these blocks.

    Args:
        step: runs a forward and backward with the block function it is given.
        count: the number of blocks that have a graph.
    """

    def run(start: Callable[[Any], None]) -> None:
        indices = iter(range(count))

        def block(module: Any, x: Tensor, text: Tensor, keys_values: None, modulation: Tensor, *rest: Any) -> Tensor:
            def forward(x: Tensor, text: Tensor, modulation: Tensor) -> Tensor:
                return block_forward(module, x, text, keys_values, modulation, *rest)

            if not torch.is_grad_enabled():
                return forward(x, text, modulation)
            index = next(indices)
            start(("forward", index))
            out = _run_block(forward, checkpointing, x, text, modulation)
            out.register_hook(lambda _: start(("backward", index)))  # type: ignore[no-untyped-call]
            if index == count - 1:
                start("after")
            return out

        step(block)

    segments = trace_segments(run, memo)
    blocks = [BlockSegments(segments["forward", index], segments["backward", index]) for index in range(count)]
    return segments[None], segments["after"], blocks


def _run_block(run: Callable[..., Tensor], kind: Checkpointing, *tensors: Tensor) -> Tensor:
    return run(*tensors) if kind == "off" else _Recomputed(run, tensors, kind == "op").forward()


class _Recomputed:
    """Activation checkpointing that keeps and frees what `torch.utils.checkpoint` does, without importing its compiler.

    Saved tensors are dropped. The first that the backward asks for has the forward run again, up to the last of them.
    """

    def __init__(self, run: Callable[..., Tensor], tensors: Sequence[Tensor], selective: bool) -> None:
        self._run, self._tensors = run, tensors
        self._mode: AbstractContextManager[Any] = _Kept() if selective else nullcontext()
        self._slots: list[weakref.ref[_Dropped]] = []
        self._done = False

    def forward(self) -> Tensor:
        """The block's output."""
        with saved_tensors_hooks(self._drop, self._value), self._mode:
            return self._run(*self._tensors)

    def _drop(self, _: Tensor) -> _Dropped:
        slot = _Dropped()
        self._slots.append(weakref.ref(slot))
        return slot

    def _value(self, slot: _Dropped) -> Tensor:
        if not self._done:
            self._recompute()
            self._done = True
        value, slot.value = slot.value, None
        assert value is not None
        return value

    def _recompute(self) -> None:
        slots = iter(self._slots)
        remaining = len(self._slots)

        def fill(x: Tensor) -> Tensor:
            nonlocal remaining
            x, remaining = x.detach(), remaining - 1
            if (slot := next(slots)()) is not None:
                slot.value = x
            if not remaining:
                raise _Complete
            return x

        if isinstance(self._mode, _Kept):
            self._mode.replays = True
        try:
            with saved_tensors_hooks(fill, lambda x: x), torch.enable_grad(), self._mode:
                self._run(*self._tensors)
        except _Complete:
            pass


class _Complete(Exception):
    """Every saved tensor has been recomputed."""


class _Dropped:
    """A dropped tensor."""

    value: Tensor | None = None


class _Kept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the results that "op" saves, and gives them back in the recomputation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replays = False
        self._results: deque[Any] = deque()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_saved(func, args):
            return func(*args, **(kwargs or {}))
        if self.replays:
            return self._results.popleft()
        out = func(*args, **(kwargs or {}))
        self._results.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out))
        return out
