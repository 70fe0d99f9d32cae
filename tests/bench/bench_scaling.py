"""What a second process adds: one process alone, then all of them together, in turn on one model a process.

    torchrun --nproc-per-node 2 tests/bench/bench_scaling.py --out scaling.json
    torchrun --nproc-per-node 2 tests/bench/bench_scaling.py --tiny        # the same code on a CPU

Steps: a batch of one a process, and lapwan's own all-reduce of one bucket; scaling = processes · alone / together.
Shared rows: the processes share one video's tokens; scaling = alone / together. Alone, the others wait. Medians.
Rows are written to --out one by one, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from speed_measure import machine, seconds_of
from speed_model import (
    A14B,
    SMALL,
    lora_trainer,
    mixture_trainer,
    random_model,
    share_steps,
    spoken,
    step,
)

from lapwan.train.parallel import ContextParallelProcesses, Distributed, join_processes
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.transformer.compile import compile_time
from lapwan.wan.transformer.context_parallel import ContextParallel

Row = dict[str, float]


def in_turn(ranks: Distributed, repeats: int, work: Callable[[bool], Callable[[], object]]) -> Row:
    """Medians of `work(together)`: of the first process alone, then of all."""
    medians: dict[bool, float] = {}
    for together in (False, True):
        run, times = work(together), []
        if together or ranks.first:
            for _ in range(3):
                run()
        dist.barrier()
        if together or ranks.first:
            times = [seconds_of(run) for _ in range(repeats)]
        dist.barrier()
        medians[together] = statistics.median(times) if times else 0.0
    return {"processes": ranks.count, "alone": medians[False], "together": medians[True], "repeats": repeats,
            "compile_seconds": compile_time()[0]}


def steps(mixture: bool, model: WanBackbone, ranks: Distributed, repeats: int, tiny: bool) -> Row:
    trainer, adapted = (mixture_trainer if mixture else lora_trainer)(model, *(("small", 2) if tiny else ("256", 8)))
    model.checkpoint("off")

    def work(together: bool) -> Callable[[], object]:
        share_steps(trainer, ranks if together else Distributed(), ranks.count if together else 1)
        return lambda: step(trainer)

    row = in_turn(ranks, repeats, work)
    adapted.off()
    return {**row, "scaling": ranks.count * row["alone"] / max(row["together"], 1e-9)}


def shared_steps(model: WanBackbone, ranks: Distributed, repeats: int, tiny: bool) -> Row:
    """Of one clip at 480p, recomputing blocks."""
    trainer, adapted = lora_trainer(model, *(("small", 2) if tiny else ("480", 8)))
    model.checkpoint("block")

    def work(together: bool) -> Callable[[], object]:
        share_steps(trainer, ContextParallelProcesses(ranks.rank, ranks.count) if together else Distributed())
        model.share_tokens(ContextParallel(ranks.rank, ranks.count) if together else None)
        return lambda: step(trainer)

    row = in_turn(ranks, max(3, repeats // 3), work)
    adapted.off()
    model.share_tokens(None)
    return {**row, "scaling": row["alone"] / max(row["together"], 1e-9)}


def shared(size: str, model: WanBackbone, ranks: Distributed, repeats: int, tiny: bool) -> Row:
    run = partial(torch.no_grad()(model.velocity), *spoken(model, "small" if tiny else size))

    def work(together: bool) -> Callable[[], object]:
        model.share_tokens(ContextParallel(ranks.rank, ranks.count) if together else None)
        return run

    row = in_turn(ranks, max(3, repeats // 2), work)
    model.share_tokens(None)
    return {**row, "scaling": row["alone"] / max(row["together"], 1e-9)}


ROWS: dict[str, Callable[..., Row]] = {
    "lora8_256_fp8": partial(steps, False), "moe8_256_fp8": partial(steps, True),
    "forward_480_shared": partial(shared, "480"), "lora8_480_shared": shared_steps,
    "forward_256_shared": partial(shared, "256"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("scaling.json"))
    args = parser.parse_args()
    began = time.monotonic()
    ranks, name = join_processes("cpu" if args.tiny else "auto")
    found = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if ranks.first and args.out.is_file() else {}
    wanted = ranks.from_first([row for row in args.rows.split(",") if row not in found])
    config, last = (SMALL, 2) if args.tiny else (A14B, 8)
    model = random_model(torch.device(name), config, range(int(config["num_layers"]) - last))
    model.compile(not args.tiny)
    for title in wanted:
        row = ROWS[title](model, ranks, args.steps, args.tiny)
        if ranks.first:
            found[title] = row
            args.out.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1), encoding="utf-8")
            print(f"{title}: alone {row['alone']:.4f} s, {ranks.count} processes {row['together']:.4f} s, scaling "
                  f"{row['scaling']:.3f} ({time.monotonic() - began:.0f} s in all)", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
