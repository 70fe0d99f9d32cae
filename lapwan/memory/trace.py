"""Memory of a computation beside the weights: the real code runs on meta tensors.

Every operation of the eager path is dispatched in order. A storage counts from its creation until nothing refers to it,
as in CUDA's allocator. Attention is the fused one, which keeps q, k, v, its output and the log-sum-exp of each row.
Shapes: B samples, H heads, N queries, L keys, d head width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_ROUND = 512  # bytes: CUDA's allocations are multiples of this
# Shape, stride and dtype of an operation's outputs by the operation and its arguments; None: it must run.
Memo = dict[Any, Any]


@dataclass(frozen=True)
class Segment:
    """A part of a computation: live bytes at its end, and at its peak, beyond those at its start."""

    change: int
    peak: int


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
        kernel = func if self._memo is None else _RULES.get(func, func)
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


def _traced(run: Callable[[Callable[[Hashable], None]], Any], memo: Memo | None) -> _LiveBytes:
    mode = _LiveBytes(memo)
    # By default the meta device uses the attention that materialises all N · L scores.
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        with mode:
            kept = run(mode.start)
    del kept
    return mode


def trace_memory(run: Callable[[], Any], memo: Memo | None = None) -> Segment:
    """The memory of `run`, which computes on meta tensors created before; at its end gradients may live.

    Args:
        memo: shared between traces. Operations take the shapes of their outputs from it or from `_RULES`, which
            is ten times as fast. None: from torch's own meta kernels.
    """
    mode = _traced(lambda _: run(), memo)
    return Segment(mode.live, mode.peak)


def without_kernels(memo: Memo) -> AbstractContextManager[object]:
    """A scope in which operations on meta tensors take the shapes of their outputs from the memo and `_RULES`."""
    return _LiveBytes(memo)


def trace_segments(run: Callable[[Callable[[Hashable], None]], Any], memo: Memo) -> dict[Hashable, Segment]:
    """The memory of the segments of `run`, which is given a function that starts a segment; the first is None."""
    mode = _traced(run, memo)
    mode.close()
    return mode.segments


# Outputs of operations whose meta kernels are written in Python: those import torch's compiler, which takes a second,
# and need a tenth of a millisecond a call. A test compares.


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense, with the dimensions in memory in the order of x's."""
    if x.is_contiguous():
        return _empty(x.shape, dtype)
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return _empty([x.shape[dim] for dim in order], dtype).permute(sorted(range(x.dim()), key=order.__getitem__))


def _broadcast(dtype: torch.dtype, *values: Any) -> Tensor:
    """The result of an elementwise operation: laid out as the first operand of the full size."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes = zip_longest(*(reversed(tensor.shape) for tensor in tensors), fillvalue=1)
    shape = tuple(0 if 0 in size else max(size) for size in sizes)[::-1]
    full = next((tensor for tensor in tensors if tensor.shape == shape), None)
    return _empty(shape, dtype) if full is None else _like(full, dtype)


def _unary(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _like(x, x.dtype)


def _binary(x: Tensor, y: Any, **_: Any) -> Tensor:
    return _broadcast(torch.result_type(x, y), x, y)


def _comparison(x: Tensor, y: Any) -> Tensor:
    return _broadcast(torch.bool, x, y)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return _broadcast(torch.result_type(x, y), condition, x, y)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return _empty(shape, reduce(torch.promote_types, (tensor.dtype for tensor in tensors)))


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    sizes = zip_longest(reversed(repeats), reversed(x.shape), fillvalue=1)
    return _empty([count * size for count, size in sizes][::-1], x.dtype)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim, len(tensors))
    return _empty(shape, tensors[0].dtype)


def _mm(x: Tensor, y: Tensor) -> Tensor:
    return _empty((x.shape[0], y.shape[1]), x.dtype)


def _scaled_mm(x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    return _empty((x.shape[0], y.shape[1]), torch.bfloat16)


def _addmm(bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return _empty((x.shape[0], y.shape[1]), x.dtype)


def _reduction(x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    reduced = {dim % x.dim() for dim in (range(x.dim()) if dims is None else dims)}
    shape = [1 if dim in reduced else size for dim, size in enumerate(x.shape) if keepdim or dim not in reduced]
    return _empty(shape, x.dtype)


def _flash_attention(q_BHNd: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries = q_BHNd.shape[:3]
    lse_BHN = _empty((batch, queries, heads), torch.promote_types(q_BHNd.dtype, torch.float32)).transpose(1, 2)
    return _like(q_BHNd, q_BHNd.dtype), lse_BHN


def _flash_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device="meta") for x in (q, k, v))


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    wide = torch.promote_types(x.dtype, torch.float32)
    return _empty(x.shape, x.dtype), _empty(rows, wide), _empty(rows, wide)


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    sizes = (x.shape, shape, shape)
    return tuple(_empty(size, x.dtype) if wanted else None for size, wanted in zip(sizes, needed, strict=True))


def _in_place(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.abs.default, _aten.rsqrt.default, _aten.silu.default, _aten.gelu.default,
                     _aten.clamp.default, _aten.pow.Tensor_Scalar, _aten.ones_like.default,
                     _aten.flip.default), _unary),
    **dict.fromkeys((_aten.mul.Tensor, _aten.add.Tensor, _aten.sub.Tensor, _aten.div.Tensor, _aten.mul.Scalar,
                     _aten.div.Scalar, _aten.bitwise_or.Tensor, _aten.bitwise_and.Scalar, _aten.__lshift__.Scalar,
                     _aten.__rshift__.Scalar), _binary),
    **dict.fromkeys((_aten.eq.Tensor, _aten.gt.Scalar), _comparison),
    **dict.fromkeys((_aten.mean.default, _aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default), _reduction),
    **dict.fromkeys((_aten.add_.Scalar, _aten.fill_.Scalar, _aten.zero_.default, _aten.uniform_.default,
                     _aten.addmm_.default), _in_place),
    _aten.gelu_backward.default: lambda grad, x, **_: _binary(grad, x),
    _aten.where.self: _where, _aten.cat.default: _cat, _aten.stack.default: _stack, _aten.repeat.default: _repeat,
    _aten.addmm.default: _addmm, _aten.mm.default: _mm, _aten._scaled_mm.default: _scaled_mm,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_attention_backward,
    _aten.arange.default: lambda count, dtype=torch.int64, **_: _empty((count,), dtype or torch.int64),
    _aten._unsafe_view.default: lambda x, shape: x.view(shape),
    _aten.native_layer_norm.default: _layer_norm, _aten.native_layer_norm_backward.default: _layer_norm_backward,
}
