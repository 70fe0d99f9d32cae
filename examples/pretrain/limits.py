"""What holds the embedded model back: `python -m examples.pretrain.limits --work DIR`, under nine minutes on an H200.

With the shipped weights: one LoRA an instrument over rank, learning rate, batch, clips and steps; the sampler; where
between noise and picture the instrument is lost; the loss of seen and of fresh scenes. Meanwhile a second process
trains both noise experts on, and fine-tunes the result.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.pretrain import store
from examples.pretrain.arms import Arm, Arms
from examples.pretrain.corpus import CAPTIONS, Clips, Purpose, sample, start_rendering
from examples.pretrain.diffusion import Models, TokenTable, head_cells, latent_shape, start_tokens, train_diffusion
from examples.pretrain.headroom import FineTuningClips
from examples.pretrain.reports import typical_scenes
from examples.pretrain.sampling import Guided, decode_frames, encode_captions, euler, sigma_grid, unipc
from examples.pretrain.settings import RECIPES, SEED, DiffusionSettings
from examples.pretrain.vae import to_pixels
from examples.pretrain.vae_forward import moments
from lapwan import console
from lapwan.losses.flow import add_noise, velocity_target
from lapwan.names import NEGATIVE_PROMPT, NoiseExpert
from lapwan.tiny.captions import caption_for
from lapwan.tiny.evaluators import load_evaluator, tip_hits, tip_position
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.model import WEIGHTS
from lapwan.tiny.scenes import Scene, render
from lapwan.wan.vae import normalise

TINY = RECIPES["tiny"]
REFERENCE = Arm(2, 3e-3)
BEST = Arm(8, 3e-3, 16, 640, region=3.0, decay=True)
ARMS = [BEST, REFERENCE, Arm(8, 3e-3, 16), Arm(2, 3e-3, 16, 640, region=3.0, decay=True)]
# Stage 1 of `lapwan demo` and what may take its place in fewer steps and clips.
DEMO = [Arm(2, lr, batch, clips, chosen=False, region=3.0)
        for lr, batch, clips in ((3.3e-3, 2, 116), (6e-3, 2, 88), (1e-2, 4, 88))]
DEMO_AT = (48, 64, 80, 96, 144)
PARTS = ["oracles", "arms", "demo", "continued"]
AFTER = [REFERENCE, BEST]  # on the weights that were trained on
AT = (320, 640, 1280)
CONTINUED = DiffusionSettings(clips=24_000, steps=2_000, batch=512, first_clips=1_000, clips_per_step=8.0, lr=5e-4,
                              text_lr=2.5e-4, warmup=150)
_UNCLEAR = 0.9  # a video is unclear whose most likely instrument has a smaller share


def wilson(hits: int, number: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, p = 1.96, hits / number
    middle, half = p + z * z / (2 * number), z * math.sqrt(p * (1 - p) / number + z * z / (4 * number**2))
    return (middle - half) / (1 + z * z / number), (middle + half) / (1 + z * z / number)


class Judge:
    """The shipped evaluator on a device."""

    def __init__(self, device: torch.device) -> None:
        self._net, self._device = deepcopy(load_evaluator()).to(device), device

    @torch.no_grad()
    def __call__(self, videos_NTHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Share of each instrument [N, 4] from the mean of the frames' log probabilities, and the tips [N, T, 2]."""
        shares, tips = [], []
        for start in range(0, len(videos_NTHWC), 32):
            part = videos_NTHWC[start:start + 32]
            frames = torch.from_numpy(part).to(self._device).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
            names, heat_map = self._net(frames)
            by_frame = names.log_softmax(dim=1).view(*part.shape[:2], -1)
            shares.append(by_frame.mean(dim=1).softmax(dim=1).cpu())
            tips.append(tip_position(heat_map).view(*part.shape[:2], 2).cpu())
        return torch.cat(shares).numpy(), torch.cat(tips).numpy()


@dataclass
class Rows:
    """The table, printed row by row and kept as JSON."""

    path: Path
    started: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, part: str, name: str, **figures: Any) -> None:
        """Print and store a row."""
        self.rows.append({"part": part, "name": name, **figures})
        shown = ", ".join(f"{key} {value}" for key, value in figures.items() if key != "confusion")
        console.log(f"[{time.monotonic() - self.started:4.0f} s] {part} | {name} | {shown}")
        store.write_json(self.path, {"rows": self.rows})


class Bench:
    """Models, prompts and judge; what every part measures with."""

    def __init__(self, weights: Path, work: Path, seconds: float, scale: float, device: torch.device) -> None:
        self.started = time.monotonic()
        self.kept: dict[str, Tensor] = {}  # latents, for other judges
        self.work, self.seconds, self.scale, self.device = work, seconds, scale, device
        self.vae = store.load_vae(TINY.parts, WEIGHTS, device)
        self.models = store.load_models(TINY, weights, TokenTable().size, device)
        self.judge = Judge(device)
        self.specs = typical_scenes(max(8, round(128 * scale)), 99, TINY.size, TINY.fps)
        self.captions = [caption_for(spec, np.random.default_rng(10_000 + i)) for i, spec in enumerate(self.specs)]
        self.named = torch.tensor([INSTRUMENTS.index(spec.instrument) for spec in self.specs], device=device)

    def left(self) -> float:
        """Seconds to the end."""
        return self.seconds - (time.monotonic() - self.started)

    def noise(self, seed: int = 7) -> Tensor:
        """One start for every prompt, the same for all measurements."""
        shape = len(self.specs), *latent_shape(TINY)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def guided(self, models: Models, guidance: float, boundary: float = 0.875, negative: str = "",
               captions: list[str] | None = None) -> Guided:
        """The velocity for the prompts, text to video."""
        texts = captions or self.captions
        text, plain = encode_captions(models, texts), encode_captions(models, [negative] * len(texts))
        return Guided(models, text, plain, guidance, boundary)

    def figures(self, videos: np.ndarray, tips: np.ndarray | None = None) -> dict[str, Any]:
        """Identity with its interval, unclear videos, confusion (rows: named); with true tips the tip's accuracy."""
        shares, placed = self.judge(videos)
        named = self.named.cpu().numpy()
        hits = int((shares.argmax(axis=1) == named).sum())
        low, high = wilson(hits, len(named))
        confusion = np.zeros((len(INSTRUMENTS),) * 2, int)
        np.add.at(confusion, (named, shares.argmax(axis=1)), 1)
        found: dict[str, Any] = {
            "identity": f"{100 * hits / len(named):.0f} [{100 * low:.0f}, {100 * high:.0f}]", "n": len(named),
            "unclear": f"{100 * float((shares.max(axis=1) < _UNCLEAR).mean()):.0f}", "confusion": confusion.tolist()}
        if tips is not None:
            inside = [tip_hits(p, t, (TINY.size, TINY.size)) for p, t in zip(placed, tips, strict=True)]
            found["tip"] = f"{100 * float(np.concatenate(inside).mean()):.0f}"
        return found

    def usual(self, models: Models, keep: str | None = None, steps: int = 12) -> np.ndarray:
        """Videos of the prompts as the embedded model makes them; `keep` names the latents."""
        x = unipc(self.guided(models, 3.5), self.noise(), steps, 5.0)
        if keep is not None:
            self.kept[keep] = x.half().cpu()
        return decode_frames(self.vae, x)


def measure_arms(bench: Bench, rows: Rows, part: str, arms: list[Arm], clips: FineTuningClips, at: tuple[int, ...],
                 reserve: float) -> Arms:
    """Train all arms together and measure each after the numbers of steps in `at` for which there is time.

    Args:
        reserve: seconds that shall be left at the end.
    """
    trial = Arms(bench.models, clips, arms, max(at))
    trial.train(min(10, max(at)))
    started = time.monotonic()
    trial.train(min(40, max(at)))
    pace = (time.monotonic() - started) / 30
    started = time.monotonic()
    with trial.only(arms[0], bench.named) as models:
        bench.figures(bench.usual(models))
    measuring = (time.monotonic() - started) * len(arms)
    fits = [n for i, n in enumerate(at) if n * pace + (i + 1) * measuring < bench.left() - reserve] or [at[0]]
    console.log(f"{part}: {1000 * pace:.0f} ms a step of all arms, {measuring:.0f} s to measure all: {max(fits)} steps")
    trained = Arms(bench.models, clips, arms, max(fits))
    for until in fits:
        trained.train(until)
        for arm in arms:
            with trained.only(arm, bench.named) as models:
                rows.add(part, str(arm), steps=f"{until} of {max(fits)}", **bench.figures(bench.usual(models)))
    return trained


def measure_samplers(bench: Bench, rows: Rows, trained: Arms, arm: Arm) -> None:
    """One arm by guidance, steps, shift, solver, negative prompt, and by noise experts that have the LoRA."""

    def row(name: str, models: Models, sigmas: list[float], guidance: float = 3.5, **more: Any) -> None:
        if bench.left() > 25:
            x = euler(bench.guided(models, guidance, **more), bench.noise(), sigmas)
            rows.add("sampling", f"{arm}: {name}", **bench.figures(decode_frames(bench.vae, x)))

    usual = sigma_grid(12, 5.0)
    with trained.only(arm, bench.named) as models:
        for guidance in (1.0, 2.0, 3.5, 5.0):
            row(f"Euler, 12 steps, shift 5, guidance {guidance:g}", models, usual, guidance)
        for steps in (6, 8, 20, 40):
            if bench.left() > 25:
                rows.add("sampling", f"{arm}: UniPC, {steps} steps", **bench.figures(bench.usual(models, steps=steps)))
        for steps, shift in ((12, 3.0), (40, 5.0), (40, 3.0), (80, 5.0)):
            row(f"Euler, {steps} steps, shift {shift:g}", models, sigma_grid(steps, shift))
        row("Euler, 40 steps, guidance 2", models, sigma_grid(40, 5.0), 2.0)
        row("Euler, 12 steps, boundary 0.9", models, usual, boundary=0.9)
        row("Euler, 12 steps, the official negative prompt", models, usual, negative=NEGATIVE_PROMPT)
    for noise_expert in NoiseExpert:
        with trained.only(arm, bench.named, (noise_expert,)) as models:
            row(f"Euler, 12 steps, LoRA on the {noise_expert.value} noise expert alone", models, usual)


@torch.no_grad()
def measure_oracles(bench: Bench, rows: Rows, scenes: list[Scene]) -> None:
    """The base from true latents at a sigma: what it keeps of the instrument that is there."""
    frames = np.stack([scene.frames_THWC for scene in scenes])
    tips = np.stack([scene.tips for scene in scenes])
    x0 = torch.cat([normalise(bench.vae, moments(bench.vae, to_pixels(part.to(bench.device)))[0])
                    for part in torch.split(torch.from_numpy(frames), 32)])
    rows.add("oracle", "rendered", **bench.figures(frames, tips))
    rows.add("oracle", "VAE reconstruction", **bench.figures(decode_frames(bench.vae, x0), tips))
    for sigma in (0.3, 0.5, 0.7, 0.8, 0.875, 0.9, 0.95, 0.98, 0.99):
        start = add_noise(x0, bench.noise(), torch.full((len(x0),), sigma, device=bench.device))
        sigmas = [sigma, *(s for s in sigma_grid(30, 5.0) if s < sigma - 0.002)]
        boundary = 0.875 if sigma > 0.875 else 2.0
        asked = [(3.5, bench.captions, "its caption"), (1.0, [""] * len(x0), "no caption")]
        for guidance, captions, name in asked[: 2 if sigma in (0.5, 0.7, 0.875) else 1]:
            x = euler(bench.guided(bench.models, guidance, boundary, captions=captions), start, sigmas)
            rows.add("oracle", f"from the true latents at sigma {sigma:g}, {name}",
                     **bench.figures(decode_frames(bench.vae, x), tips))


@torch.no_grad()
def measure_losses(bench: Bench, rows: Rows, part: str, seen: list[Scene], fresh: list[Scene], captions: dict[str, Any]
                   ) -> None:
    """Flow loss of scenes that pretraining had and of others, over all cells and in the head's, at fixed sigmas."""
    for name, scenes in (("seen", seen), ("fresh", fresh)):
        frames = torch.from_numpy(np.stack([scene.frames_THWC for scene in scenes]))
        x0 = torch.cat([normalise(bench.vae, moments(bench.vae, to_pixels(part.to(bench.device)))[0])
                        for part in torch.split(frames, 32)])
        boxes = torch.from_numpy(np.stack([scene.boxes for scene in scenes])).float()
        head = head_cells(boxes, *x0.shape[3:]).to(bench.device)
        text = encode_captions(bench.models, captions[name])
        extra = x0.new_zeros(len(x0), 20, *x0.shape[2:])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3)).to(bench.device)
        figures = {}
        for sigma in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99):
            backbone = bench.models.noise_experts[NoiseExpert.HIGH if sigma >= 0.875 else NoiseExpert.LOW]
            at = torch.full((len(x0),), sigma, device=bench.device)
            error = (backbone.velocity(add_noise(x0, noise, at), 1000 * at, text, extra)
                     - velocity_target(x0, noise)).square().mean(dim=1)
            figures[f"sigma {sigma:g}"] = f"{float(error.mean()):.4f}/{float((error * head).sum() / head.sum()):.4f}"
        rows.add(part, f"{name} scenes: flow loss, all/head", **figures)


def _scenes(purpose: Purpose, number: int) -> tuple[list[Any], list[str]]:
    drawn = [sample(i, purpose) for i in range(number)]
    return [s.spec for s in drawn], [s.captions[i % CAPTIONS] for i, s in enumerate(drawn)]


def _sheet(bench: Bench, trained: Arms, arm: Arm, path: Path) -> None:
    """The first 20 prompts: base and arm beside each other."""
    base = bench.usual(bench.models, "base")
    with trained.only(arm, bench.named) as models:
        made = bench.usual(models, "best arm")
    pairs = [video for i in range(min(20, len(made))) for video in (base[i], made[i])]
    titles = [f"{w} {bench.specs[i].instrument} {bench.specs[i].motion} {bench.specs[i].target}"
              for i in range(min(20, len(made))) for w in ("base", "LoRA")]
    store.write_sheet(pairs, path, titles, columns=4, wide=4)


def run_shipped(given: argparse.Namespace) -> None:
    """What was asked for about the shipped weights."""
    device, scale, parts = torch.device(given.device), given.scale, set(given.parts)
    prompts = typical_scenes(max(8, round(128 * scale)), 99, TINY.size, TINY.fps) if "oracles" in parts else []
    seen_specs, seen_captions = _scenes("pretraining", max(4, round(256 * scale)) * ("oracles" in parts))
    fresh_specs, fresh_captions = _scenes("continued", len(seen_specs))
    arms, demo = ([replace(arm, clips=max(4, round(arm.clips * scale))) for arm in listed] for listed in (ARMS, DEMO))
    most = max(arm.clips for arm in arms) if parts & {"arms", "demo"} else 0
    tuning = typical_scenes(most, SEED, TINY.size, TINY.fps)
    # Forked before the GPU is used: the children need no imports of their own.
    with multiprocessing.get_context("fork").Pool(min(12, os.cpu_count() or 1)) as pool:
        made = pool.map(render, [*prompts, *seen_specs, *fresh_specs, *tuning], chunksize=4)
    ends = np.cumsum([len(prompts), len(seen_specs), len(fresh_specs)]).tolist()
    bench = Bench(WEIGHTS, given.work, given.seconds - (time.monotonic() - given.started), scale, device)
    rows = Rows(given.out / "limits.json", given.started)
    rows.add("base", "no adapter", **bench.figures(bench.usual(bench.models)))
    if "oracles" in parts:
        measure_losses(bench, rows, "shipped", made[ends[0]:ends[1]], made[ends[1]:ends[2]],
                       {"seen": seen_captions, "fresh": fresh_captions})
        measure_oracles(bench, rows, made[:ends[0]])
    if tuning:
        clips = FineTuningClips(len(tuning), bench.vae, bench.models, device, made[ends[2]:])
    if "arms" in parts:
        trained = measure_arms(bench, rows, "LoRA", arms, clips, AT if scale >= 1 else (1, 2), 120.0)
        best = arms[ARMS.index(BEST)]
        _sheet(bench, trained, best, given.out / "limits.png")
        measure_samplers(bench, rows, trained, best)
        save_file(bench.kept, given.out / "limits_latents.safetensors")
    if "demo" in parts:
        measure_arms(bench, rows, "demo", demo, clips, DEMO_AT if scale >= 1 else (1,), 5.0)


def run_continued(given: argparse.Namespace) -> None:
    """Train the shipped pair on, then base and two fine-tunings of the result."""
    device, scale = torch.device(given.device), given.scale
    ends = time.monotonic() + given.seconds
    settings = CONTINUED if scale >= 1 else replace(CONTINUED, clips=64, batch=4, first_clips=16)
    arms = [replace(arm, clips=max(4, round(arm.clips * scale))) for arm in AFTER]
    with multiprocessing.get_context("fork").Pool(min(12, os.cpu_count() or 1)) as pool:
        made = pool.map(render, typical_scenes(max(arm.clips for arm in arms), SEED, TINY.size, TINY.fps), chunksize=4)
    clips = Clips(given.work / "clips", settings.clips, "continued")
    workers = start_rendering(clips, max(1, (os.cpu_count() or 2) - 4))
    vae = store.load_vae(TINY.parts, WEIGHTS, device)
    tokens = start_tokens(clips.folder, clips.purpose, clips.count, settings.mirrors)
    models = train_diffusion(clips, vae, tokens, replace(TINY, diffusion=settings), device, device.type == "cuda",
                             given.train, partial(store.fill_models, folder=WEIGHTS))
    for worker in workers:
        worker.terminate()
    folder = given.out / "continued"
    folder.mkdir(parents=True, exist_ok=True)
    store.save_models(models, folder)
    bench = Bench(folder, given.work, ends - time.monotonic(), scale, device)
    rows = Rows(given.out / "continued.json", given.started)
    rows.add("continued", "no adapter", **bench.figures(bench.usual(bench.models)))
    tuning = FineTuningClips(len(made), vae, bench.models, device, made)
    measure_arms(bench, rows, "continued", arms, tuning, AT[:3] if scale >= 1 else (1, 2), 5.0)


def main() -> None:
    """Run both parts, the second in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m examples.pretrain.limits", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for clips")
    parser.add_argument("--out", type=Path, required=True, help="folder for figures, sheet and weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, default=490.0, help="of the whole")
    parser.add_argument("--train", type=float, default=240.0, help="seconds of the continued training")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1 a trial run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    given.started = time.monotonic()
    torch.set_float32_matmul_precision("high")
    for folder in (given.work, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    other = None
    if "continued" in given.parts and len(given.parts) > 1:
        words = [sys.executable, "-m", "examples.pretrain.limits", *sys.argv[1:], "--parts", "continued"]
        other = subprocess.Popen(words)
    if given.parts == ["continued"]:
        run_continued(given)
    else:
        run_shipped(given)
    if other is not None:
        other.wait()
    console.log(json.dumps({"seconds": round(time.monotonic() - given.started)}))


if __name__ == "__main__":
    main()
