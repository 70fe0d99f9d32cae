"""Our kernels alone, at A14B's widths: time by warps a program, and what their bytes take at the rate of a large copy.

    python tests/bench/bench_kernels.py            # a GPU with fp8; half a minute

The cache is emptied before every launch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import triton
from triton.testing import do_bench

from lapwan.wan.transformer import triton_kernels as ours


def cases(tokens: int) -> dict[str, tuple[int, Callable[[int], object]]]:
    """Of each kernel: bytes, and a launch with so many warps."""
    x, out, wide = (torch.randn(tokens, width, device="cuda").bfloat16() for width in (5120, 5120, 13824))
    rows, cos = torch.randn(1, 5120, device="cuda"), torch.randn(tokens, 128, device="cuda")
    h, y8 = torch.empty_like(x), torch.empty(tokens, 5120, device="cuda", dtype=torch.float8_e4m3fn)
    w8 = torch.empty(tokens, 13824, device="cuda", dtype=torch.float8_e4m3fn)
    scale = torch.empty(tokens, 1, device="cuda")
    weight, one = torch.randn(5120, device="cuda").bfloat16(), tokens * 5120
    grid, block = (tokens,), triton.next_power_of_2(5120)

    def norm(adds: bool, eight: bool) -> Callable[[int], object]:
        y = y8 if eight else torch.empty_like(h)
        return lambda warps: ours._add_norm[grid](
            x, out, rows, rows, rows, h, y, scale, tokens, 0, 0, 1e-6, 5120, HAS_OUT=adds, HAS_GATE=adds,
            EIGHT=eight, BLOCK=block, num_warps=warps)

    def rotate(on: bool) -> Callable[[int], object]:
        return lambda warps: ours._rms_rotate[grid](
            x, weight, cos, cos, h, tokens, 1e-6, 5120, 128, ROTATES=on, BLOCK=block, num_warps=warps)

    return {
        "norm": (4 * one, norm(False, False)), "norm, fp8": (3 * one, norm(False, True)),
        "residual + norm": (8 * one, norm(True, False)), "residual + norm, fp8": (7 * one, norm(True, True)),
        "residual": (6 * one, lambda warps: ours._add_gated[grid](
            x, out, rows, h, tokens, 0, 5120, BLOCK=block, num_warps=warps)),
        "fp8": (3 * one, lambda warps: ours._quantise_rows[grid](
            x, y8, scale, 5120, BLOCK=block, num_warps=warps)),
        "RMSNorm": (4 * one, rotate(False)), "RMSNorm + rope": (4 * one, rotate(True)),
        "gelu, fp8": (3 * tokens * 13824, lambda warps: ours._gelu_quantise[grid](
            wide, w8, scale, 13824, BLOCK=16384, num_warps=warps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5376)
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8, 16, 32])
    args = parser.parse_args()
    big = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    rate = 2 * big.nbytes / (1e-3 * do_bench(big.clone, return_mode="median"))
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e12:.2f} TB/s; µs by warps {args.warps}, and of the bytes")
    for name, (size, launch) in cases(args.tokens).items():
        times = [1e3 * do_bench(partial(launch, warps), return_mode="median") for warps in args.warps]
        columns = "  ".join(f"{taken:6.1f}" for taken in times)
        print(f"{name:<22} {columns}   {1e6 * size / rate:6.1f}", flush=True)


if __name__ == "__main__":
    main()
