"""Does preference alignment raise what it should and leave the rest? On the embedded model, against a fixed criterion.

    python tests/bench/srpo_proof.py --work DIR [--device cuda] [--modes online,offline] [--seeds 1,2,3] [--parallel]

`srpo_criterion.toml` says what must hold and was there first. Settings: `tests/bench/srpo_proof.toml`; offline the same
with the clips' own latents. What is done stays in DIR (clips, caches, runs, a JSON a run), so a second call goes on;
--prepare stops once clips and caches are made. Writes DIR/srpo_proof.json and DIR/{mode}.png: base, below it aligned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from lapwan.caching.read import load_index
from lapwan.commands.srpo import plan
from lapwan.evaluation.bootstrap import bootstrap
from lapwan.losses.sigmas import Uniform
from lapwan.names import NoiseExpert
from lapwan.rewards.build import build_rewards
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.captions import caption_for
from lapwan.tiny.dataset import plan_dataset as plan_scenes
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.model import tiny_folder
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS
from lapwan.train.callbacks.validation import fixed_draws
from lapwan.train.clip_store import ClipStore
from lapwan.train.objective import SigmaRule, flow_terms
from lapwan.train.recipe import run_training
from lapwan.train.run_folder import start_folder
from lapwan.train.srpo import recipe
from lapwan.train.srpo.held_out import HeldOut
from lapwan.train.trainer import Trainer

HERE = Path(__file__).parent
SETTINGS = HERE / "srpo_proof.toml"
PROMPTS, TRAIN_CLIPS, SIGMAS, SHOWN = 400, 224, 4, 8


def prepare(work: Path, flow_clips: int) -> None:
    """Prompts, clips and their caches, each made once."""
    work.mkdir(parents=True, exist_ok=True)
    tiny_folder("t2v")  # made once, before several processes look for it
    prompts = work / "prompts.txt"
    if not prompts.is_file():
        scenes = plan_scenes(4 * PROMPTS, 7, (96, 96), 17, 16.0)
        texts = [caption_for(spec, np.random.default_rng([7, i])) for i, (spec, _) in enumerate(scenes)]
        prompts.write_text("\n".join(list(dict.fromkeys(texts))[:PROMPTS]) + "\n", encoding="utf-8")
    for name, count, seed in (("train", TRAIN_CLIPS, 21), ("flow", flow_clips, 22)):
        clips = work / f"{name}_clips" / "clips.jsonl"
        if not (work / f"{name}_cache" / "lapwan_index.jsonl").is_file():
            if not clips.is_file():
                write_dataset(clips.parent, count, seed, (96, 96), 17, test_share=0.0)
            subprocess.run([sys.executable, "-m", "lapwan", "cache", "--dataset", str(clips), "--model", "tiny", "-o",
                            str(work / f"{name}_cache"), "--size", "96x96", "--num-frames", "17", "--workers", "0"],
                           check=True)


def settings_of(work: Path, mode: str, seed: int, device: str) -> SrpoSettings:
    """The committed settings with this run's own places."""
    plain: dict[str, Any] = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))
    plain |= {"seed": seed, "output": work / f"{mode}_{seed}", "device": device, "resume": True}
    if mode == "offline":
        plain |= {"prompts": {"cache": work / "train_cache"}, "size": None,
                  "rollout": {**plain["rollout"], "offline": True}}
    else:
        plain["prompts"] = {"file": work / "prompts.txt", "features": work / "text_features.safetensors"}
    return SrpoSettings.model_validate({key: value for key, value in plain.items() if value is not None})


@torch.no_grad()
def flow_loss(trainer: Trainer, cache: Path, base: bool) -> list[float]:
    """Each held-out clip's mean flow loss over the trained noise expert's own band, with the LoRA or without."""
    [(noise_expert, one)] = trainer.objective.trained.items()
    index, device = load_index(cache), trainer.data.load_batch([0]).latents_BCTHW.device
    store, rule = ClipStore(index, index.items, device), SigmaRule(Uniform(), BANDS[noise_expert])
    losses = []
    with one.adapter.holder.scope(torch.full((1, 1), 0.0 if base else 1.0, device=device)):
        for place_clip in range(len(index.items)):
            batch, found = store.batch([place_clip]), []
            for place in range(SIGMAS):
                draws = fixed_draws(rule, batch, [(place + 0.5) / SIGMAS], (5, "proof"), place)
                found.append(float(flow_terms(one.backbone, batch, draws, 0.0, None).total_B[0]))
            losses.append(sum(found) / len(found))
    return losses


BANDS: dict[NoiseExpert, Any] = {}


def run(work: Path, mode: str, seed: int, device_name: str) -> dict[str, Any]:
    """One run and its figures; from its JSON if it is there."""
    done = work / f"{mode}_{seed}.json"
    if done.is_file():
        return json.loads(done.read_text())
    settings, device = settings_of(work, mode, seed, device_name), torch.device(device_name)
    planned = plan(settings, device)
    BANDS.update(planned.base.bands)
    start_folder(settings, overwrite=False)
    rewards = build_rewards(settings.rewards, device, EMBEDDED_REWARD_KINDS)
    started = time.monotonic()
    trainer = recipe.prepare(settings, planned.base, planned.data, rewards, planned.memory, device)
    run_training(trainer, settings)
    seconds = time.monotonic() - started
    callback = trainer.callbacks["held_out"]
    assert isinstance(callback, HeldOut)
    figures = {
        "mode": mode, "seed": seed, "updates": trainer.step, "prompts": list(planned.data.held_out),
        "base": callback.state_dict()["base"], "aligned": callback.scores(), "seconds": seconds,
        "flow_base": flow_loss(trainer, work / "flow_cache", base=True),
        "flow_aligned": flow_loss(trainer, work / "flow_cache", base=False),
        "kl_proxy": last(settings.output / "metrics.jsonl", "held_out/low/kl_proxy"),
    }
    done.write_text(json.dumps(figures, ensure_ascii=False))
    return figures


def last(metrics: Path, key: str) -> float | None:
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return next((row[key] for row in reversed(rows) if key in row), None)


def picture(work: Path, mode: str, seed: int, updates: int) -> None:
    """The last frame of the first held-out prompts: the base's above, the aligned model's below."""
    rows = []
    for step in (0, updates):
        files = [work / f"{mode}_{seed}" / "previews" / f"step_{step:06d}_{i}.mp4" for i in range(SHOWN)]
        rows.append(np.concatenate([last_frame(file) for file in files], axis=1))
    sheet = np.concatenate(rows).repeat(2, axis=0).repeat(2, axis=1)
    Image.fromarray(sheet).save(work / f"{mode}.png")


def last_frame(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return frames[-1]


def judge(runs: list[dict[str, Any]], criterion: dict[str, Any]) -> dict[str, Any]:
    """The criterion's figures over a mode's seeds, and whether it holds."""
    rise_PS = np.stack([np.subtract(r["aligned"]["margin"], r["base"]["margin"]) for r in runs], axis=1)
    assert all(r["prompts"] == runs[0]["prompts"] for r in runs) and len(rise_PS) == criterion["held_out"]
    found = bootstrap(rise_PS, crossed=True, level=criterion["level"])
    flow = [float(np.mean(r["flow_aligned"]) / np.mean(r["flow_base"]) - 1) for r in runs]
    updates = [r["updates"] for r in runs]
    kinds = {kind: [float(np.mean(r[which][kind])) for r in runs] for which, kind in
             (("aligned", "positive"), ("aligned", "negative"), ("aligned", "margin"), ("aligned", "caption"))}
    holds = found.low > 0 and max(flow) <= criterion["most_flow_rise"] and max(updates) <= criterion["most_updates"]
    return {
        "mode": runs[0]["mode"], "holds": bool(holds), "rise": found.as_json(),
        "rise_by_seed": [float(x) for x in rise_PS.mean(axis=0)],
        "base": {kind: float(np.mean(runs[0]["base"][kind])) for kind in ("margin", "caption")},
        "aligned": kinds, "flow_rise_by_seed": flow, "flow_base": float(np.mean(runs[0]["flow_base"])),
        "updates": updates, "kl_proxy": [r["kl_proxy"] for r in runs], "seconds": [r["seconds"] for r in runs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", default=None)
    parser.add_argument("--seeds", default=None)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--parallel", action="store_true", help="every run in a process of its own, all at once")
    parser.add_argument("--quiet", action="store_true", help="runs only: no picture, no summary")
    asked = parser.parse_args()
    criterion = tomllib.loads((HERE / "srpo_criterion.toml").read_text(encoding="utf-8"))
    prepare(asked.work, criterion["flow_clips"])
    if asked.prepare:
        return
    seeds = [int(s) for s in asked.seeds.split(",")] if asked.seeds else criterion["seeds"]
    modes = asked.modes.split(",") if asked.modes else criterion["modes"]
    if asked.parallel:
        own = [sys.executable, __file__, "--work", str(asked.work), "--device", asked.device]
        running = [subprocess.Popen([*own, "--modes", mode, "--seeds", str(seed), "--quiet"])
                   for mode in modes for seed in seeds]
        if max(process.wait() for process in running):
            sys.exit("a run failed; see above")
    results = []
    for mode in modes:
        runs = []
        for seed in seeds:
            runs.append(run(asked.work, mode, seed, asked.device))
            print(json.dumps(judge(runs, criterion)), flush=True)
        if asked.quiet:
            continue
        picture(asked.work, mode, seeds[0], runs[0]["updates"])
        results.append(judge(runs, criterion))
    if asked.quiet:
        return
    text = json.dumps({"criterion": criterion, "results": results}, indent=1)
    (asked.work / "srpo_proof.json").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(0 if all(one["holds"] for one in results) else 1)


if __name__ == "__main__":
    main()
