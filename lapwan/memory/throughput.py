"""A device's throughput, measured once per process in a few hundredths of a second on matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from lapwan.memory.plan import Throughput
from lapwan.wan.quantise.linears import fp8_in_hardware
from lapwan.wan.transformer import kernels

_SIZE = {"cuda": 6144, "cpu": 384}
_COPY_BYTES = 64 << 20
# Relative to plain matrix products, measured on an H200: fused attention, and fp8 with the rounding of its inputs.
_ATTENTION, _FP8 = 0.72, 1.6
# Of a block's time, this share is matrix products; the rest is norms, activations and rotary embeddings.
_MATMUL_SHARE = 0.8


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops a second of square matrix products, at once."""
    size = _SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: a @ a, device, 5)


@cache
def measure_throughput(device: torch.device, dtype: torch.dtype) -> Throughput:
    """A device's throughput in `dtype`."""
    kernels.TRITON.try_on(device)  # so that plans are made for the kernels that will run
    matmul = _MATMUL_SHARE * product_rate(device, dtype)
    if device.type != "cuda":
        return Throughput(matmul, matmul, matmul, 5e9)
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    bus = _COPY_BYTES / _seconds(lambda: target.copy_(host, non_blocking=True), device, 5)
    fp8 = matmul * (_FP8 if fp8_in_hardware(device) else 1.0)
    return Throughput(matmul, fp8, matmul * _ATTENTION / _MATMUL_SHARE, bus)
