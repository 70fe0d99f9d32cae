"""Which options of the compiler make a block fastest: all in turn on the same block, so that heat falls on all.

    python tests/bench/speed_variants.py [--tiny] [--choose FILE]

`--choose` writes the environment that makes torch compile as the fastest variant was compiled, if it won by 1 %.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from speed_measure import seconds_of
from speed_model import A14B, LATENTS, SMALL, lora_trainer, mixture_trainer, random_model, spoken, step
from speed_smoke import FAULTS, show

from lapwan.wan.backbone import WanBackbone
from lapwan.wan.transformer.block import block_forward, eager_block
from lapwan.wan.transformer.compile import compiled_block

MULTI, DESCENT = {"triton.multi_kernel": 1}, {"coordinate_descent_tuning": True}
# Options of the compiler, and whether the fused block takes part.
OPTIONS: dict[str, tuple[dict[str, object], bool]] = {
    "plain": ({}, False), "kernels": ({}, True), "multi": (MULTI, False), "multi_kernels": (MULTI, True),
    "descent_kernels": (DESCENT, True),
}


Variants = dict[str, Callable[..., torch.Tensor]]


def variants(tiny: bool) -> Variants:
    """Compiled functions by name; on a CPU the plain function under each name."""
    if not tiny:
        compiled_block()  # sets the cache and the limits
    made = {}
    for name, (options, fused) in OPTIONS.items():
        function = block_forward if fused else eager_block
        made[name] = function if tiny else torch.compile(
            function, dynamic=False, fullgraph=True, options=options or None)
    return made


def in_turn(
    title: str, model: WanBackbone, made: Variants, work: Callable[[], object], rounds: int = 8,
    repeats: int = 3,
) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for name, block in made.items():
        model.options.block = block
        start = time.monotonic()
        try:
            work()
            work()
        except FAULTS:
            print(f"   {name} FAILED {traceback.format_exc(limit=-3)[-1500:]}", flush=True)
            continue
        times[name] = []
        print(f"   {title} {name}: first calls {time.monotonic() - start:.1f} s", flush=True)
    for _ in range(rounds):
        for name, own in times.items():
            model.options.block = made[name]
            work()
            own += [seconds_of(work) for _ in range(repeats)]
    base = statistics.median(times.get("plain", [1.0]))
    for name, own in times.items():
        middle = statistics.median(own)
        print(f"   {title} {name}: {1e3 * middle:.2f} ms [{1e3 * min(own):.2f}, {1e3 * max(own):.2f}], "
              f"{100 * (middle / base - 1):+.1f} %", flush=True)
    return {name: statistics.median(own) for name, own in times.items()}


ENVIRONMENT = {
    "multi_kernels": "TORCHINDUCTOR_MULTI_KERNEL=1", "descent_kernels": "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1",
}


def choice(found: list[dict[str, float]]) -> str:
    """The environment of the variant that wins over all kinds of work that it was tried on; empty: none by 1 %."""
    gains = {}
    for name in ENVIRONMENT:
        both = [one for one in found if name in one and "kernels" in one]
        gains[name] = sum(one[name] / one["kernels"] for one in both) / len(both) if both else 1.0
    best = min(gains, key=gains.__getitem__)
    print(f"against plain compilation with our kernels: {gains}")
    return ENVIRONMENT[best] if gains[best] < 0.99 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--choose", type=Path)
    args = parser.parse_args()
    tiny, found = args.tiny, []
    device = torch.device("cpu" if tiny else "cuda")
    size, blocks = ("small", 4) if tiny else ("256", 8)
    made = variants(tiny)
    for kind in ("bf16", "fp8"):
        config = {**(SMALL if tiny else A14B), "num_layers": blocks}
        model = random_model(device, config, range(blocks) if kind == "fp8" else ())
        work = partial(torch.no_grad()(model.velocity), *spoken(model, size))
        found.append(in_turn(f"{kind} forward {LATENTS[size]}", model, made, work))
        if not tiny:
            for name in ("kernels", "multi_kernels"):
                model.options.block = made[name]
                show(f"{kind} forward {name}", work, 14)
        if kind == "bf16":
            for title, make in (("lora", lora_trainer), ("moe", mixture_trainer)):
                trainer, adapted = make(model, size, 4)
                own = {name: made[name] for name in ("plain", "kernels", "multi_kernels")}
                found.append(in_turn(f"{title} step", model, own, partial(step, trainer), rounds=5))
                adapted.off()
        del model
        if not tiny:
            torch.cuda.empty_cache()
    if args.choose:
        args.choose.write_text(choice(found) + "\n")


if __name__ == "__main__":
    main()
