"""Which steps, batch, lr and rank the demo's stages need: identity on held-out prompts of many small runs.

    python tests/bench/bench_demo.py --work DIR [--prompts 96] [--only NAME,NAME] [--device auto]

Prints evaluate's table and one JSON line a run. About 5 minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from lapwan.commands.table import COMMANDS
from lapwan.data.clip_file import read_clips, to_line
from lapwan.files import write_text
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.tiny.dataset import write_dataset

RANK_2 = {"targets.patterns": {"blocks.*": 2}}
# name: steps of each noise expert, batch, lr, region weight, ranks
STAGE_1: dict[str, tuple[int, int, float, float, dict[str, Any]]] = {
    "b2 s160 lr6e-3 roi": (160, 2, 6e-3, 3.0, RANK_2),
    "b2 s160 lr3e-3 roi": (160, 2, 3e-3, 3.0, RANK_2),
    "b4 s80 lr3e-3": (80, 4, 3e-3, 0.0, RANK_2),
    "b2 s160 lr1e-2 roi": (160, 2, 1e-2, 3.0, RANK_2),
    "b2 s96 lr6e-3 roi": (96, 2, 6e-3, 3.0, RANK_2),
}
STAGE_2: dict[str, tuple[str, int, int, float, dict[str, Any]]] = {
    "moe b2 s160 lr6e-3": ("b2 s160 lr6e-3 roi", 160, 2, 6e-3, RANK_2),
    "moe b2 s160 lr3e-3": ("b2 s160 lr6e-3 roi", 160, 2, 3e-3, RANK_2),
}


def call(command: str, **options: Any) -> None:
    row = next(c for c in COMMANDS if c.name == command)
    model = row.settings_model()
    row.run(load(model, options={k.replace("__", "."): v for k, v in options.items()}, environment={}),
            RunOptions(overwrite=True))


def train(work: Path, device: str, only: list[str]) -> list[dict[str, Any]]:
    adapters: list[dict[str, Any]] = [{"name": "base"}]
    common = {"data.cache": str(work / "cache"), "device": device, "dtype": "fp32", "seed": 7, "save_every": 10_000}
    for name, (steps, batch, lr, roi, extra) in STAGE_1.items():
        if only and name not in only:
            continue
        out = work / name.replace(" ", "_")
        started = time.monotonic()
        call("train-lora", **common, model="tiny", output=str(out), steps=steps, batch_size=batch, roi_weight=roi,
             **{"optimizer.lr": lr}, **extra)
        print(json.dumps({"run": name, "seconds": time.monotonic() - started}), flush=True)
        adapters.append({"name": name, "lora": [f"{e}={out}/lapwan_{e}_noise.safetensors" for e in ("high", "low")]})
    for name, (base, steps, batch, lr, extra) in STAGE_2.items():
        if only and name not in only:
            continue
        first, out = work / base.replace(" ", "_"), work / name.replace(" ", "_")
        merged = {"model": "tiny", "lora": {e: f"{first}/lapwan_{e}_noise.safetensors" for e in ("high", "low")}}
        started = time.monotonic()
        call("train-moe", **common, model=merged, output=str(out), steps=steps, batch_size=batch,
             **{"optimizer.lr": lr, "router.lr_scale": 0.5, "timestep_gate.lr_scale": 1}, **extra)
        print(json.dumps({"run": name, "seconds": time.monotonic() - started}), flush=True)
        for hint in (None, "truth"):
            adapters.append({"name": f"{name} {hint or 'router'}", "model": merged, "moe": f"{out}/lapwan.safetensors"}
                            | ({"hint": hint} if hint else {}))
    return adapters


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12, help="of sampling")
    parser.add_argument("--only", default="")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    work = given.work
    if not (work / "cache").exists():
        clips = write_dataset(work / "clips", given.clips, 7, (96, 96), 17)
        call("label", clips=str(clips), output=str(work / "labels.jsonl"))
        call("cache", dataset=str(work / "labels.jsonl"), model="tiny", output=str(work / "cache"), device=given.device)
        others = write_dataset(work / "held_out", 2 * given.prompts, 1007, (96, 96), 17, test_share=1.0)
        seen = {clip.caption for clip in read_clips(clips)}
        unseen = [clip.data for clip in read_clips(others) if clip.caption not in seen][: given.prompts]
        write_text(others, "".join(to_line(data) for data in unseen))
    adapters = train(work, given.device, [name for name in given.only.split(",") if name])
    batch = 8 if given.device == "cpu" else 96
    call("evaluate", model="tiny", adapters=adapters, output=str(work / "evaluation"), device=given.device,
         dtype="fp32", videos__ceiling=False, routing__probe=False,
         videos__clips=str(work / "held_out" / "clips.jsonl"), videos__batch_size=batch,
         videos__steps=given.steps, videos__metrics=["identity"])


if __name__ == "__main__":
    main()
