"""`python -m examples.pretrain --work DIR`: render, train, measure; DIR/weights then holds what is shipped.

`--model` chooses which embedded model; `--stage` runs one part, which reads from DIR/weights what the parts before it
left there. `--minutes` trains by time in place of the settings' steps (two numbers: autoencoder and diffusion), on as
many clips as are rendered until then.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from examples.pretrain import reports, store
from examples.pretrain.corpus import Clips, Purpose, start_rendering
from examples.pretrain.diffusion import Models, Tokens, TokenTable, start_tokens, train_diffusion
from examples.pretrain.evaluators import train_evaluator
from examples.pretrain.headroom import FineTuningClips, try_fine_tuning
from examples.pretrain.judge import train_judge
from examples.pretrain.settings import RECIPES, EvaluatorSettings, JudgeSettings, shorter
from examples.pretrain.vae import measure_latents, train_vae
from lapwan import console
from lapwan.tiny.evaluators import EVALUATOR_FILE, JUDGE_FILE, InstrumentNet, load_evaluator

STAGES = RECIPES["tiny"].stages
_TRAINED = ("vae", "diffusion")  # share the time of --minutes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.pretrain", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, weights, figures and sheets")
    parser.add_argument("--model", choices=sorted(RECIPES), default="tiny")
    parser.add_argument("--stage", choices=[*STAGES, "all"], action="append", help="may be repeated; all if not given")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the clips and steps, for a trial run")
    parser.add_argument("--minutes", type=float, nargs="+",
                        help="of training, in place of the settings' steps: of both together, or of each")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in DIR/weights")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that render")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--overwrite", action="store_true", help="train anew over the weights in DIR/weights")
    given = parser.parse_args()
    if not (given.resume or given.overwrite) and (there := _would_overwrite(given)):
        parser.error(f"{given.work / 'weights'} holds {', '.join(there)}: pass --resume to go on from them, "
                     "--overwrite to train anew, or another --work (a trial run needs one of its own)")
    return given


def _would_overwrite(given: argparse.Namespace) -> list[str]:
    """Trained files that are there and that the stages write."""
    recipe, chosen = RECIPES[given.model], given.stage or ["all"]
    written = {"vae": [recipe.parts.vae_file], "evaluator": [EVALUATOR_FILE], "judge": [JUDGE_FILE],
               "diffusion": [*recipe.parts.transformer_files.values()]}
    return [name for stage, names in written.items() if stage in chosen or ("all" in chosen and stage in recipe.stages)
            for name in names if (given.work / "weights" / name).is_file()]


class _Run:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work, self.scale = arguments.work, arguments.scale
        self.device, self.processes = torch.device(arguments.device), arguments.processes
        self.compiled, self.resume = not arguments.no_compile, arguments.resume
        recipe = RECIPES[arguments.model]
        self.recipe = replace(recipe, vae=shorter(recipe.vae, self.scale),
                              diffusion=shorter(recipe.diffusion, self.scale))
        chosen = arguments.stage or ["all"]
        self.stages = recipe.stages if "all" in chosen else tuple(chosen)
        trained = [stage for stage in self.stages if stage in _TRAINED]
        minutes = arguments.minutes or []
        each = minutes if len(minutes) == len(trained) else [sum(minutes) / max(len(trained), 1)] * len(trained)
        self.seconds = {stage: 60 * length for stage, length in zip(trained, each, strict=True)} if minutes else {}
        self.weights, self.figures = self.work / "weights", self.work / "figures"
        for folder in (self.weights, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        self.evaluator = shorter(EvaluatorSettings(), self.scale)
        self.check = self.clips(self.evaluator.checks, "check")
        self.workers: list[BaseProcess] = []

    def clips(self, count: int, purpose: Purpose) -> Clips:
        """Clips of a purpose, of the model's size."""
        return Clips(self.work / "clips", count, purpose, self.recipe.size, self.recipe.fps)

    def run(self, stage: str) -> None:
        """One stage."""
        actions = {"vae": self.vae, "evaluator": self.train_evaluator, "diffusion": self.diffusion,
                   "samples": self.samples, "headroom": self.headroom, "judge": self.judge}
        actions[stage]()

    def vae(self) -> None:
        settings = self.recipe.vae
        clips = self.clips(settings.clips, "pretraining")
        self._render(clips)
        if "diffusion" in self.stages:
            self._start_tokens()
        first = store.load_vae(self.recipe.parts, self.weights, self.device) if self.resume else None
        seconds = self.seconds.get("vae")
        timed = seconds is not None
        save = partial(self._save_vae, clips, min(64, settings.first_clips)) if timed else None
        vae = train_vae(clips, self.recipe.parts, settings, self.device, self.compiled, seconds, first, save)
        self._save_vae(clips, min(256 if timed else 2_000, clips.ready()), vae)
        if "diffusion" not in self.stages or self.recipe.diffusion.clips != clips.count:
            self._end_rendering()
        net = None if "evaluator" in self.stages else self.net()
        results = reports.report_vae(vae, net, self.check, min(24 if timed else 48, self.check.count),
                                     self.figures, self.device)
        console.log(f"autoencoder: {results}")
        if net is not None:
            store.write_json(self.figures / "vae.json", results)

    def _save_vae(self, clips: Clips, number: int, vae: Any) -> None:
        """Measure the latents of the first clips, and save."""
        mean, std = measure_latents(vae, clips, number, self.device, self.recipe.vae.sampled_statistics)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        store.save_vae(vae, self.recipe.parts, self.weights)

    def _render(self, clips: Clips) -> None:
        """Render clips in the background, and beside them those of the checks."""
        if not self.workers:
            self.workers = start_rendering(clips, self.processes)
            start_rendering(self.check, 2)

    def _end_rendering(self) -> None:
        for worker in self.workers:
            worker.terminate()
        self.workers.clear()

    def _start_tokens(self) -> Tokens:
        settings = self.recipe.diffusion
        return start_tokens(self.work / "clips", "pretraining", settings.clips, settings.mirrors)

    def train_evaluator(self) -> None:
        clips = self.clips(self.evaluator.clips, "identity")
        start_rendering(clips, self.processes)
        start_rendering(self.check, self.processes)
        net = train_evaluator(clips, self.evaluator, self.device)
        store.save_module(net, self.weights / EVALUATOR_FILE)
        vae = store.load_vae(self.recipe.parts, self.weights, self.device)
        results = reports.report_vae(vae, self.net(), self.check, self.evaluator.checks, self.figures, self.device)
        console.log(f"autoencoder and evaluator: {results}")
        store.write_json(self.figures / "vae.json", results)

    def net(self) -> InstrumentNet:
        """The evaluator of this run, or the shipped one."""
        from safetensors.torch import load_file

        if not (self.weights / EVALUATOR_FILE).is_file():
            return load_evaluator()
        net = InstrumentNet()
        net.load_state_dict({k: v.float() for k, v in load_file(self.weights / EVALUATOR_FILE).items()})
        return net.requires_grad_(False).eval()

    def diffusion(self) -> None:
        clips = self.clips(self.recipe.diffusion.clips, "pretraining")
        self._render(clips)
        vae, tokens = store.load_vae(self.recipe.parts, self.weights, self.device), self._start_tokens()
        first = partial(store.fill_models, folder=self.weights) if self.resume else None
        seconds = self.seconds.get("diffusion")
        save = None if seconds is None else partial(store.save_models, folder=self.weights)
        models = train_diffusion(clips, vae, tokens, self.recipe, self.device, self.compiled, seconds, first,
                                 save)
        store.save_models(models, self.weights)
        self._end_rendering()

    def _load_models(self) -> Models:
        return store.load_models(self.recipe, self.weights, TokenTable().size, self.device)

    def samples(self) -> None:
        vae = store.load_vae(self.recipe.parts, self.weights, self.device)
        models = self._load_models()
        start_rendering(self.check, self.processes)
        net, count = self.net(), max(8, round(128 * min(self.scale, 1.0)))
        text, image = self.recipe.guidance
        results = {
            "t2v": reports.report_text_to_video(models, vae, net, self.figures, count, 20, 5.0, text),
            "i2v": reports.report_image_to_video(models, vae, net, self.check, self.figures, count, 20, 5.0, image),
        }
        console.log(f"samples: {results}")
        store.write_json(self.figures / "samples.json", results)

    def judge(self) -> None:
        settings = shorter(JudgeSettings(), self.scale)
        train_judge(settings, self.weights, self.weights / JUDGE_FILE, self.figures, self.device, self.processes)

    def headroom(self) -> None:
        vae = store.load_vae(self.recipe.parts, self.weights, self.device)
        models = self._load_models()
        clips = FineTuningClips(max(8, round(160 * min(self.scale, 1.0))), vae, models, self.device)
        prompts = reports.typical_scenes(max(8, round(96 * min(self.scale, 1.0))), 99, self.recipe.size,
                                         self.recipe.fps)
        at = (40, 80, 160, 320) if self.scale >= 1 else (1, 2)
        results = {}
        for name, groups, rank, lr in self.recipe.headroom:
            sampling = {"steps": 12, "shift": 5.0, "guidance": 3.5, "boundary": 0.875}
            key = f"{name} LoRA, rank {rank}, lr {lr:g}"
            results[key], videos = try_fine_tuning(models, vae, clips, self.net(), groups, rank, lr, 4, at, prompts,
                                                   sampling)
            store.write_sheet(list(videos[:16]), self.figures / f"headroom_{name}.png",
                              [s.instrument for s in prompts[:16]], wide=2)
            console.log(f"{key}: identity {results[key]}")
        store.write_json(self.figures / "headroom.json", results)


def main() -> None:
    """Run the stages asked for."""
    arguments = _arguments()
    run = _Run(arguments)
    torch.set_float32_matmul_precision("high")
    console.log(f"{' '.join(sys.argv[1:])}; torch {torch.__version__}, "
                f"{torch.cuda.get_device_name() if run.device.type == 'cuda' else 'cpu'}")
    for stage in run.stages:
        started = time.monotonic()
        run.run(stage)
        console.log(f"stage {stage}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
