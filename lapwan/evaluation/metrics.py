"""What a generated video is judged by: one number a video and metric.

How to add a metric: a class with `names` and `score`, a line in `refusals` and a case in `make_scorers`.
Shapes: T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.evaluation import pixels
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.judge import Judge
from lapwan.models.spec import Task
from lapwan.rewards.base import Reward, score


@dataclass(frozen=True, eq=False)
class Made:
    """A video, the clip it was made for, and that clip's own frames, read when asked for."""

    frames_THWC: np.ndarray
    clip: EvaluationClip
    shape: VideoShape

    @cached_property
    def reference_THWC(self) -> np.ndarray:
        """The clip's own frames, in the same shape."""
        return self.clip.frames(self.shape)


class Scorer(Protocol):
    """`names` are its metrics; `score` gives each its value for a video, NaN where it has none."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def score(self, made: Made) -> Mapping[str, float]: ...


class Judged:
    """A judge's figures of one metric: `identity`, or `tip_accuracy`."""

    def __init__(self, judge: Judge, metric: str) -> None:
        self._judge, self._metric = judge, metric

    @property
    def names(self) -> tuple[str, ...]:
        """As the judge calls them."""
        return self._judge.figures[self._metric]

    def score(self, made: Made) -> Mapping[str, float]:
        return self._judge.score(self._metric, made.frames_THWC, made.clip)


class Reference:
    """`psnr`, `ssim` against the clip's own frames, and `roi_psnr`, `roi_ssim` inside its boxes."""

    names: tuple[str, ...] = ("psnr", "ssim", "roi_psnr", "roi_ssim")

    def score(self, made: Made) -> Mapping[str, float]:
        ours, truth = made.frames_THWC, made.reference_THWC
        structure_THW = pixels.ssim_map(ours, truth)
        found = {"psnr": pixels.psnr(ours, truth), "ssim": float(structure_THW.mean()), "roi_psnr": float("nan"),
                 "roi_ssim": float("nan")}
        region_THW = made.clip.regions(made.shape)
        if region_THW is not None:
            found["roi_psnr"] = pixels.psnr(ours, truth, region_THW)
            found["roi_ssim"] = float((structure_THW * region_THW).sum() / region_THW.sum())
        return found


class Temporal:
    """`temporal_consistency`: mean SSIM of neighbouring frames; `motion`: mean change a frame, in grey levels.

    A still picture is perfectly consistent, so the two are read together.
    """

    names: tuple[str, ...] = ("temporal_consistency", "motion")

    def score(self, made: Made) -> Mapping[str, float]:
        frames = made.frames_THWC
        if len(frames) < 2:
            return dict.fromkeys(self.names, float("nan"))
        change = np.abs(frames[1:].astype(np.float32) - frames[:-1].astype(np.float32)).mean()
        return {"temporal_consistency": float(pixels.ssim_map(frames[1:], frames[:-1]).mean()), "motion": float(change)}


def names_of(scorers: Sequence[Scorer]) -> tuple[str, ...]:
    """All metrics, in order."""
    return tuple(name for scorer in scorers for name in scorer.names)


class RewardScore:
    """`NAME_score`: mean over frames of a reward's score against the prompt (CLIP: 100·cosine with its own scale), and
    `NAME_steadiness`: mean cosine of neighbouring frames' embeddings."""

    def __init__(self, name: str, load: Callable[[], Reward], device: torch.device, frames: int = 8) -> None:
        self._name, self._load, self._device, self._frames = name, load, device, frames

    @property
    def names(self) -> tuple[str, ...]:
        """`clip_score`, `clip_steadiness`."""
        return f"{self._name}_score", f"{self._name}_steadiness"

    @cached_property
    def _reward(self) -> Reward:
        return self._load()

    @torch.no_grad()
    def score(self, made: Made) -> Mapping[str, float]:
        chosen = np.linspace(0, len(made.frames_THWC) - 1, min(self._frames, len(made.frames_THWC))).round().astype(int)
        pixels = torch.from_numpy(made.frames_THWC[chosen]).permute(0, 3, 1, 2).float().to(self._device) / 255
        told = score(self._reward, pixels, [made.clip.prompt] * len(pixels))
        return {self.names[0]: float(told.mean()), self.names[1]: _steadiness(self._reward.image(pixels))}


def _steadiness(embeddings_ND: Tensor) -> float:
    if len(embeddings_ND) < 2:
        return float("nan")
    return float((embeddings_ND[1:] * embeddings_ND[:-1]).sum(dim=1).mean())


def make_scorers(
    asked: Sequence[str] | None, clips: Sequence[EvaluationClip], task: Task, shape: VideoShape, judge: Judge | None,
    rewards: Mapping[str, Callable[[], Reward]], device: torch.device,
) -> list[Scorer]:
    """The scorers of the metrics asked for; None: all that the clips allow.

    Args:
        judge: gives `identity` and `tip`; without one they are refused.
        rewards: how to load each reward, by its label.

    Raises:
        UserError: a metric that the clips, the task or the judge do not allow.
    """
    refused = refusals(clips, task, shape, judge, rewards)
    if asked is None:
        # Against a reference only where the video starts as it does: text alone does not say how a clip looks.
        asked = [m for m, why in refused.items() if why is None and (m != "reference" or task == "i2v")]
    scorers: list[Scorer] = []
    for metric in dict.fromkeys(asked):
        if (why := refused[metric]) is not None:
            raise UserError(f"metric '{metric}': {why}")
        match metric:
            case "reference":
                scorers.append(Reference())
            case "temporal":
                scorers.append(Temporal())
            case "reward":
                scorers += [RewardScore(name, load, device) for name, load in rewards.items()]
            case _ if judge is not None:
                scorers.append(Judged(judge, metric))
    return scorers


def refusals(
    clips: Sequence[EvaluationClip], task: Task, shape: VideoShape, judge: Judge | None, rewards: Mapping[str, object]
) -> dict[str, str | None]:
    """Why each metric cannot be measured; None if it can."""
    return {
        "identity": _not_judged("identity", judge, clips, shape), "tip": _no_tip(judge, clips, task, shape),
        "reference": next((why for clip in clips if (why := clip.lacking(shape)) is not None), None),
        "temporal": None, "reward": None if rewards else "no rewards are given; set rewards, such as clip=FOLDER",
    }


def _not_judged(metric: str, judge: Judge | None, clips: Sequence[EvaluationClip], shape: VideoShape) -> str | None:
    if judge is None:
        return "it needs a judge of videos, and none is given"
    if metric not in judge.figures:
        return f"the judge does not measure it; it measures {', '.join(judge.figures)}"
    return next((why for clip in clips if (why := judge.refuses(clip)) is not None), None) or judge.refuses_shape(shape)


def _no_tip(judge: Judge | None, clips: Sequence[EvaluationClip], task: Task, shape: VideoShape) -> str | None:
    if task != "i2v":
        return "where the tip goes follows from the first frame, so it is measured on image-to-video only"
    if (why := _not_judged("tip", judge, clips, shape)) is not None:
        return why
    if any(clip.tips_T2 is None for clip in clips):
        first = next(clip for clip in clips if clip.tips_T2 is None)
        return f"clip '{first.id}' has no tip, which it needs"
    short = next((clip for clip in clips if clip.tips_T2 is not None and len(clip.tips_T2) < shape.frames), None)
    if short is not None and short.tips_T2 is not None:
        return f"clip '{short.id}' says its tip in {len(short.tips_T2)} frames, {shape.frames} are made"
    return None
