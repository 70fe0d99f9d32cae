"""How fast a device is: measured once a process, in a few hundredths of a second, on products of a common size."""

from __future__ import annotations

import time
from functools import cache

import torch

from lapwan.memory.plan import Rates
from lapwan.wan.quantise.linears import fp8_in_hardware
from lapwan.wan.transformer import kernels

_SIZE = {"cuda": 6144, "cpu": 384}
_COPY = 64 << 20  # bytes
# Against the rate of plain products, as measured on an H200: fused attention, fp8 with its inputs' rounding.
_ATTENTION, _FP8 = 0.72, 1.6
# A product alone runs faster than one among norms, activations and rotations: of a whole block's time, this is product.
_SHARE = 0.8


def _seconds(run: object, device: torch.device, repeats: int) -> float:
    assert callable(run)
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


@cache
def rates_of(device: torch.device, dtype: torch.dtype) -> Rates:
    """A device's rates in `dtype`."""
    kernels.prepare(device)  # a plan is of what will run
    size = _SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = _SHARE * 2.0 * size**3 / _seconds(lambda: a @ a, device, 5)
    if device.type != "cuda":
        return Rates(product, product, product, 5e9)
    host = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(_COPY, dtype=torch.uint8, device=device)
    bus = _COPY / _seconds(lambda: there.copy_(host, non_blocking=True), device, 5)
    return Rates(product, product * (_FP8 if fp8_in_hardware(device) else 1.0), product * _ATTENTION / _SHARE, bus)
