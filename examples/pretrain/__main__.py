"""`python -m examples.pretrain --work DIR`: render, train, measure; DIR/weights then holds what is shipped.

`--stage` runs one part; each reads from DIR/weights what the parts before it left there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from examples.pretrain import reports, store
from examples.pretrain.corpus import Clips, start_rendering
from examples.pretrain.diffusion import TokenTable, train_diffusion
from examples.pretrain.evaluators import train_evaluator
from examples.pretrain.headroom import FineTuningClips, try_fine_tuning
from examples.pretrain.judge import train_judge
from examples.pretrain.settings import DiffusionSettings, EvaluatorSettings, JudgeSettings, VaeSettings, shorter
from examples.pretrain.vae import measure_latents, train_vae
from lapwan import console
from lapwan.tiny.evaluators import EVALUATOR_FILE, JUDGE_FILE, InstrumentNet

STAGES = ("vae", "evaluator", "diffusion", "samples", "headroom", "judge")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.pretrain", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips, weights, figures and sheets")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the clips and steps, for a trial run")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="that render")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    return parser.parse_args()


class _Run:
    """One run of the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work, self.scale = arguments.work, arguments.scale
        self.device, self.processes = torch.device(arguments.device), arguments.processes
        self.compiled = not arguments.no_compile
        self.weights, self.figures = self.work / "weights", self.work / "figures"
        for folder in (self.weights, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        self.evaluator = shorter(EvaluatorSettings(), self.scale)
        self.check = Clips(self.work / "clips", self.evaluator.checks, "check")

    def vae(self) -> None:
        settings = shorter(VaeSettings(), self.scale)
        clips = Clips(self.work / "clips", settings.clips, "pretraining")
        workers = start_rendering(clips, self.processes)
        vae = train_vae(clips, settings, self.device, self.compiled)
        mean, std = measure_latents(vae, clips, min(2_000, settings.clips), self.device)
        vae.register_to_config(latents_mean=mean, latents_std=std)
        store.save_vae(vae, self.weights)
        start_rendering(self.check, self.processes)
        results = reports.report_vae(vae, None, self.check, min(48, self.check.count), self.figures, self.device)
        console.log(f"autoencoder: {results}")
        for worker in workers:
            worker.terminate()

    def train_evaluator(self) -> None:
        clips = Clips(self.work / "clips", self.evaluator.clips, "identity")
        start_rendering(clips, self.processes)
        start_rendering(self.check, self.processes)
        net = train_evaluator(clips, self.evaluator, self.device)
        store.save_module(net, self.weights / EVALUATOR_FILE)
        vae = store.load_vae(self.weights, self.device)
        results = reports.report_vae(vae, self.net(), self.check, self.evaluator.checks, self.figures, self.device)
        console.log(f"autoencoder and evaluator: {results}")
        store.write_json(self.figures / "vae.json", results)

    def net(self) -> InstrumentNet:
        from safetensors.torch import load_file

        net = InstrumentNet()
        net.load_state_dict({k: v.float() for k, v in load_file(self.weights / EVALUATOR_FILE).items()})
        return net.requires_grad_(False).eval()

    def diffusion(self) -> None:
        settings = shorter(DiffusionSettings(), self.scale)
        clips = Clips(self.work / "clips", settings.clips, "pretraining")
        workers = start_rendering(clips, self.processes)
        vae = store.load_vae(self.weights, self.device)
        store.save_models(train_diffusion(clips, vae, settings, self.device, self.compiled), self.weights)
        for worker in workers:
            worker.terminate()

    def samples(self) -> None:
        vae = store.load_vae(self.weights, self.device)
        models = store.load_models(self.weights, TokenTable().size, self.device)
        start_rendering(self.check, self.processes)
        net, count = self.net(), max(8, round(128 * min(self.scale, 1.0)))
        results = {
            "t2v": reports.report_text_to_video(models, vae, net, self.figures, count, 20, 5.0, 3.5),
            "i2v": reports.report_image_to_video(models, vae, net, self.check, self.figures, count, 20, 5.0, 2.0),
        }
        console.log(f"samples: {results}")
        store.write_json(self.figures / "samples.json", results)

    def judge(self) -> None:
        settings = shorter(JudgeSettings(), self.scale)
        train_judge(settings, self.weights, self.weights / JUDGE_FILE, self.figures, self.device, self.processes)

    def headroom(self) -> None:
        vae = store.load_vae(self.weights, self.device)
        models = store.load_models(self.weights, TokenTable().size, self.device)
        clips = FineTuningClips(max(8, round(160 * min(self.scale, 1.0))), vae, models, self.device)
        prompts = reports.typical_scenes(max(8, round(96 * min(self.scale, 1.0))), 99)
        at = (40, 80, 160, 320) if self.scale >= 1 else (1, 2)
        results = {}
        for name, groups, rank, lr in (("plain", 1, 1, 1e-3), ("plain", 1, 2, 3e-3), ("chosen", 4, 2, 3e-3)):
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
    actions = {"vae": run.vae, "evaluator": run.train_evaluator, "diffusion": run.diffusion, "samples": run.samples,
               "headroom": run.headroom, "judge": run.judge}
    console.log(f"{' '.join(sys.argv[1:])}; torch {torch.__version__}, "
                f"{torch.cuda.get_device_name() if run.device.type == 'cuda' else 'cpu'}")
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        started = time.monotonic()
        actions[stage]()
        console.log(f"stage {stage}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
