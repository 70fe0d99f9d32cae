"""The fused operations of `kernels` in Triton, imported only on a GPU; a test compares them with their torch forms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lapwan.wan.quantise.linears import empty_codes


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _store_codes(y, codes_ptr, scale_ptr, row, at, inside, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    amax = tl.max(tl.abs(y), axis=0)
    scale = tl.where(amax > 0, amax * (1.0 / 448.0), 1.0)
    codes = tl.minimum(tl.maximum(y * (1.0 / scale), -448.0), 448.0).to(tl.float8e4nv)  # dividing each is slower
    tl.store(codes_ptr + row * columns + at, codes, mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gelu_quantise(x_ptr, codes_ptr, scale_ptr, columns: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    # x·Φ(x) by the tanh approximation: ½(1 + tanh z) = sigmoid(2z)
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x * tl.sigmoid(2.0 * z)
    _store_codes(y, codes_ptr, scale_ptr, row, at, inside, columns)


def gelu_quantise(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.gelu_quantise`, one program per row."""
    rows, columns = x_NK.shape
    codes, scale = empty_codes(x_NK)
    block = triton.next_power_of_2(columns)
    _gelu_quantise[(rows,)](x_NK, codes, scale, columns, BLOCK=block, num_warps=16 if block > 8192 else 8)
    return codes, scale


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add_norm(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, gate_ptr, mul_ptr, add_ptr, h_ptr, y_ptr, scale_ptr, tokens, first, gate_step, gate_run,
    mul_step, mul_run, eps, columns: tl.constexpr, HAS_OUT: tl.constexpr, HAS_GATE: tl.constexpr,
    TO_FP8: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    run = (row % tokens >= first).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_OUT:
        out = tl.load(out_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            out = out * tl.load(gate_ptr + sample * gate_step + run * gate_run + at, mask=inside, other=0.0)
        h = (x + out).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * columns + at, h, mask=inside)
        x = h.to(tl.float32)
    mean = tl.sum(x, axis=0) / columns
    off = tl.where(inside, x - mean, 0.0)
    deviation = tl.rsqrt(tl.sum(off * off, axis=0) / columns + eps)
    mul = tl.load(mul_ptr + sample * mul_step + run * mul_run + at, mask=inside, other=0.0)
    add = tl.load(add_ptr + sample * mul_step + run * mul_run + at, mask=inside, other=0.0)
    y = (off * deviation * mul + add).to(x_ptr.dtype.element_ty)
    if TO_FP8:
        _store_codes(y.to(tl.float32), y_ptr, scale_ptr, row, at, inside, columns)
    else:
        tl.store(y_ptr + row * columns + at, y, mask=inside)


def add_norm(
    x_ND: Tensor, out_ND: Tensor | None, gate_RD: Tensor | None, mul_RD: Tensor, add_RD: Tensor, eps: float,
    to_fp8: bool, tokens: int = 0, first: int = 0,
) -> list[Tensor]:
    """`kernels.add_norm`, one program per row."""
    rows, columns = x_ND.shape
    x_ND = x_ND.contiguous()
    mul_RD, add_RD = (part.float().contiguous() for part in (mul_RD, add_RD))
    gate_RD = None if gate_RD is None else gate_RD.float().contiguous()
    out_ND = None if out_ND is None else out_ND.contiguous()
    h = x_ND if out_ND is None else torch.empty_like(x_ND)
    y, scale = empty_codes(x_ND) if to_fp8 else (torch.empty_like(x_ND),) * 2
    tokens = tokens if first else rows // max(len(mul_RD), 1 if gate_RD is None else len(gate_RD))
    block = triton.next_power_of_2(columns)
    _add_norm[(rows,)](
        x_ND, x_ND if out_ND is None else out_ND, mul_RD if gate_RD is None else gate_RD, mul_RD, add_RD, h, y, scale,
        tokens, first, *_steps(gate_RD, first), *_steps(mul_RD, first), eps, columns, HAS_OUT=out_ND is not None,
        HAS_GATE=gate_RD is not None, TO_FP8=to_fp8, BLOCK=block, num_warps=8)
    return [*([] if out_ND is None else [h]), *([y, scale] if to_fp8 else [y])]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _add_gated(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, gate_ptr, h_ptr, tokens, first, gate_step, gate_run, columns: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    run = (row % tokens >= first).to(tl.int64)
    gate = tl.load(gate_ptr + (row // tokens) * gate_step + run * gate_run + at, mask=inside, other=0.0)
    tl.store(h_ptr + row * columns + at, (x + out * gate).to(h_ptr.dtype.element_ty), mask=inside)


def add_gated(x_ND: Tensor, out_ND: Tensor, gate_RD: Tensor, tokens: int = 0, first: int = 0) -> Tensor:
    """`kernels.add_gated`, one program per row."""
    rows, columns = x_ND.shape
    x_ND, out_ND, gate_RD = x_ND.contiguous(), out_ND.contiguous(), gate_RD.float().contiguous()
    h = torch.empty_like(x_ND)
    tokens = tokens if first else rows // len(gate_RD)
    _add_gated[(rows,)](x_ND, out_ND, gate_RD, h, tokens, first, *_steps(gate_RD, first), columns,
                        BLOCK=triton.next_power_of_2(columns), num_warps=8)
    return h


def _steps(rows_RD: Tensor | None, first: int) -> tuple[int, int]:
    """Elements from a sample's row to the next sample's, and from the row of its first tokens to that of the others."""
    if rows_RD is None or len(rows_RD) == 1:
        return 0, 0
    count, width = rows_RD.shape
    runs = 2 if first else 1
    return 0 if count == runs else runs * width, width if first else 0


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _quantise_rows(x_ptr, codes_ptr, scale_ptr, columns: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    _store_codes(x, codes_ptr, scale_ptr, row, at, inside, columns)


def quantise_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.quantise_rows`, one program per row."""
    rows, columns = x_ND.shape
    codes, scale = empty_codes(x_ND)
    _quantise_rows[(rows,)](x_ND, codes, scale, columns, BLOCK=triton.next_power_of_2(columns), num_warps=8)
    return codes, scale


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rms_rotate(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, tokens, eps, columns: tl.constexpr, width: tl.constexpr,
    ROTATES: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    kind = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
    y = (x * root * tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
    if ROTATES:
        a, b = tl.split(tl.reshape(y.to(tl.float32), [BLOCK // 2, 2]))
        swapped = tl.reshape(tl.join(b, a), [BLOCK])
        offset = (row % tokens) * width + at % width
        cos = tl.load(cos_ptr + offset, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + offset, mask=inside, other=0.0)
        y = (y.to(tl.float32) * cos + swapped * sin).to(kind)
    tl.store(y_ptr + row * columns + at, y, mask=inside)


def rms_rotate(
    x_ND: Tensor, weight_D: Tensor, cos_Nd: Tensor | None, signed_sin_Nd: Tensor | None, eps: float
) -> Tensor:
    """`kernels.rms_rotate`, one program per row."""
    rows, columns = x_ND.shape
    y = torch.empty_like(x_ND)
    if cos_Nd is None or signed_sin_Nd is None:
        tables, tokens, width = (weight_D, weight_D), rows, columns
    else:
        tables, (tokens, width) = (cos_Nd.contiguous(), signed_sin_Nd.contiguous()), cos_Nd.shape
    _rms_rotate[(rows,)](x_ND, weight_D.to(x_ND.dtype), *tables, y, tokens, eps, columns, width,
                         ROTATES=cos_Nd is not None, BLOCK=triton.next_power_of_2(columns), num_warps=8)
    return y
