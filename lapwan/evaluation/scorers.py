"""What a generated video is judged by: one number a video and metric.

How to add a metric: a class with `names` and `score`, and a case in `metrics.make_scorers`.
Shapes: T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from lapwan.evaluation import pixels
from lapwan.evaluation.clips import EvalClip, VideoShape
from lapwan.tiny.evaluators import InstrumentNet, evaluate_identity, load_evaluator, locate_tip, tip_hits
from lapwan.tiny.instruments import INSTRUMENTS


@dataclass(frozen=True, eq=False)
class Made:
    """A video, the clip it was made for, and that clip's own frames, read when asked for."""

    frames_THWC: np.ndarray
    clip: EvalClip
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


class Identity:
    """`identity`: 1 if the instrument that the clip shows is the one seen in the video; embedded model only."""

    names: tuple[str, ...] = ("identity",)

    def __init__(self, net: InstrumentNet | None = None) -> None:
        self._net = net or load_evaluator()

    def score(self, made: Made) -> Mapping[str, float]:
        seen = INSTRUMENTS[int(evaluate_identity(made.frames_THWC, self._net).argmax())]
        return {"identity": float(seen == made.clip.instrument)}


class TipAccuracy:
    """`tip_accuracy`: share of frames with the tip within 5 % of the diagonal of where it truly is.

    The path follows from first frame and caption, so this is for image-to-video, on the embedded scenes only. Frames
    whose true tip is out of view do not count.
    """

    names: tuple[str, ...] = ("tip_accuracy",)

    def __init__(self, net: InstrumentNet | None = None) -> None:
        self._net = net or load_evaluator()

    def score(self, made: Made) -> Mapping[str, float]:
        truth = made.clip.tips_T2
        frames = len(made.frames_THWC)
        if truth is None or len(truth) < frames:
            return {"tip_accuracy": float("nan")}
        hits = tip_hits(locate_tip(made.frames_THWC, self._net), truth[:frames], made.shape.size)
        return {"tip_accuracy": float(hits.mean()) if len(hits) else float("nan")}


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
