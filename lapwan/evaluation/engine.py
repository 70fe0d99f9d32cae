"""Generate for every clip and seed with one arm, and score: the same noise whatever the arm.

    seed of a video = sha256(seed, "evaluate", clip id, index)

Shapes: P clips (prompts), S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lapwan import console, rng
from lapwan.evaluation.arms import Arm
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.metrics import Made, Scorer, names_of
from lapwan.evaluation.store import VideoStore
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.batch import BatchGenerator
from lapwan.sampling.generator import to_frames
from lapwan.sampling.request import OFFICIAL_NEGATIVE_PROMPT, Request, check_request, complete_guidance
from lapwan.sampling.sigma_grid import SamplerName
from lapwan.sampling.start_image import clip_tensor
from lapwan.wan.vae import decode, encode

Scores = Mapping[str, np.ndarray]  # [P, S] by metric, NaN where it has no value


@dataclass(frozen=True)
class Sampling:
    """How every video is made; `seeds` videos a clip, `batch_size` of them at a time."""

    shape: VideoShape
    steps: int
    guidance: Mapping[NoiseExpert, float]
    seeds: int = 1
    seed: int = 0
    batch_size: int = 8
    negative_prompt: str = OFFICIAL_NEGATIVE_PROMPT
    flow_shift: float | None = None
    sampler: SamplerName = "unipc"
    guidance_interval: tuple[float, float] = (0.0, 1.0)


def default_sampling(spec: ModelSpec, seeds: int = 1, seed: int = 0, batch_size: int = 8) -> Sampling:
    """The model's own size, length, steps and guidance."""
    own = spec.defaults
    return Sampling(
        VideoShape(own.num_frames, own.size, own.fps), own.steps, complete_guidance(spec, None), seeds, seed, batch_size
    )


def request_for(spec: ModelSpec, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int) -> Request:
    """The video of a clip and seed; an image-to-video model starts from the clip's first frame.

    Raises:
        UserError: what the model cannot make, or a clip without the video that the first frame comes from.
    """
    shape = sampling.shape
    request = Request(
        prompt=clip.prompt, num_frames=shape.frames, size=shape.size, steps=sampling.steps, guidance=sampling.guidance,
        fps=shape.fps, negative_prompt=sampling.negative_prompt,
        image=clip.first_frame(shape) if spec.task == "i2v" else None, flow_shift=sampling.flow_shift,
        sampler=sampling.sampler, seed=rng.seed_of(sampling.seed, "evaluate", clip.id, index),
        hint=arm.hint_for(clip), alpha_base=arm.alpha_base, alpha_expert=arm.alpha_expert,
        guidance_interval=sampling.guidance_interval,
    )
    check_request(spec, request)
    return request


def generate_and_score(
    generator: BatchGenerator, arm: Arm, clips: Sequence[EvaluationClip], sampling: Sampling, scorers: Sequence[Scorer],
    store: VideoStore | None = None, advance: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Every metric of every clip and seed with one arm.

    Args:
        generator: on the arm's model (`BatchGenerator(arm.base, arm.adapters, device, dtype)`); it takes the arm's
            adapters here and keeps what is loaded.
        store: keeps videos and scores, and gives back those it has.
        advance: told how many videos are done.
    """
    generator.use(arm.base, arm.adapters)
    names = names_of(scorers)
    found = {name: np.full((len(clips), sampling.seeds), np.nan) for name in names}
    places = [(p, s) for s in range(sampling.seeds) for p in range(len(clips))]
    # Batches are cut from the whole list, so that one that goes on after a kill makes the same ones, bit for bit.
    for start in range(0, len(places), sampling.batch_size):
        part = places[start : start + sampling.batch_size]
        kept = [None if store is None else store.find(arm, clips[p], sampling, s, names) for p, s in part]
        done = [scores for scores in kept if scores is not None]
        if len(done) < len(part):
            done = _make(generator, arm, [(clips[p], s) for p, s in part], sampling, scorers, store)
        for place, scores in zip(part, done, strict=True):
            for name in names:
                found[name][place] = scores[name]
        advance(len(part))
    return found


def _make(
    generator: BatchGenerator, arm: Arm, wanted: Sequence[tuple[EvaluationClip, int]], sampling: Sampling,
    scorers: Sequence[Scorer], store: VideoStore | None,
) -> list[dict[str, float]]:
    """One batch of videos, scored and kept."""
    requests = [request_for(generator.spec, arm, clip, sampling, index) for clip, index in wanted]
    made = []
    for (clip, index), frames in zip(wanted, generator.generate_batch(requests), strict=True):
        made.append(score(frames, clip, sampling.shape, scorers))
        if store is not None:
            store.keep(arm, clip, sampling, index, frames, made[-1])
    return made


def score(frames: np.ndarray, clip: EvaluationClip, shape: VideoShape, scorers: Sequence[Scorer]) -> dict[str, float]:
    """All metrics of one video."""
    made = Made(frames, clip, shape)
    found: dict[str, float] = {}
    for scorer in scorers:
        found |= scorer.score(made)
    return found


@torch.no_grad()
def ceilings(
    generator: BatchGenerator, clips: Sequence[EvaluationClip], shape: VideoShape, scorers: Sequence[Scorer],
    batch_size: int = 8,
) -> Scores:
    """The same metrics on the VAE's reconstructions of the clips themselves: what no generated video beats. [P, 1]."""
    found = {name: np.full((len(clips), 1), np.nan) for name in names_of(scorers)}
    with console.progress("reconstructions", len(clips), "clip") as bar:
        for start in range(0, len(clips), batch_size):
            part = clips[start : start + batch_size]
            pixels = torch.cat([clip_tensor(clip.frames(shape)) for clip in part]).to(generator.device)
            again = decode(generator.vae(), encode(generator.vae(), pixels))
            for row, clip in enumerate(part):
                for name, value in score(to_frames(again[row : row + 1]), clip, shape, scorers).items():
                    found[name][start + row, 0] = value
            bar.advance(len(part))
    return found
