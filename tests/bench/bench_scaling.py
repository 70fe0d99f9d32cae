"""What a second process adds: steps of one process alone, then of all of them with the gradients' all-reduce.

    torchrun --nproc-per-node 2 tests/bench/bench_scaling.py --out scaling.json
    torchrun --nproc-per-node 2 tests/bench/bench_scaling.py --tiny        # the same code on a CPU

A batch of one a process, and lapwan's own all-reduce of one bucket; the model is made once a process. Rows are printed
and written one by one. Scaling = processes · median alone / median together; alone, the others wait.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from speed_measure import machine, seconds_of
from speed_model import A14B, SMALL, lora_trainer, mixture_trainer, random_model, step

from lapwan.train.ranks import Ranks, join_ranks
from lapwan.wan.compiling import compile_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    args = parser.parse_args()
    began = time.monotonic()
    ranks, name = join_ranks("cpu" if args.tiny else "auto")
    config, size, last = (SMALL, "small", 2) if args.tiny else (A14B, "256", 8)
    model = random_model(torch.device(name), config, range(int(config["num_layers"]) - last))
    compile_blocks(model, not args.tiny)
    rows: dict[str, object] = {}
    for title, make in (("lora8_256_fp8", lora_trainer), ("moe8_256_fp8", mixture_trainer)):
        trainer, adapted = make(model, size, last)
        medians = {}
        for together in (False, True):
            trainer.plan.ranks = ranks if together else Ranks()
            trainer.plan.accumulate = ranks.count if together else 1
            trainer._ahead.__init__(trainer._make_data)
            times = []
            if together or ranks.first:
                for _ in range(3):
                    step(trainer)
            dist.barrier()
            if together or ranks.first:
                times = [seconds_of(lambda trainer=trainer: step(trainer)) for _ in range(args.steps)]
            dist.barrier()
            medians[together] = statistics.median(times) if times else 0.0
        adapted.off()
        if ranks.first:
            scaling = ranks.count * medians[False] / medians[True]
            rows[title] = {
                "processes": ranks.count, "alone": medians[False], "together": medians[True], "scaling": scaling,
                "steps": args.steps,
            }
            args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
            print(f"{title}: alone {medians[False]:.4f} s, {ranks.count} processes {medians[True]:.4f} s, scaling "
                  f"{scaling:.3f} ({time.monotonic() - began:.0f} s in all)", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
