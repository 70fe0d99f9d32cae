"""Our Triton kernels against their torch forms, in Triton's interpreter on a CPU; run by test_fused_block.py.

The interpreter is chosen when Triton is imported, so this is a program of its own.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from lapwan.wan.transformer import kernels, triton_kernels

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    """fp32: the interpreter cuts where a GPU rounds to bf16."""
    return torch.randn(shape, generator=GENERATOR)


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Numbers to fp32's rounding; e4m3 codes alike but for ties.

    The interpreter loses the carry where a mantissa rounds up to the next power of two: those are a binade apart.
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    if ours.dtype == torch.float8_e4m3fn:
        apart = (ours.view(torch.int8).int() - theirs.view(torch.int8).int()).abs()
        carry = (theirs.view(torch.uint8) & 7 == 0) & (apart == 8)
        assert bool(((apart <= 1) | carry).all()) and float(((apart > 0) & ~carry).float().mean()) < 0.01, what
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=what)


def main() -> None:
    tokens, width = 6, 320
    x, out = random(tokens, width), random(tokens, width)
    x[3] = 0
    # One row, one per sample, a pair for all samples, a pair for each of two.
    for rows, runs in ((1, (6, 0)), (2, (3, 0)), (2, (3, 1)), (4, (3, 2))):
        mul, add, gate = (random(rows, width) for _ in range(3))
        for given in ((None, None), (out, None), (out, gate)):
            for to_fp8 in (False, True):
                # A norm with weights of its own has one row whatever the gate has.
                for both in ((mul, add), (mul[:1], add[:1])):
                    case = (x, *given, *both, 1e-6, to_fp8, *runs)
                    what = f"add_norm {rows} {runs} out={given[0] is not None} gate={given[1] is not None} {to_fp8}"
                    for ours, theirs in zip(triton_kernels.add_norm(*case), kernels.add_norm(*case), strict=True):
                        same(ours, theirs, what)
        same(triton_kernels.add_gated(x, out, gate, *runs), kernels.add_gated(x, out, gate, *runs), f"{rows} {runs}")
    for ours, theirs in zip(triton_kernels.quantise_rows(x), kernels.quantise_rows(x), strict=True):
        same(ours, theirs, "quantise_rows")
    for ours, theirs in zip(triton_kernels.gelu_quantise(x), kernels.gelu_quantise(x), strict=True):
        same(ours, theirs, "gelu_quantise")
    weight = random(width)
    angles = random(tokens // 2, 32)
    cos, sin = angles.cos(), angles.sin() * torch.tensor([-1.0, 1.0]).repeat(16)
    for tables in ((None, None), (cos, sin)):
        case = (x, weight, *tables, 1e-6)
        same(triton_kernels.rms_rotate(*case), kernels.rms_rotate(*case), f"rms_rotate rope={tables[0] is not None}")
    sys.stdout.write("alike\n")


if __name__ == "__main__":
    main()
