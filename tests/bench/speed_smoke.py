"""Two minutes on a new machine: does everything run, what do kernels take, which variant is faster."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from speed_measure import forward_flops, machine, seconds_of, step_flops
from speed_model import (
    A14B,
    LATENTS,
    SMALL,
    lora_trainer,
    mixture_trainer,
    random_model,
    spoken,
    step,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lapwan.wan.transformer.compile import compile_time

FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, KeyError, ImportError)
BLOCKS = 8


def median(work: Callable[[], object], repeats: int = 10, warm: int = 3) -> float:
    for _ in range(warm):
        work()
    return statistics.median(seconds_of(work) for _ in range(repeats))


def show(title: str, work: Callable[[], object], rows: int = 24) -> None:
    """The kernels of one call, by time, and how much of the wall clock they fill."""
    work()
    wall = seconds_of(work)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        seconds_of(work)
    kernels = [e for e in seen.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels)
    launches = sum(e.count for e in kernels)
    print(f"\n-- {title}: wall {1e3 * wall:.2f} ms, kernels {total / 1e3:.2f} ms, {launches} launches")
    for event in kernels[:rows]:
        print(f"   {event.self_device_time_total / 1e3:8.3f} ms {event.count:5d}x  {event.key[:110]}")


def products(device: torch.device) -> None:
    def product(n: int, i: int, o: int) -> None:
        x = torch.randn(n, i, device=device, dtype=torch.bfloat16)
        w, b = torch.randn(o, i, device=device, dtype=torch.bfloat16), torch.randn(o, device=device).bfloat16()
        taken = median(lambda: F.linear(x, w, b))
        print(f"   linear {n}x{i} -> {o}: {1e3 * taken:.3f} ms, {2 * n * i * o / taken / 1e12:.0f} TFLOP/s")

    for shape in ((8192, 8192, 8192), (5376, 5120, 5120), (5376, 5120, 15360), (5376, 5120, 13824), (5376, 13824, 5120),
                  (32760, 5120, 5120), (32760, 5120, 13824), (32760, 13824, 5120)):
        product(*shape)
    x = torch.randn(5376, 5120, device=device, dtype=torch.bfloat16)
    w, b = torch.randn(13824, 5120, device=device, dtype=torch.bfloat16), torch.randn(13824, device=device).bfloat16()
    gelu = torch.compile(lambda: F.gelu(F.linear(x, w, b), approximate="tanh"))
    print(f"   linear + gelu compiled {1e3 * median(gelu):.3f} ms, epilogue "
          f"{1e3 * median(lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True)):.3f} ms")
    for n in (5376, 32760):
        q, k, v = (torch.randn(1, n, 40, 128, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        told = []
        for backend in (None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend) if backend else torch.no_grad():
                taken = median(partial(F.scaled_dot_product_attention, q, k, v), 5)
            told.append(f"{backend.name if backend else 'default'} {1e3 * taken:.3f} ms "
                        f"{4 * n * n * 5120 / taken / 1e12:.0f} TFLOP/s")
        print(f"   attention {n}: " + ", ".join(told))
    a, b8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    ones_a, ones_b = torch.ones(5376, 1, device=device), torch.ones(1, 13824, device=device)
    taken = median(lambda: torch._scaled_mm(a, b8.t(), scale_a=ones_a, scale_b=ones_b, out_dtype=torch.bfloat16,
                                            use_fast_accum=True))
    rate = 2 * 5376 * 5120 * 13824 / taken / 1e12
    print(f"   fp8 rowwise 5376x5120 -> 13824: {1e3 * taken:.3f} ms, {rate:.0f} TFLOP/s")


def forwards(device: torch.device, tiny: bool, fp8: bool) -> None:
    config = {**(SMALL if tiny else A14B), "num_layers": BLOCKS}
    model = random_model(device, config, range(BLOCKS) if fp8 else ())
    for size in ("small",) if tiny else ("256", "480"):
        given = spoken(model, size)
        work = partial(torch.no_grad()(model.velocity), *given)
        tokens = LATENTS[size][0] * LATENTS[size][1] * LATENTS[size][2] // 4
        flops, outs = forward_flops(model.transformer, tokens), {}
        for mode in ("eager", "compiled"):
            if tiny and mode == "compiled":
                continue
            model.compile(mode == "compiled")
            before = compile_time()[0]
            outs[mode] = work()
            taken = median(work, 5)
            print(f"   {'fp8' if fp8 else 'bf16'} {size} {mode}: {1e3 * taken / BLOCKS:.3f} ms a block, x40 = "
                  f"{40 * taken / BLOCKS:.3f} s, {flops.total / taken / 1e12:.0f} TFLOP/s, compiled in "
                  f"{compile_time()[0] - before:.1f} s, output std {float(outs[mode].std()):.3f}")
        if len(outs) == 2:
            error = (outs["compiled"] - outs["eager"]).norm() / outs["eager"].norm()
            print(f"   compiled against eager: {float(error):.2e}")
        if size != "480" and device.type == "cuda":
            show(f"{'fp8' if fp8 else 'bf16'} {size} forward of {BLOCKS} blocks, compiled", work)
            if not fp8:
                model.compile(False)
                show("the same, eager", work, 14)


def steps(device: torch.device, tiny: bool) -> None:
    config = {**(SMALL if tiny else A14B), "num_layers": BLOCKS}
    model = random_model(device, config)
    size = "small" if tiny else "256"
    tokens = LATENTS[size][0] * LATENTS[size][1] * LATENTS[size][2] // 4
    for title, make in (("lora", lora_trainer), ("moe", mixture_trainer)):
        trainer, adapted = make(model, size, 4)
        for mode in ("eager", "compiled"):
            if tiny and mode == "compiled":
                continue
            model.compile(mode == "compiled")
            for kind in ("off", "op", "block"):
                model.checkpoint(kind)
                before = compile_time()[0]
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                taken = median(lambda trainer=trainer: step(trainer), 5)
                peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
                rate = step_flops(model.transformer, tokens, 4).total / taken
                print(f"   {title} step, 4 of {BLOCKS} blocks, {mode}, checkpointing {kind}: {1e3 * taken:.1f} ms, "
                      f"{rate / 1e12:.0f} TFLOP/s, peak {peak:.1f} GiB, compiled in "
                      f"{compile_time()[0] - before:.1f} s")
            model.checkpoint("off")
            if device.type == "cuda" and (mode == "compiled" or title == "moe"):
                show(f"{title} step {mode}", lambda trainer=trainer: step(trainer), 30)
        adapted.off()


def run(device: torch.device, tiny: bool) -> None:
    print(machine())
    parts: dict[str, Callable[[], None]] = {
        "forward bf16": lambda: forwards(device, tiny, False), "steps": lambda: steps(device, tiny),
        "forward fp8": lambda: forwards(device, tiny, True),
    }
    if device.type == "cuda":
        parts = {"products": lambda: products(device), **parts}
    for title, part in parts.items():
        start = time.monotonic()
        print(f"\n== {title}", flush=True)
        try:
            part()
        except FAULTS:
            print(traceback.format_exc(limit=-8))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"== {title}: {time.monotonic() - start:.0f} s", flush=True)
