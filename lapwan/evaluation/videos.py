"""Generate, score and keep a video for every clip and seed with one arm; the noise is the same for every arm.

    seed of a video = sha256(seed, "evaluate", clip id, index)

Shapes: P clips (prompts), S seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel

from lapwan import __version__, console, files, rng
from lapwan.checkpoints.fingerprints import json_fingerprint
from lapwan.documents import Number, checked, read_json
from lapwan.errors import UserError
from lapwan.evaluation.arms import Arm
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.metrics import GeneratedVideo, Scorer, metric_names
from lapwan.models.spec import ModelSpec
from lapwan.names import NEGATIVE_PROMPT, NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, check_request, complete_guidance
from lapwan.sampling.scheduler import SamplerName
from lapwan.sampling.start_image import clip_tensor
from lapwan.sampling.video import FINE_CRF, write_video
from lapwan.wan.vae import decode, encode, to_frames

Scores = Mapping[str, np.ndarray]  # [P, S] by metric; NaN where it has no value


@dataclass(frozen=True)
class Sampling:
    """Sampling settings shared by all videos: `seeds` videos per clip, `batch_size` of them at a time.

    `from_image`: a video begins with the clip's first frame, where the model does not require it. `last_image`: it gets
    the clip's last frame, too.
    """

    shape: VideoShape
    steps: int
    guidance: Mapping[NoiseExpert, float]
    seeds: int = 1
    seed: int = 0
    batch_size: int = 8
    from_image: bool = False
    negative_prompt: str = NEGATIVE_PROMPT
    flow_shift: float | None = None
    sampler: SamplerName = "unipc"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    last_image: bool = False


def default_sampling(spec: ModelSpec, seeds: int = 1, seed: int = 0, batch_size: int = 8) -> Sampling:
    """The model's default size, length, steps and guidance."""
    defaults = spec.defaults
    shape = VideoShape(defaults.num_frames, defaults.size, defaults.fps)
    return Sampling(shape, defaults.steps, complete_guidance(spec, None), seeds, seed, batch_size)


def request_for(spec: ModelSpec, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int) -> Request:
    """The request for the video of a clip and seed; from an image, it starts from the clip's first frame.

    Raises:
        UserError: a shape or setting that the model does not support, or a clip without a video for its first frame.
    """
    shape = sampling.shape
    request = Request(
        prompt=clip.prompt, num_frames=shape.frames, size=shape.size, steps=sampling.steps, guidance=sampling.guidance,
        fps=shape.fps, negative_prompt=sampling.negative_prompt,
        image=clip.first_frame(shape) if spec.requires_image or sampling.from_image else None,
        last_image=clip.last_frame(shape) if sampling.last_image else None, flow_shift=sampling.flow_shift,
        sampler=sampling.sampler, seed=rng.seed_of(sampling.seed, "evaluate", clip.id, index),
        hint=arm.hint_for(clip), alpha_base=arm.alpha_base, alpha_expert=arm.alpha_expert,
        guidance_interval=sampling.guidance_interval,
    )
    check_request(spec, request)
    return request


def video_path(folder: Path, arm: str, clip: str, index: int) -> Path:
    """Path of the video of an arm's name, a clip's id and a seed in the folder of an evaluation's videos."""
    name = f"{_file_name(Path(clip).stem)[:40]}_{hashlib.sha256(clip.encode()).hexdigest()[:8]}_{index}.mp4"
    return folder / _file_name(arm) / name


class VideoRecord(BaseModel):
    """What is read of a finished video's JSON."""

    key: str
    scores: dict[str, Number | None]


class VideoStore:
    """Finished videos with their scores, so that an interrupted evaluation continues where it stopped.

    `videos/ARM/NAME_SEED.mp4`, and `NAME_SEED.json` written after it with a hash of everything that the video depends
    on: a video counts only with its JSON, and only if that hash is the same now.

    Args:
        depends_on: what else the pixels or scores depend on: the machine's kind, the precision, the rewards' weights.
    """

    def __init__(self, folder: Path, *depends_on: str) -> None:
        self.folder, self._depends_on = folder, depends_on

    def path(self, arm: Arm, clip: EvaluationClip, index: int) -> Path:
        """Path of the video of a clip and seed."""
        return video_path(self.folder, arm.name, clip.id, index)

    def folder_of(self, arm: Arm) -> Path:
        """Folder of an arm's videos."""
        return self.folder / _file_name(arm.name)

    def load(
        self, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int, names: Sequence[str]
    ) -> dict[str, float] | None:
        """The scores of a finished video, if nothing that it depends on has changed and it has all of `names`."""
        path = self.path(arm, clip, index)
        file = path.with_suffix(".json")
        try:
            record = checked(read_json(file), VideoRecord, file)
        except UserError:
            return None  # not there, or not complete: the video is made again
        if record.key != self._key(arm, clip, sampling, index) or not path.is_file():
            return None
        if any(name not in record.scores for name in names):
            return None
        scores = ((name, record.scores[name]) for name in names)
        return {name: math.nan if value is None else value for name, value in scores}

    def save(
        self, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int, frames: np.ndarray,
        scores: Mapping[str, float],
    ) -> None:
        """Write the video, then its scores."""
        path = self.path(arm, clip, index)
        path.with_suffix(".json").unlink(missing_ok=True)
        write_video(path, frames, sampling.shape.fps, {"prompt": clip.prompt}, FINE_CRF)
        record = {"key": self._key(arm, clip, sampling, index), "clip": clip.id, "prompt": clip.prompt, "seed": index,
                  "scores": {name: None if math.isnan(value) else value for name, value in scores.items()}}
        files.write_text(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False) + "\n")

    def _key(self, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int) -> str:
        shape = sampling.shape
        guidance = sorted((e.value, scale) for e, scale in sampling.guidance.items())
        inputs = [
            __version__, arm.fingerprint, clip.id, clip.prompt, clip.weights, clip.instrument, _reference(clip), index,
            shape.frames, shape.size, shape.fps, sampling.steps, guidance,
            sampling.seed, sampling.negative_prompt, sampling.flow_shift, sampling.sampler, sampling.guidance_interval,
            *(["from image"] if sampling.from_image else []), *(["last image"] if sampling.last_image else []),
            *self._depends_on,
        ]
        return json_fingerprint(inputs)


def _reference(clip: EvaluationClip) -> list[object]:
    """Identity of the reference video and mask by size and modification time, with the clip's tips and boxes."""
    stats = [path.stat() for path in (clip.video, clip.mask) if path is not None]
    tips = None if clip.tips_T2 is None else clip.tips_T2.tolist()
    return [[[stat.st_size, stat.st_mtime_ns] for stat in stats], tips, list(clip.roi)]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name) or "_"


def generate_and_score(
    generator: Generator, arm: Arm, clips: Sequence[EvaluationClip], sampling: Sampling, scorers: Sequence[Scorer],
    store: VideoStore | None = None, advance: Callable[..., None] = lambda done, **figures: None,
) -> Scores:
    """Every metric of every clip and seed with one arm.

    Args:
        generator: on the arm's model (`Generator(arm.base, arm.adapters, device, dtype)`); this call sets the
            arm's adapters and keeps the loaded weights.
        store: keeps videos and scores; its finished videos are not generated again.
        advance: called with the number of videos that were finished, as a progress bar's `advance`; with 0 and the
            step of sampling after each step.
    """
    generator.use(arm.base, arm.adapters)
    names = metric_names(scorers)
    scores = {name: np.full((len(clips), sampling.seeds), np.nan) for name in names}
    cells = [(p, s) for s in range(sampling.seeds) for p in range(len(clips))]
    # Batches are cut from the whole list, so a resumed evaluation makes the same batches, and the same videos bitwise.
    for start in range(0, len(cells), sampling.batch_size):
        part = cells[start : start + sampling.batch_size]
        stored = [None if store is None else store.load(arm, clips[p], sampling, s, names) for p, s in part]
        batch_scores = [video_scores for video_scores in stored if video_scores is not None]
        if len(batch_scores) < len(part):
            batch_scores = _score_batch(
                generator, arm, [(clips[p], s) for p, s in part], sampling, scorers, store, advance)
        else:
            advance(len(part))
        for cell, video_scores in zip(part, batch_scores, strict=True):
            for name in names:
                scores[name][cell] = video_scores[name]
    return scores


def _score_batch(
    generator: Generator, arm: Arm, batch: Sequence[tuple[EvaluationClip, int]], sampling: Sampling,
    scorers: Sequence[Scorer], store: VideoStore | None, advance: Callable[..., None],
) -> list[dict[str, float]]:
    """Generate one batch of videos, score them, and keep them in the store."""
    def on_step(done: int, steps: int) -> None:
        advance(0, sampling=f"{done}/{steps}")

    requests = [request_for(generator.spec, arm, clip, sampling, index) for clip, index in batch]
    scores = []
    for (clip, index), frames in zip(batch, generator.generate_batch(requests, on_step), strict=True):
        scores.append(score(frames, clip, sampling.shape, scorers))
        if store is not None:
            store.save(arm, clip, sampling, index, frames, scores[-1])
        advance(1)
    return scores


def score(frames: np.ndarray, clip: EvaluationClip, shape: VideoShape, scorers: Sequence[Scorer]) -> dict[str, float]:
    """All metrics of one video."""
    video = GeneratedVideo(frames, clip, shape)
    scores: dict[str, float] = {}
    for scorer in scorers:
        scores |= scorer.score(video)
    return scores


@torch.no_grad()
def ceilings(
    generator: Generator, clips: Sequence[EvaluationClip], shape: VideoShape, scorers: Sequence[Scorer],
    batch_size: int = 8,
) -> Scores:
    """The same metrics on the VAE's reconstructions of the clips, [P, 1]: an upper bound for generated videos."""
    scores = {name: np.full((len(clips), 1), np.nan) for name in metric_names(scorers)}
    with console.progress("reconstructions", len(clips), "clip") as bar:
        for start in range(0, len(clips), batch_size):
            part = clips[start : start + batch_size]
            pixels = torch.cat([clip_tensor(clip.frames(shape)) for clip in part]).to(generator.device)
            reconstructed = decode(generator.vae(), encode(generator.vae(), pixels))
            for row, clip in enumerate(part):
                for name, value in score(to_frames(reconstructed[row : row + 1]), clip, shape, scorers).items():
                    scores[name][start + row, 0] = value
            bar.advance(len(part))
    return scores
