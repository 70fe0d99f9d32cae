"""Memory of a computation beside the weights: the real code runs on meta tensors.

Every operation of the eager path is dispatched in order. A storage counts from its creation until nothing refers to it,
as in CUDA's allocator. Attention is the fused one, which keeps q, k, v, its output and the log-sum-exp of each row.
Shapes: B samples, H heads, N queries, L keys, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lapwan.memory.shape_rules import RULES

_ROUND = 512  # bytes: CUDA's allocations are multiples of this
# Shape, stride and dtype of an operation's outputs by the operation and its arguments; None: it must run.
Memo = dict[Any, Any]


@dataclass(frozen=True)
class Segment:
    """A part of a computation: live bytes at its end, and at its peak, beyond those at its start."""

    change: int
    peak: int

    def times(self, factor: float) -> Segment:
        """Both multiplied by `factor`."""
        return Segment(int(self.change * factor), int(self.peak * factor))


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages created while the mode is active: alive now, and at the peak."""

    def __init__(self, memo: Memo | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._memo = memo
        self._known: set[int] = set()
        self.segments: dict[Hashable, Segment] = {}
        self._name: Hashable = None
        self._next: Hashable = None
        self._start = self._segment_peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports torch._dynamo at the first operation, which takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kernel = func if self._memo is None else RULES.get(func, func)
        if not _creates(func):
            return kernel(*args, **kwargs)
        key = None if self._memo is None else (func, _described(args), _described(kwargs))
        if self._memo is not None and (outputs := self._memo.get(key)) is not None:
            return self._made(outputs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        out = (kernel if all(tensor.is_meta for tensor in tensors) else func)(*args, **kwargs)
        inputs = {_identity(tensor) for tensor in tensors}
        fresh = True
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                if (storage := _identity(tensor)) in inputs or storage in self._known:
                    fresh = False
                else:
                    self._add(tensor)
                    fresh = fresh and tensor.is_meta
        if self._memo is not None and fresh:
            self._memo[key] = _outputs(out)
        return out

    def _made(self, outputs: Any) -> Any:
        if isinstance(outputs, list):
            return [None if output is None else self._made(output) for output in outputs]
        shape, stride, dtype = outputs
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        self._add(tensor)
        return tensor

    def _add(self, tensor: Tensor) -> None:
        if self._next is not None:
            self.close()
            self._name, self._next = self._next, None
        storage, key = tensor.untyped_storage(), _identity(tensor)
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self._segment_peak = max(self._segment_peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def start(self, name: Hashable) -> None:
        """Start a segment at the next allocation: memory freed before it belongs to the segment that ends."""
        self._next = name

    def close(self) -> None:
        """End the segment."""
        self.segments[self._name] = Segment(self.live - self._start, self._segment_peak - self._start)
        self._start = self._segment_peak = self.live


@cache
def _creates(func: Any) -> bool:
    """Whether an operation returns new storages: not a view, nothing in place."""
    return not func._schema.is_mutable and all(value.alias_info is None for value in func._schema.returns)


def _described(value: Any) -> Any:
    """Arguments as a key: tensors by shape, stride, dtype and whether they have values."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(item)) for name, item in value.items())
    return type(value), value  # 1, 1.0 and True are equal


def _outputs(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.shape, out.stride(), out.dtype
    if isinstance(out, list | tuple) and all(item is None or isinstance(item, Tensor) for item in out):
        return [None if item is None else _outputs(item) for item in out]
    return None


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


@dataclass(frozen=True)
class TracedMemory:
    """Bytes beside the weights: `peak`, and what is `left` at the end (gradients)."""

    peak: int
    left: int


def _traced(run: Callable[[Callable[[Hashable], None]], Any], memo: Memo | None) -> _LiveBytes:
    mode = _LiveBytes(memo)
    # By default the meta device uses the attention that materialises all N · L scores.
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        with mode:
            kept = run(mode.start)
    del kept
    return mode


def trace_memory(run: Callable[[], Any], memo: Memo | None = None) -> TracedMemory:
    """The memory of `run`, which computes on meta tensors created before.

    Args:
        memo: shared between traces. Operations take the shapes of their outputs from it or from `shape_rules`, which
            is ten times as fast. None: from torch's own meta kernels.
    """
    mode = _traced(lambda _: run(), memo)
    return TracedMemory(mode.peak, mode.live)


def without_kernels(memo: Memo) -> AbstractContextManager[object]:
    """A scope in which operations on meta tensors take the shapes of their outputs from the memo and `shape_rules`."""
    return _LiveBytes(memo)


def trace_segments(run: Callable[[Callable[[Hashable], None]], Any], memo: Memo) -> dict[Hashable, Segment]:
    """The memory of the segments of `run`, which is given a function that starts a segment; the first is None."""
    mode = _traced(run, memo)
    mode.close()
    return mode.segments
