"""The memory a forward, or a forward and backward, takes beside its weights: the real code on tensors without values.

Every operation of the eager path is met in its order; a storage counts from its creation until nothing holds it, as in
CUDA's allocator. Attention is the fused one, which keeps q, k, v, its output and one number a row.
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


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of storages made while it is on, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_identity(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _identity(tensor)) not in given and key not in self._known:
                self._add(tensor, key)
        return out

    def _add(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


@dataclass(frozen=True)
class TracedWork:
    """Bytes beside weights: at most, and what is left at the end (gradients)."""

    peak: int
    left: int


def measure(run: Callable[[], Any]) -> TracedWork:
    """The memory of `run`, which works on meta tensors made before."""
    live = _Live()
    # Left to itself, a device without values takes the attention that makes all N · L products.
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        with live:
            kept = run()
    del kept
    return TracedWork(live.peak, live.now)
