"""Peak memory of a forward, or a forward and backward, beside the weights: the real code runs on meta tensors.

Every operation of the eager path is dispatched in order. A storage counts from its creation until nothing refers to it,
as in CUDA's allocator. Attention is the fused one, which keeps q, k, v, its output and the log-sum-exp of each row.
Shapes: B samples, H heads, N queries, L keys, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROUND = 512  # bytes: CUDA's allocations are multiples of this


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages created while the mode is active: alive now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {_identity(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _identity(tensor)) not in inputs and key not in self._known:
                self._add(tensor, key)
        return out

    def _add(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


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


def trace_memory(run: Callable[[], Any]) -> TracedMemory:
    """The memory of `run`, which computes on meta tensors created before."""
    mode = _LiveBytes()
    # By default the meta device uses the attention that materialises all N · L scores.
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        with mode:
            kept = run()
    del kept
    return TracedMemory(mode.peak, mode.live)
