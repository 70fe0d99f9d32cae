"""How many clips a judge of one's own needs, and whether it orders adapters as the embedded judge does.

    python tests/bench/bench_judge.py --work DIR [--clips 32,64,128,256] [--steps 1500] [--prompts 128] [--tests 300]

For each number of clips: scenes as MP4 with captions and boxes, `label`, `cache` and `train-judge`, nothing else of the
renderer. Each judge then sees fresh scenes, their reconstructions, empty scenes (the drawing without its instrument)
and destroyed ones, none of which it knows; and the videos of three arms on the same prompts: the base, a plain LoRA,
and one LoRA an instrument picked by name. Writes DIR/judge_curve.json. About 5 minutes on a GPU with 10 cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.pretrain import store
from examples.pretrain.diffusion import TokenTable
from examples.pretrain.headroom import FineTuningClips, try_fine_tuning
from examples.pretrain.judge import HeldOutClips, Makers
from examples.pretrain.reports import typical_scenes
from examples.pretrain.sampling import sample_videos
from lapwan.commands.table import COMMANDS
from lapwan.distributed import worker_pool
from lapwan.evaluation.bootstrap import bootstrap, paired_bootstrap
from lapwan.evaluation.clips import EvaluationClip
from lapwan.evaluation.judge_file import read_judge
from lapwan.evaluation.judge_net import STATES
from lapwan.evaluation.video_judge import VideoJudge
from lapwan.files import write_text
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.tiny.captions import caption_for
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.evaluators import EmbeddedJudge, SceneJudge, load_evaluator
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.model import WEIGHTS
from lapwan.tiny.scenes import SceneSpec

SIZE, FRAMES = (96, 96), 17
SAMPLING = {"steps": 12, "shift": 5.0, "guidance": 3.5, "boundary": 0.875}
FAMILIES = ("scissors", "hook", "suction", "other")  # of taxonomy surgical4, in the order of INSTRUMENTS


def call(command: str, **options: Any) -> None:
    row = next(c for c in COMMANDS if c.name == command)
    values = {key.replace("__", "."): value for key, value in options.items()}
    row.run(load(row.settings_model(), options=values, environment={}), RunOptions(overwrite=True, lock=False))


def make_judge(work: Path, clips: int, steps: int, workers: int) -> Path:
    """A judge from `clips` scenes, by the commands that a user types."""
    folder = work / f"clips_{clips}"
    listed = write_dataset(folder, clips, 500 + clips, SIZE, FRAMES, workers=workers)
    call("label", clips=str(listed), output=str(folder / "labels.jsonl"))
    call("cache", dataset=str(folder / "labels.jsonl"), model="tiny-t2v", output=str(folder / "cache"),
         size="96x96", num_frames=str(FRAMES))
    judge = work / f"judge_{clips}.safetensors"
    call("train-judge", cache=str(folder / "cache"), output=str(judge), steps=str(steps), model="tiny-t2v")
    return judge


def truth(spec: SceneSpec, index: int) -> EvaluationClip:
    """The clip that a prompt stands for, labelled for both kinds of judges."""
    number = INSTRUMENTS.index(spec.instrument)
    return EvaluationClip(str(index), "", tuple(float(k == number) for k in range(4)), instrument=spec.instrument,
                          synthetic=True)


def arms(makers: Makers, prompts: list[SceneSpec], steps: int, count: int) -> dict[str, np.ndarray]:
    """Videos of the base, of a plain LoRA, and of one LoRA an instrument, on the same prompts."""
    captions = [caption_for(spec, np.random.default_rng(10_000 + i)) for i, spec in enumerate(prompts)]
    videos = {"base": sample_videos(makers.models, makers.vae, captions, None, seed=7, **SAMPLING)}
    clips = FineTuningClips(count, makers.vae, makers.models, makers.device)
    for name, groups, lr in (("stage 1", 1, 3e-3), ("one LoRA an instrument", len(INSTRUMENTS), 3e-3)):
        _, videos[name] = try_fine_tuning(makers.models, makers.vae, clips, load_evaluator(), groups, 2, lr, 4,
                                          (steps,), prompts, SAMPLING)
    return videos


def on_arms(judge: Any, videos: dict[str, np.ndarray], prompts: list[SceneSpec]) -> dict[str, Any]:
    """Identity of each arm with its interval, the shares of other verdicts, and the paired differences in order."""
    rows: dict[str, Any] = {}
    scores = {}
    for name, made in videos.items():
        found = [judge.score("identity", frames, truth(spec, i))
                 for i, (frames, spec) in enumerate(zip(made, prompts, strict=True))]
        scores[name] = np.array([row["identity"] for row in found])
        rows[name] = bootstrap(scores[name]).as_json()
        rows[name] |= {key: float(np.mean([row[key] for row in found])) for key in found[0] if key != "identity"}
    names = list(videos)
    for a, b in zip(names[1:], names, strict=False):
        rows[f"{a} - {b}"] = paired_bootstrap(scores[a], scores[b]).as_json()
    return rows


def on_fresh(judge: VideoJudge, sets: dict[str, Any]) -> dict[str, Any]:
    """What a judge says of scenes that no judge was trained on."""
    rows: dict[str, Any] = {}
    for name, clips in sets.items():
        readings = [judge.read(frames) for frames in clips.frames_NTHWC]
        row = {state: float(np.mean([reading.state == k for reading in readings])) for k, state in enumerate(STATES)}
        if clips.families_NK.any():
            row["identity"] = float(np.mean([reading.shows(np.flatnonzero(families > 0.5).tolist()) for
                                             reading, families in zip(readings, clips.families_NK, strict=True)]))
        rows[name] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", default="32,64,128,256")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tests", type=int, default=300)
    parser.add_argument("--lora-steps", type=int, default=160)
    parser.add_argument("--lora-clips", type=int, default=160)
    parser.add_argument("--workers", type=int, default=max(1, min(16, (os.cpu_count() or 2) - 1)))
    arguments = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makers = Makers(store.load_vae(WEIGHTS, device), store.load_models(WEIGHTS, TokenTable().size, device), device)
    prompts = typical_scenes(arguments.prompts, 99)
    videos = arms(makers, prompts, arguments.lora_steps, arguments.lora_clips)
    print(f"arms: {time.monotonic() - started:.0f} s", flush=True)
    pool = worker_pool(arguments.workers)
    sets = HeldOutClips(makers, pool, arguments.tests).sets("test")
    pool.shutdown()
    print(f"fresh scenes: {time.monotonic() - started:.0f} s", flush=True)
    result: dict[str, Any] = {"tests": arguments.tests, "prompts": arguments.prompts, "steps": arguments.steps,
                              "arms": {"first judge": on_arms(SceneJudge(), videos, prompts)}, "fresh": {}, "own": {}}
    result["arms"]["embedded judge"] = on_arms(EmbeddedJudge(), videos, prompts)
    for clips in map(int, arguments.clips.split(",")):
        begun = time.monotonic()
        file = read_judge(make_judge(arguments.work, clips, arguments.steps, arguments.workers))
        judge = VideoJudge(file)
        result["own"][str(clips)] = {"seconds": time.monotonic() - begun, **file.metadata.figures}
        result["fresh"][str(clips)] = on_fresh(judge, sets)
        result["arms"][f"{clips} clips"] = on_arms(judge, videos, prompts)
        print(f"{clips} clips: {time.monotonic() - started:.0f} s; {json.dumps(result['fresh'][str(clips)])}; "
              f"{json.dumps(result['arms'][f'{clips} clips'])}", flush=True)
        write_text(arguments.work / "judge_curve.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["arms"], indent=1))


if __name__ == "__main__":
    main()
