"""Outputs on the meta device of operations whose own meta kernels are written in Python.

Those kernels import torch's compiler (a second) and take a tenth of a millisecond a call. A test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


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


def _attention(q_BHNd: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = q_BHNd.shape
    lse_BHN = _empty((batch, queries, heads), torch.promote_types(q_BHNd.dtype, torch.float32)).transpose(1, 2)
    return _like(q_BHNd, q_BHNd.dtype), lse_BHN


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
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


RULES: dict[Any, Callable[..., Any]] = {
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
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    _aten.arange.default: lambda count, dtype=torch.int64, **_: _empty((count,), dtype or torch.int64),
    _aten._unsafe_view.default: lambda x, shape: x.view(shape),
    _aten.native_layer_norm.default: _layer_norm, _aten.native_layer_norm_backward.default: _layer_norm_backward,
}
