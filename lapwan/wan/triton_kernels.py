"""Kernels in Triton, imported only where there is a GPU. Each has its torch form in `kernels`, and a test of both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gelu_quantise(x_ptr, codes_ptr, scale_ptr, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    # x·Φ(x) by the tanh approximation: ½(1 + tanh z) = sigmoid(2z)
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x * tl.sigmoid(2.0 * z)
    amax = tl.max(tl.abs(y), axis=0)
    scale = tl.where(amax > 0, amax / 448.0, 1.0)
    codes = tl.minimum(tl.maximum(y * (1.0 / scale), -448.0), 448.0).to(tl.float8e4nv)  # a division each is slower
    tl.store(codes_ptr + row * columns + at, codes, mask=inside)
    tl.store(scale_ptr + row, scale)


def gelu_quantise(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """A row a program, read once: e4m3 codes [N, K] and scales [N, 1] of gelu(x)."""
    rows, columns = x_NK.shape
    codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x_NK.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x_NK.device)
    block = triton.next_power_of_2(columns)
    _gelu_quantise[(rows,)](x_NK, codes, scale, columns, BLOCK=block, num_warps=16 if block > 8192 else 8)
    return codes, scale
