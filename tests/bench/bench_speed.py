"""Every row of speed: forwards, training steps and videos of A14B shapes on random weights made on the device.

    python tests/bench/bench_speed.py --smoke                       # two minutes: does it run, what do kernels take
    python tests/bench/bench_speed.py --rows forward_256,moe8_256 --minutes 9 --out speed.json
    python tests/bench/bench_speed.py --markdown speed.json peers.json > tests/bench/speed_DATE.md
    python tests/bench/bench_speed.py --tiny --rows all             # the same code on a CPU in seconds

Rows are written to --out one by one; a later call goes on with those that are missing (--again measures anew).
What runs is lapwan's own forward, adapters, objectives and trainer step; one model at a time is in memory. Speed only:
random weights say nothing of quality.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import speed_smoke
from speed_ceilings import ceiling_row
from speed_measure import Results, markdown
from speed_rows import (
    Bench,
    adapted_forward_row,
    forward_row,
    mixture_against_lora,
    peer_row,
    planned_step_row,
    step_row,
    video_row,
)

from lapwan.wan.transformer.compile import compile_time

# Rows of one model follow each other; the longest come last.
ROWS: dict[str, Callable[[Bench], None]] = {
    "ceiling_bf16": ceiling_row("ceiling_bf16", "bf16"),
    "ceiling_fp8": ceiling_row("ceiling_fp8", "fp8"),
    **{(name := f"ceiling_attention_{size}{'_backward' if back else ''}"):
       ceiling_row(name, "attention backward" if back else "attention", size)
       for size in ("256", "480") for back in (False, True)},
    "moe8_256_16gib": planned_step_row("moe8_256_16gib", "mixed", "256", "≤ 0.40", mixture=True, cap=16),
    "moe8_256_12gib": planned_step_row(
        "moe8_256_12gib", "mixed", "256", "≤ 0.40, ≤ 12 GiB", mixture=True, cap=16, memory=12),
    "lora8_256_fp8": step_row("lora8_256_fp8", "mixed", "256", "≤ 0.245, ≤ 26 GiB"),
    "lora8_256_fp8_op": step_row("lora8_256_fp8_op", "mixed", "256", "", checkpointing="op"),
    "moe8_256_fp8": step_row("moe8_256_fp8", "mixed", "256", "≤ 0.245", mixture=True),
    "moe_against_lora": mixture_against_lora("moe_against_lora", "mixed", "256"),
    "lora8_480_fp8": step_row("lora8_480_fp8", "mixed", "480", "≤ 3.4"),
    "forward_256_fp8": forward_row("forward_256_fp8", "fp8", "256", "≤ 0.155"),
    "forward_256_fp8_eager": forward_row("forward_256_fp8_eager", "fp8", "256", compiled=False),
    "video_256_fp8": video_row("video_256_fp8", "fp8", "256", "≤ 13, ≤ 16 GiB", cap=16),
    "forward_480_fp8": forward_row("forward_480_fp8", "fp8", "480", "≤ 2.20"),
    "video_480_fp8_24gib": video_row("video_480_fp8_24gib", "fp8", "480", "fits 24 GiB", cap=24, steps=3),
    "video_256_fp8_streamed": video_row(
        "video_256_fp8_streamed", "fp8", "256", "≤ 1.15 × resident, ≤ 6 GiB", cap=7, memory="stream"),
    "forward_256": forward_row("forward_256", "bf16", "256", "≤ 0.235"),
    "forward_256_eager": forward_row("forward_256_eager", "bf16", "256", compiled=False),
    "forward_480": forward_row("forward_480", "bf16", "480", "≤ 2.68"),
    "lora40_256": step_row("lora40_256", "bf16", "256", "≤ 0.62", last=None),
    "lora40_256_op": step_row("lora40_256_op", "bf16", "256", "", None, "op"),
    "lora40_256_block": step_row("lora40_256_block", "bf16", "256", "≤ 0.90 in 32 GiB", None, "block"),
    "video_256": video_row("video_256", "bf16", "256", "≤ 19.5"),
    "lora40_256_32gib": planned_step_row("lora40_256_32gib", "bf16", "256", "≤ 0.90 in 32 GiB", None, cap=33),
    "lora40_480_block": step_row("lora40_480_block", "bf16", "480", "", None, "block"),
    "lora40_480": planned_step_row("lora40_480", "bf16", "480", "≤ 9.5", None),
    "lora8_256": step_row("lora8_256", "bf16", "256", "(fp8 row)"),
    "moe8_256": step_row("moe8_256", "bf16", "256", "(fp8 row)", mixture=True),
    "lora8_480": step_row("lora8_480", "bf16", "480", "(fp8 row)"),
    "forward_256_lora": adapted_forward_row("forward_256_lora", "bf16", "256"),
    "diffusers_256": peer_row("diffusers_256", "256"),
    "diffusers_480": peer_row("diffusers_480", "480"),
}
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, KeyError, ImportError)


def run_rows(names: Sequence[str], bench: Bench, minutes: float, again: bool) -> int:
    """Rows one after the other until the time is over; a failure is printed and the next row begins."""
    started, faults = time.monotonic(), 0
    for name in names:
        if name in bench.results.rows and not again:
            continue
        left = 60 * minutes - (time.monotonic() - started)
        if left < 20:
            print(f"{name}: no time left")
            continue
        begin = time.monotonic()
        try:
            ROWS[name](bench)
        except FAULTS:
            faults += 1
            print(f"{name} FAILED\n{traceback.format_exc(limit=-6)}", flush=True)
            bench.drop()
        taken = time.monotonic() - begin
        print(f"    {name}: {taken:.0f} s in all, compiling so far {compile_time()[0]:.0f} s", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help=f"comma-separated, of {', '.join(ROWS)}")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--seconds", type=float, default=4, help="of repeats a row")
    parser.add_argument("--out", type=Path, default=Path("speed.json"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--markdown", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.markdown:
        results = [Results(path) for path in args.markdown]
        print(markdown(results, "python tests/bench/bench_speed.py --rows all"), end="")
        return
    device = torch.device(args.device)
    if args.smoke:
        speed_smoke.run(device, args.tiny)
        return
    names = list(ROWS) if args.rows == "all" else args.rows.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}")
    bench = Bench(Results(args.out), device, args.tiny, 0.5 if args.tiny else args.seconds)
    if faults := run_rows(names, bench, args.minutes, args.again):
        sys.exit(f"{faults} rows failed")


if __name__ == "__main__":
    main()
