"""A trained judge as the `Judge` of an evaluation, for any model and any labelled clips.

    identity        1 if the video shows exactly the clip's instruments; none and unclear are misses
    judged_none     1 if it shows no instrument; judged_unclear: 1 if nothing can be told
    tip_accuracy    share of frames whose tip lies within 5 % of the diagonal from the clip's; a frame counts if the
                    clip's tip is in view
    tip_confidence  mean confidence of the tips, 0..1
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.judge_data import SEEN
from lapwan.evaluation.judge_figures import TIP_WITHIN
from lapwan.evaluation.judge_file import JudgeFile, failed_ceiling
from lapwan.evaluation.judge_masks import middle_of
from lapwan.evaluation.judge_net import NONE, UNCLEAR, JudgeReading, read_video
from lapwan.evaluation.metrics import Seen, missing_tips


class VideoJudge:
    """A `lapwan.evaluation.metrics.Judge` from a judge's file.

    Args:
        file: of `read_judge`.
        families: names that label the clips, in the order of their label weights; None: the judge's own.
        fps: of the videos, at which boxes of the clips are read.
    """

    figures: Mapping[str, tuple[str, ...]] = MappingProxyType({
        "identity": ("identity", "judged_none", "judged_unclear"), "tip": ("tip_accuracy", "tip_confidence")})

    def __init__(self, file: JudgeFile, families: tuple[str, ...] | None = None, fps: int = 16) -> None:
        self.file, self._fps = file, fps
        self._families = families or tuple(file.metadata.families)
        self.classes = (*file.metadata.families, "none", "unclear")
        self.fingerprint = file.fingerprint
        self._last: tuple[bytes, JudgeReading] | None = None

    def named(self, clip: EvaluationClip) -> list[int]:
        """The judge's numbers of the instruments that a clip is labelled with."""
        own = self.file.metadata.families
        return [own.index(key) for key, weight in zip(self._families, clip.weights, strict=True) if weight >= SEEN]

    def refuses(self, clip: EvaluationClip) -> str | None:
        """Refuses clips without a label, and of families that it has not seen in training."""
        if clip.fallback or not clip.weights:
            return f"clip '{clip.id}' has no label that names an instrument; label the clips with lapwan label"
        trained = self.file.metadata.recipe.get("clips_by_family", {})
        missing = [self.file.metadata.families[k] for k in self.named(clip)
                   if trained.get(self.file.metadata.families[k], 1) == 0]
        if missing:
            return f"clip '{clip.id}' shows {missing[0]}, of which the judge saw no clip in training"
        return None

    def refuses_shape(self, shape: VideoShape) -> str | None:
        """Takes every shape: a video is scaled onto its canvas whole."""
        return None

    def refuses_tip(self, clip: EvaluationClip, shape: VideoShape) -> str | None:
        """Why the tip of a clip's videos cannot be compared; None if it can."""
        if self.file.metadata.tip == "none":
            return "the judge was trained without points or boxes and knows no tips"
        if self.file.metadata.tip == "points":
            return missing_tips(clip, shape)
        if clip.video is None or not (clip.roi or clip.mask):
            return f"clip '{clip.id}' has no boxes, whose middles are this judge's tips"
        return None

    def read(self, frames_THWC: np.ndarray) -> JudgeReading:
        """What the judge sees in a video; its tips are in 0..1 of the video's frame."""
        height, width = frames_THWC.shape[1:3]
        canvas = self.file.canvas
        key = hash(frames_THWC.tobytes()).to_bytes(8, "little", signed=True)
        if self._last is None or self._last[0] != key:  # the metrics of one video follow each other
            reading = read_video(self.file.net, canvas.put(frames_THWC), canvas).reading(self.file.temperatures)
            count = reading.tips_TK2.shape[1]
            tips = canvas.from_canvas(reading.tips_TK2.reshape(-1, 2), height, width).reshape(-1, count, 2)
            self._last = key, JudgeReading(reading.state_3, reading.families_K, tips, reading.confidence_TK)
        return self._last[1]

    def describe(self, frames_THWC: np.ndarray, clip: EvaluationClip) -> Seen:
        """The video's state, or its instruments with the least of their probabilities, and the tip of the first."""
        reading, families = self.read(frames_THWC), self.file.metadata.families
        if reading.state in (NONE, UNCLEAR):
            name = "none" if reading.state == NONE else "unclear"
            return Seen(name, float(reading.state_3[reading.state]), None)
        visible = [k for k in range(len(families)) if reading.families_K[k] >= 0.5] or [reading.top]
        share = min(float(reading.families_K[k]) for k in visible)
        return Seen(" + ".join(families[k] for k in visible), share, reading.tips_TK2[:, visible[0]])

    def score(self, metric: str, frames_THWC: np.ndarray, clip: EvaluationClip) -> Mapping[str, float]:
        """One metric of one video."""
        reading = self.read(frames_THWC)
        if metric == "identity":
            return {"identity": float(reading.shows(self.named(clip))),
                    "judged_none": float(reading.state == NONE), "judged_unclear": float(reading.state == UNCLEAR)}
        if metric != "tip":
            raise ValueError(f"no metric '{metric}'; there are {', '.join(self.figures)}")
        return self._tip(reading, frames_THWC, clip)

    def _tip(self, reading: JudgeReading, frames_THWC: np.ndarray, clip: EvaluationClip) -> Mapping[str, float]:
        frames, height, width = frames_THWC.shape[:3]
        truth = self._truth(clip, VideoShape(frames, (height, width), self._fps))
        if truth is None or len(truth) < frames:
            return dict.fromkeys(self.figures["tip"], float("nan"))
        named = [k for k in self.named(clip) if reading.families_K[k] >= 0.5]
        family = named[0] if named else reading.top  # of another instrument its tip: the path is what is compared
        truth = truth[:frames]
        in_view = np.isfinite(truth).all(axis=1) & (truth >= 0).all(axis=1) & (truth <= 1).all(axis=1)
        distance = np.hypot(*((reading.tips_TK2[:, family] - truth) * [width, height]).T)
        hits = (distance <= TIP_WITHIN * np.hypot(height, width))[in_view]
        confidence = float(reading.confidence_TK[:, family].mean())
        return {"tip_accuracy": float(hits.mean()) if len(hits) else float("nan"), "tip_confidence": confidence}

    def _truth(self, clip: EvaluationClip, shape: VideoShape) -> np.ndarray | None:
        """The clip's tips as the judge was trained on them: points, or middles of boxes [T, 2]; None without."""
        if self.file.metadata.tip == "points":
            return clip.tips_T2
        regions = clip.regions(shape)
        return None if regions is None else middle_of(regions)


def judge_for(file: JudgeFile, source: object, taxonomy: Taxonomy, least: float, fps: int) -> VideoJudge:
    """The judge of an evaluation.

    Args:
        file: of `read_judge`.
        source: names the file in messages.
        taxonomy: labels the clips.
        least: identity on its reconstructions that it must reach, 0..1.
        fps: of the videos.

    Raises:
        UserError: it fails its own ceiling, or names other families.
    """
    if (reason := failed_ceiling(file.metadata, least)) is not None:
        raise UserError(f"{source} must not judge: {reason}; train it on more clips, or accept it with --set "
                        "judge_ceiling=SHARE")
    own = file.metadata
    if set(own.families) != set(taxonomy.keys):
        raise UserError(f"{source} names {', '.join(own.families)} of taxonomy {own.taxonomy}, but the clips are "
                        f"labelled with {', '.join(taxonomy.keys)} of {taxonomy.name}; set taxonomy, or train a judge "
                        "for these families")
    return VideoJudge(file, taxonomy.keys, fps)
