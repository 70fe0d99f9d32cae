"""Figures and sheets of trained parts: how the VAE keeps the heads, what the pair draws, how it follows an image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.pretrain.corpus import MARKER, Clips
from examples.pretrain.diffusion import Models
from examples.pretrain.evaluators import measure_evaluator
from examples.pretrain.sampling import sample_videos
from examples.pretrain.store import write_sheet
from examples.pretrain.vae import quality, to_pixels
from lapwan.tiny.captions import caption_for
from lapwan.tiny.evaluators import InstrumentNet, evaluate_identity, locate_tip, tip_hits
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.motion import MOTIONS
from lapwan.tiny.scenes import SceneSpec, sample_spec


def report_vae(
    vae: Any, net: InstrumentNet | None, clips: Clips, number: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """PSNR, and what the evaluator sees in fresh scenes and in their reconstructions (the ceiling)."""
    clips.wait(number)
    figures, reconstruction = quality(vae, clips, number, device)
    report: dict[str, Any] = dict(figures)
    truth = np.asarray(clips.frames[:number])
    if net is not None:
        report["rendered"] = measure_evaluator(net, clips, truth)
        report["reconstructed"] = measure_evaluator(net, clips, reconstruction)
    pairs = [x for i in range(min(12, number)) for x in (truth[i], reconstruction[i])]
    write_sheet(pairs, folder / "vae.png", columns=5, wide=2)
    return report


def typical_scenes(count: int, seed: int, size: int, fps: float) -> list[SceneSpec]:
    """Scenes as surgeons make them, instruments in turn: the prompts of fine-tuning, not of pretraining."""
    rng = np.random.default_rng(seed)
    return [sample_spec(rng, INSTRUMENTS[i % len(INSTRUMENTS)], size=(size, size), fps=fps)
            for i in range(count)]


def measure_identity(videos: np.ndarray, specs: list[SceneSpec], net: InstrumentNet) -> tuple[float, np.ndarray]:
    """Share of videos in which the named instrument is seen, and the confusion (rows: named)."""
    confusion = np.zeros((len(INSTRUMENTS), len(INSTRUMENTS)), int)
    for video, spec in zip(videos, specs, strict=True):
        confusion[INSTRUMENTS.index(spec.instrument), int(evaluate_identity(video, net).argmax())] += 1
    return float(np.trace(confusion) / confusion.sum()), confusion


def report_text_to_video(
    models: Models, vae: Any, net: InstrumentNet, folder: Path, count: int, steps: int, shift: float, guidance: float,
    name: str = "t2v"
) -> dict[str, Any]:
    """Videos of typical captions with and without the marker: identity of each, and a sheet."""
    specs = typical_scenes(count, 5, models.recipe.size, models.recipe.fps)
    captions = [caption_for(spec, np.random.default_rng(i), english=0.0) for i, spec in enumerate(specs)]
    plain = sample_videos(models, vae, captions, None, steps, shift, guidance, 1)
    marked = sample_videos(models, vae, [MARKER[0] + text for text in captions], None, steps, shift, guidance, 2)
    titles = [f"{s.instrument} {s.side} {s.motion} {s.direction} {s.target}" for s in specs]
    rows = [*titles[:16], *("box: " + title for title in titles[:16])]
    write_sheet([*plain[:16], *marked[:16]], folder / f"{name}.png", rows, columns=6, wide=2)
    share, confusion = measure_identity(plain, specs, net)
    return {"identity": share, "confusion": confusion.tolist(),
            "identity_marked": measure_identity(marked, specs, net)[0]}


def report_image_to_video(
    models: Models, vae: Any, net: InstrumentNet, clips: Clips, folder: Path, count: int, steps: int, shift: float,
    guidance: float
) -> dict[str, Any]:
    """First frames of fresh scenes with captions that name the motion: how often the tip goes where it should."""
    specs = [clips.spec(i) for i in range(count)]
    clips.wait(count)
    captions = [caption_for(replace(spec, style="neutral"), np.random.default_rng(i), 0.0)
                for i, spec in enumerate(specs)]
    first = to_pixels(torch.from_numpy(np.asarray(clips.frames[:count, :1])))[:, :, 0]
    videos = sample_videos(models, vae, captions, first, steps, shift, guidance, 3)
    hits: dict[str, list[bool]] = {motion: [] for motion in MOTIONS}
    still = []
    for index, (video, spec) in enumerate(zip(videos, specs, strict=True)):
        hit_T = tip_hits(locate_tip(video, net), clips.tips[index], spec.size)
        hits[str(spec.motion)] += hit_T.tolist()
        rest = np.repeat(clips.tips[index][:1], len(video), axis=0)
        still += tip_hits(rest, clips.tips[index], spec.size).tolist()
    pairs = [x for i in range(min(12, count)) for x in (np.asarray(clips.frames[i]), videos[i])]
    titles = [f"{w} {specs[i].instrument} {specs[i].motion} {specs[i].direction}" for i in range(min(12, count))
              for w in ("true", "made")]
    write_sheet(pairs, folder / "i2v.png", titles, columns=6, wide=2)
    every = [hit for motion_hits in hits.values() for hit in motion_hits]
    share, _ = measure_identity(videos, specs, net)
    return {"tip_accuracy": float(np.mean(every)), "tip_accuracy_if_still": float(np.mean(still)), "identity": share,
            "by_motion": {motion: float(np.mean(motion_hits)) for motion, motion_hits in hits.items() if motion_hits}}
