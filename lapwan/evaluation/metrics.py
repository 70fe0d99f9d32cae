"""Metrics of a generated video: PSNR, SSIM, temporal consistency, rewards, and judges of its content.

How to add a metric: a class with `names` and `score`, a line in `unavailable_metrics` and a case in `make_scorers`.
How to add a judge: a class with the members of `Judge`, given to `make_scorers` by whoever runs the evaluation, as
`lapwan.evaluation.video_judge.VideoJudge` (from the file of a trained one) and `lapwan.tiny.evaluators.EmbeddedJudge`
are. A metric that is new to all judges also needs a line in `unavailable_metrics`. Names of metrics are listed in
`METRICS` and `Metric` of lapwan/settings/evaluate.py.
Shapes: T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapwan.errors import UserError
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.report.contact_sheet import spaced_frames
from lapwan.rewards.base import Reward, score

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
PSNR_CAP = 100.0  # dB, of identical frames: a mean over videos stays finite


@dataclass(frozen=True, eq=False)
class GeneratedVideo:
    """A video, the clip it was made for, and that clip's reference frames, read on first use."""

    frames_THWC: np.ndarray
    clip: EvaluationClip
    shape: VideoShape

    @cached_property
    def reference_THWC(self) -> np.ndarray:
        """The clip's reference frames, in the same shape."""
        return self.clip.frames(self.shape)


class Scorer(Protocol):
    """`names` are its metrics; `score` returns the value of each for a video, NaN where it has none."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def score(self, video: GeneratedVideo) -> Mapping[str, float]: ...


class Judge(Protocol):
    """Reads a video and scores it against the clip that it was made for."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Its classes in the order of its outputs; "none" and "unclear" may be among them."""
        ...

    @property
    def figures(self) -> Mapping[str, tuple[str, ...]]:
        """The figures of each of its metrics: `{"identity": ("identity",), "tip": ("tip_accuracy",)}`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of its weights: stored scores of another judge are not used. "" if the weights change only with
        lapwan's version."""
        ...

    def refuses(self, clip: EvaluationClip) -> str | None:
        """Why videos made for this clip cannot be judged; None if they can."""
        ...

    def refuses_shape(self, shape: VideoShape) -> str | None:
        """Why videos of this shape cannot be judged; None if they can."""
        ...

    def refuses_tip(self, clip: EvaluationClip, shape: VideoShape) -> str | None:
        """Why the tip in videos of this clip and shape cannot be compared; None if it can. Asked for `tip` alone."""
        ...

    def score(self, metric: str, frames_THWC: np.ndarray, clip: EvaluationClip) -> Mapping[str, float]:
        """The figures of one metric for one video (uint8 RGB), NaN where it has none.

        Args:
            metric: `identity` or `tip`.
            frames_THWC: uint8 RGB.
            clip: the clip that the video was made for.
        """
        ...


@dataclass(frozen=True, eq=False)
class Seen:
    """What a judge sees in a video: the class of the highest probability with that, and the tip in every frame, x and
    y in 0..1 (None: it locates none)."""

    name: str
    share: float
    tips_T2: np.ndarray | None = None


@runtime_checkable
class DescribingJudge(Protocol):
    """A judge that also says what it sees, for the page of an evaluation."""

    def describe(self, frames_THWC: np.ndarray, clip: EvaluationClip) -> Seen:
        """What it sees in one video (uint8 RGB) made for a clip."""
        ...


class JudgeMetrics:
    """A judge's figures of one metric: such as `identity`, or `tip_accuracy`.

    Args:
        judge: reads the video.
        metric: `identity` or `tip`.
    """

    def __init__(self, judge: Judge, metric: str) -> None:
        self.judge, self._metric = judge, metric

    @property
    def names(self) -> tuple[str, ...]:
        """The judge's names of the figures."""
        return self.judge.figures[self._metric]

    def score(self, video: GeneratedVideo) -> Mapping[str, float]:
        return self.judge.score(self._metric, video.frames_THWC, video.clip)


def psnr(a_THWC: np.ndarray, b_THWC: np.ndarray, region_THW: np.ndarray | None = None) -> float:
    """10·log10(255² / MSE) in dB over all frames, at most 100.

    Args:
        a_THWC: uint8 frames.
        b_THWC: uint8 frames of the same shape.
        region_THW: weights of the pixels; None: all equal.
    """
    error_THW = np.square(a_THWC.astype(np.float64) - b_THWC.astype(np.float64)).mean(axis=-1)
    mse = float(error_THW.mean() if region_THW is None else (error_THW * region_THW).sum() / region_THW.sum())
    return PSNR_CAP if mse == 0 else min(PSNR_CAP, float(10 * np.log10(255.0**2 / mse)))


def _luma(frames_THWC: np.ndarray) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return (torch.from_numpy(np.ascontiguousarray(frames_THWC)).double() @ weights).unsqueeze(1)


def _blur(x_T1HW: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    pad = _WINDOW // 2
    x_T1HW = F.pad(x_T1HW, (pad, pad, pad, pad), mode="replicate")
    return F.conv2d(F.conv2d(x_T1HW, kernel), kernel.transpose(2, 3))


def ssim_map(a_THWC: np.ndarray, b_THWC: np.ndarray) -> np.ndarray:
    """SSIM of the luma at every pixel [T, H, W]; Gaussian window of 11 pixels, σ = 1.5, edges replicated.

        (2·μ_a·μ_b + C1)(2·σ_ab + C2) / ((μ_a² + μ_b² + C1)(σ_a² + σ_b² + C2))

    Source: Wang et al., Image quality assessment (IEEE TIP 2004).

    Args:
        a_THWC: uint8 RGB frames.
        b_THWC: uint8 RGB frames of the same shape.
    """
    a, b = _luma(a_THWC), _luma(b_THWC)
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a.square(), _blur(b * b) - mean_b.square()
    covariance = _blur(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    denominator = (mean_a.square() + mean_b.square() + _C1) * (var_a + var_b + _C2)
    ssim_THW: np.ndarray = (numerator / denominator)[:, 0].numpy()
    return ssim_THW


class ReferenceMetrics:
    """`psnr`, `ssim` against the clip's reference frames, and `roi_psnr`, `roi_ssim` inside its mask or boxes."""

    names: tuple[str, ...] = ("psnr", "ssim", "roi_psnr", "roi_ssim")

    def score(self, video: GeneratedVideo) -> Mapping[str, float]:
        frames, reference = video.frames_THWC, video.reference_THWC
        ssim_THW = ssim_map(frames, reference)
        scores = {"psnr": psnr(frames, reference), "ssim": float(ssim_THW.mean()), "roi_psnr": float("nan"),
                  "roi_ssim": float("nan")}
        region_THW = video.clip.regions(video.shape)
        if region_THW is not None:
            scores["roi_psnr"] = psnr(frames, reference, region_THW)
            scores["roi_ssim"] = float((ssim_THW * region_THW).sum() / region_THW.sum())
        return scores


class TemporalMetrics:
    """`temporal_consistency`: mean SSIM of neighbouring frames; `motion`: mean change per frame, in grey levels.

    A static video is perfectly consistent, so read the two together.
    """

    names: tuple[str, ...] = ("temporal_consistency", "motion")

    def score(self, video: GeneratedVideo) -> Mapping[str, float]:
        frames = video.frames_THWC
        if len(frames) < 2:
            return dict.fromkeys(self.names, float("nan"))
        change = np.abs(frames[1:].astype(np.float32) - frames[:-1].astype(np.float32)).mean()
        return {"temporal_consistency": float(ssim_map(frames[1:], frames[:-1]).mean()), "motion": float(change)}


def metric_names(scorers: Sequence[Scorer]) -> tuple[str, ...]:
    """All metrics, in order."""
    return tuple(name for scorer in scorers for name in scorer.names)


class RewardMetrics:
    """`NAME_score`: mean over frames of a reward's score against the prompt (CLIP: 100·cosine with its own scale), and
    `NAME_steadiness`: mean cosine of neighbouring frames' embeddings.

    Args:
        name: of the reward, in the metrics' names.
        load: makes the reward, on first use.
        device: of the pixels and the reward.
        frames: how many are scored, evenly spaced.
    """

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
    def score(self, video: GeneratedVideo) -> Mapping[str, float]:
        indices = spaced_frames(len(video.frames_THWC), self._frames)
        pixels = torch.from_numpy(video.frames_THWC[indices]).permute(0, 3, 1, 2).float().to(self._device) / 255
        scores = score(self._reward, pixels, [video.clip.prompt] * len(pixels))
        return {self.names[0]: float(scores.mean()), self.names[1]: _steadiness(self._reward.image(pixels))}


def _steadiness(embeddings_ND: Tensor) -> float:
    if len(embeddings_ND) < 2:
        return float("nan")
    return float((embeddings_ND[1:] * embeddings_ND[:-1]).sum(dim=1).mean())


def make_scorers(
    metrics: Sequence[str] | None, clips: Sequence[EvaluationClip], from_image: bool, shape: VideoShape,
    judge: Judge | None, rewards: Mapping[str, Callable[[], Reward]], device: torch.device,
) -> list[Scorer]:
    """The scorers of some metrics.

    Args:
        metrics: of identity, tip, reference, temporal and reward; None: all that the clips allow, `reference` only with
            `from_image`.
        clips: to generate.
        from_image: whether every video starts from its clip's first frame.
        shape: of the videos.
        judge: measures `identity` and `tip`; without one they are not available.
        rewards: how to load each reward, by its label.
        device: of the rewards.

    Raises:
        UserError: a metric that the clips, the model or the judge do not allow.
    """
    unavailable = unavailable_metrics(clips, from_image, shape, judge, rewards)
    if metrics is None:
        # Compare with a reference only if the video starts from its first frame: text does not determine a clip's look.
        metrics = [m for m, reason in unavailable.items() if reason is None and (m != "reference" or from_image)]
    scorers: list[Scorer] = []
    for metric in dict.fromkeys(metrics):
        if (reason := unavailable[metric]) is not None:
            raise UserError(f"metric '{metric}': {reason}")
        match metric:
            case "reference":
                scorers.append(ReferenceMetrics())
            case "temporal":
                scorers.append(TemporalMetrics())
            case "reward":
                scorers += [RewardMetrics(name, load, device) for name, load in rewards.items()]
            case _ if judge is not None:
                scorers.append(JudgeMetrics(judge, metric))
    return scorers


def unavailable_metrics(
    clips: Sequence[EvaluationClip], from_image: bool, shape: VideoShape, judge: Judge | None,
    rewards: Mapping[str, object],
) -> dict[str, str | None]:
    """Why each metric cannot be measured, by metric; None if it can.

    Args:
        clips: to generate.
        from_image: whether every video starts from its clip's first frame.
        shape: of the videos.
        judge: measures `identity` and `tip`; None: there is none.
        rewards: by name.
    """
    return {
        "identity": _not_judged("identity", judge, clips, shape), "tip": _no_tip(judge, clips, from_image, shape),
        "reference": next((error for clip in clips if (error := clip.reference_error(shape)) is not None), None),
        "temporal": None, "reward": None if rewards else "no rewards are given; set rewards, such as clip=FOLDER",
    }


def _not_judged(metric: str, judge: Judge | None, clips: Sequence[EvaluationClip], shape: VideoShape) -> str | None:
    if judge is None:
        return "it needs a judge of videos, and none was given"
    if metric not in judge.figures:
        return f"the judge does not measure it; it measures {', '.join(judge.figures)}"
    refused = next((reason for clip in clips if (reason := judge.refuses(clip)) is not None), None)
    return refused or judge.refuses_shape(shape)


def _no_tip(judge: Judge | None, clips: Sequence[EvaluationClip], from_image: bool, shape: VideoShape) -> str | None:
    if not from_image:
        return "the tip's path follows from the first frame, so it is measured on image-to-video only"
    if (reason := _not_judged("tip", judge, clips, shape)) is not None:
        return reason
    assert judge is not None
    return next((reason for clip in clips if (reason := judge.refuses_tip(clip, shape)) is not None), None)


def missing_tips(clip: EvaluationClip, shape: VideoShape) -> str | None:
    """Why a clip's points do not cover videos of this shape; None if they do."""
    if clip.tips_T2 is None:
        return f"clip '{clip.id}' has no tip, which it needs"
    if len(clip.tips_T2) < shape.frames:
        return f"clip '{clip.id}' has its tip in {len(clip.tips_T2)} frames, {shape.frames} are generated"
    return None
