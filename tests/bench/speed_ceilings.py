"""Rows of what a card sustains in products and attention alone, against which bench_speed.py's other rows are held."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from speed_measure import Flops, measure
from speed_rows import Bench


def ceiling_row(name: str, kind: str, size: str = "256") -> Callable[[Bench], None]:
    """What the card sustains, seconds on end and on random data: the rate a row is to be held against."""
    def run(bench: Bench) -> None:
        n = 512 if bench.tiny else 8192
        made = [torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2)]
        times = 1 if bench.tiny else 200  # a call without a wait inside, as long as a forward
        if kind.startswith("attention"):
            tokens, back = bench.tokens(bench.size(size)), kind == "attention backward"
            heads = 4 if bench.tiny else 40
            q, k, v = (torch.randn(1, heads, tokens, 128, device=bench.device).bfloat16().requires_grad_(back)
                       for _ in range(3))
            attend = partial(F.scaled_dot_product_attention, q, k, v)
            work, flops = attend, Flops(attention=4.0 * tokens**2 * heads * 128)
            times = max(1, times * 5376**2 // tokens**2 // 2) if not bench.tiny else 1
            if back:
                out, grad = attend(), torch.randn_like(q)
                work = partial(torch.autograd.grad, out, (q, k, v), grad, retain_graph=True)
                flops = Flops(backward=2 * flops.attention)
        elif kind == "fp8":
            x, w = (one.to(torch.float8_e4m3fn) for one in made)
            ones = torch.ones(n, 1, device=bench.device)
            work, flops = partial(torch._scaled_mm, x, w.t(), scale_a=ones, scale_b=ones.t(), use_fast_accum=True,
                                  out_dtype=torch.bfloat16), Flops(product8=2.0 * n**3)
        else:
            work, flops = partial(F.linear, *made), Flops(product=2.0 * n**3)
        row = measure(name, lambda: [work() for _ in range(times)], flops.times(times), bench.seconds,
                      note=f"{times} times")
        bench.results.add(row)
    return run
