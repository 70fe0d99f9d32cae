"""Train and measure the second judge of the embedded model (`lapwan.tiny.evaluators.JUDGE_FILE`).

`python -m examples.pretrain --work DIR --stage judge`: scenes of one and of two instruments, empty scenes (the drawing
without its instruments), each as rendered and as the VAE keeps it; unclear ones are samples of one or two steps of the
embedded pair, and latents with noise or of two scenes at once, decoded. The networks it reads are those in DIR/weights,
else the shipped ones. Seeds of the clips that train, calibrate and test lie apart, and apart from all others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.pretrain import store
from examples.pretrain.corpus import FRAMES, random_scene
from examples.pretrain.diffusion import Models, TokenTable
from examples.pretrain.sampling import decode_frames, sample_videos
from examples.pretrain.settings import RECIPES, SEED, JudgeSettings
from examples.pretrain.vae_forward import moments
from lapwan import console
from lapwan.distributed import worker_pool
from lapwan.evaluation.judge_figures import JudgeAnswers, answers, fit_temperatures, judge_figures
from lapwan.evaluation.judge_file import JudgeMetadata, rounded, write_judge
from lapwan.evaluation.judge_net import INSTRUMENT, NONE
from lapwan.evaluation.judge_training import (
    JudgeClips,
    JudgeTraining,
    destroyed_clips,
    joined,
    train_judge_net,
    unclear_clips,
)
from lapwan.tiny.captions import caption_for
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.model import WEIGHTS
from lapwan.tiny.scenes import SceneSpec, render
from lapwan.wan.vae import normalise

_NEUTRAL = 0.2  # of the scenes: what the base draws of captions that it answers with its neutral look
_EVERY = 2  # frames that are kept
_TINY = RECIPES["tiny"]
_FIRST_SEED = {"train": 2**34, "calibrate": 2**35, "test": 2**36}
_KINDS = ("one", "two", "empty")
_BATCH = 32  # clips, of the VAE


def judge_scene(purpose: str, kind: str, index: int) -> SceneSpec:
    """The index-th scene of a purpose and kind; of kind `empty` the drawing leaves its instruments out."""
    seed = _FIRST_SEED[purpose] + _KINDS.index(kind) * 2**30 + index
    rng = np.random.default_rng(seed)
    spec = random_scene(rng, seed, "neutral" if rng.uniform() < _NEUTRAL else "surgical", held_out_pairs=True)
    if kind != "two":
        return spec
    return replace(spec, second=str(rng.choice([name for name in INSTRUMENTS if name != spec.instrument])))


def _rendered(work: tuple[str, str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames [T, H, W, 3] of all FRAMES, families [K], tips [T, K, 2]."""
    spec = judge_scene(*work)
    scene = render(spec, with_instrument=work[1] != "empty")
    families = np.zeros(len(INSTRUMENTS), np.float32)
    tips = np.full((FRAMES, len(INSTRUMENTS), 2), np.nan, np.float32)
    if work[1] != "empty":
        for name, points in ((spec.instrument, scene.tips), (spec.second, scene.second_tips)):
            if name is not None:
                families[INSTRUMENTS.index(name)] = 1
                tips[:, INSTRUMENTS.index(name)] = points
    return scene.frames_THWC, families, tips


def _render(purpose: str, counts: dict[str, int], pool: Any) -> JudgeClips:
    """Clips with all their frames."""
    work = [(purpose, kind, index) for kind, count in counts.items() for index in range(count)]
    frames, families, tips = zip(*pool.map(_rendered, work, chunksize=8), strict=True)
    state = np.array([[NONE if kind == "empty" else INSTRUMENT] * FRAMES for _, kind, _ in work])
    return JudgeClips(np.stack(frames), state, np.stack(families), np.stack(tips))


def _thinned(clips: JudgeClips) -> JudgeClips:
    return JudgeClips(clips.frames_NTHWC[:, ::_EVERY], clips.state_NT[:, ::_EVERY], clips.families_NK,
                      clips.tips_NTK2[:, ::_EVERY])


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))


@dataclass(frozen=True)
class Makers:
    """The embedded model, for what the VAE keeps and for unclear samples."""

    vae: Any
    models: Models
    device: torch.device

    @torch.no_grad()
    def latents(self, frames_NTHWC: np.ndarray) -> torch.Tensor:
        parts = []
        for rows in _batches(len(frames_NTHWC)):
            pixels = torch.from_numpy(frames_NTHWC[rows]).to(self.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            parts.append(normalise(self.vae, moments(self.vae, pixels)[0]))
        return torch.cat(parts)

    def reconstructed(self, clips: JudgeClips) -> JudgeClips:
        """The clips as the VAE keeps them."""
        frames = np.empty_like(clips.frames_NTHWC)
        for rows in _batches(len(clips)):
            frames[rows] = decode_frames(self.vae, self.latents(clips.frames_NTHWC[rows]))
        return replace(clips, frames_NTHWC=frames)

    def early(self, purpose: str, count: int) -> JudgeClips:
        """Samples of one step, and of two steps without guidance: with it some are already clear."""
        parts = []
        for at, rows in enumerate(_batches(count)):
            specs = [judge_scene(purpose, "one", i) for i in range(rows.start, rows.stop)]
            captions = [caption_for(spec, np.random.default_rng(spec.seed), 0.2) for spec in specs]
            steps, guidance = ((1, 1.0), (1, 3.5), (2, 1.0))[at % 3]
            parts.append(sample_videos(self.models, self.vae, captions, None, steps, 5.0, guidance,
                                       _FIRST_SEED[purpose] % 1_000_003 + at))
        return unclear_clips(np.concatenate(parts), len(INSTRUMENTS))

    def broken_latents(self, clips: JudgeClips, count: int, seed: int) -> JudgeClips:
        """Decoded latents: half of them with noise at a sigma of 0.6 to 1, half the mean of two scenes."""
        generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        parts = []
        for rows in _batches(count):
            size = rows.stop - rows.start
            a, b = (self.latents(clips.frames_NTHWC[rng.integers(len(clips), size=size)]) for _ in range(2))
            sigma = (0.6 + 0.4 * torch.rand((size, 1, 1, 1, 1), generator=generator)).to(self.device)
            noise = torch.randn(a.shape, generator=generator).to(self.device)
            half = (torch.arange(size, device=self.device) % 2 == 0)[:, None, None, None, None]
            parts.append(decode_frames(self.vae, torch.where(half, (1 - sigma) * a + sigma * noise, (a + b) / 2)))
        return unclear_clips(np.concatenate(parts), len(INSTRUMENTS))


def train_judge(
    settings: JudgeSettings, weights: Path, out: Path, figures: Path, device: torch.device, processes: int
) -> dict[str, Any]:
    """Render, train, calibrate, measure and write `out`; its figures."""
    started = time.monotonic()

    def log(text: str) -> None:
        console.log(f"judge: {text}, {time.monotonic() - started:.0f} s")

    folder = weights if (weights / "vae.safetensors").is_file() else WEIGHTS
    makers = Makers(store.load_vae(_TINY.parts, folder, device),
                    store.load_models(_TINY, folder, TokenTable().size, device), device)
    pool = worker_pool(processes)
    one, two, empty = settings.one, settings.two, settings.empty
    scenes = _render("train", {"one": one, "two": two, "empty": empty}, pool)
    log(f"{len(scenes)} clips to train on rendered")
    shown = scenes.part(range(one + two))
    parts = [scenes, makers.reconstructed(scenes), makers.early("train", settings.early),
             makers.broken_latents(shown, settings.broken, SEED)]
    clips = joined([_thinned(part) for part in parts])
    del parts, scenes
    log(f"{len(clips)} clips with reconstructions and unclear ones")
    training = JudgeTraining(settings.steps, settings.batch, settings.lr, seed=SEED)
    every = max(1, settings.steps // 8)
    net = rounded(train_judge_net(clips, training, device, lambda step, loss: log(f"step {step} loss {loss:.4f}")
                                  if step % every == 0 and np.isfinite(loss) else None))
    log("trained")
    tests = HeldOutClips(makers, pool, settings.tests)
    temperatures = fit_temperatures(answers(net, joined(list(tests.sets("calibrate").values()))))
    test = {name: answers(net, part) for name, part in tests.sets("test").items()}
    pool.shutdown()
    everything = _joined(list(test.values()))
    shown_sets = {name: judged for name, judged in test.items() if name.startswith(("source", "reconstructed"))}
    result = judge_figures(shown_sets, everything, temperatures, INSTRUMENTS)
    for name in ("empty", "destroyed"):
        judged = test[name]
        result[f"as_instrument_{name}"] = float(np.mean([r.state == INSTRUMENT for r in judged.readings(temperatures)]))
        result[f"as_hook_{name}"] = float(np.mean([INSTRUMENTS.index("hook") in r.seen
                                                    for r in judged.readings(temperatures)]))
    result["states_by_set"] = {name: [float(np.mean([r.state == s for r in judged.readings(temperatures)]))
                                      for s in range(3)] for name, judged in test.items()}
    metadata = JudgeMetadata(
        families=list(INSTRUMENTS), names=list(INSTRUMENTS), taxonomy="scenes",
        canvas=(_TINY.size, _TINY.size), tip="points",
        temperatures=(temperatures.state, temperatures.families), figures=result,
        recipe={name: getattr(settings, name) for name in vars(settings)})
    write_judge(out, net.cpu(), metadata)
    store.write_json(figures / "judge.json", {"temperatures": metadata.temperatures, **result})
    log(f"temperatures {metadata.temperatures}; {result}")
    return result


def _joined(judged: list[JudgeAnswers]) -> JudgeAnswers:
    return JudgeAnswers([video for part in judged for video in part.videos], joined([part.clips for part in judged]))


@dataclass(frozen=True)
class HeldOutClips:
    """Clips that the training has not seen, by what they are."""

    makers: Makers
    pool: Any
    count: int

    def sets(self, purpose: str) -> dict[str, JudgeClips]:
        """`count` clips of each kind."""
        n, rendered = self.count, {}
        for kind in _KINDS:
            rendered[kind] = _render(purpose, {kind: n}, self.pool)
        made = {"source": rendered["one"], "source_two": rendered["two"],
                "reconstructed": self.makers.reconstructed(rendered["one"]),
                "reconstructed_two": self.makers.reconstructed(rendered["two"]),
                "empty": rendered["empty"], "empty_reconstructed": self.makers.reconstructed(rendered["empty"]),
                "early": self.makers.early(purpose, n),
                "broken_latents": self.makers.broken_latents(rendered["one"], n, _FIRST_SEED[purpose] % 1_000_003)}
        sets = {name: _thinned(clips) for name, clips in made.items()}
        sets["destroyed"] = destroyed_clips(sets["source"], _FIRST_SEED[purpose] % 1_000_007)
        return sets

