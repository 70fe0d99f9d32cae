"""What a judge is worth: calibration of its probabilities, and its figures on clips it has not seen.

    ECE = Σ_bins (n_bin / n) · |mean confidence − share right|     over 10 equal bins of confidence

Shapes: N videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapwan.evaluation.judge_net import (
    INSTRUMENT,
    NONE,
    STATES,
    UNCLEAR,
    JudgeNet,
    JudgeReading,
    Temperatures,
    VideoLogits,
    read_video,
)
from lapwan.evaluation.judge_training import JudgeClips

BINS = 10
TIP_WITHIN = 0.05  # of the picture's diagonal
_GRID = torch.logspace(-1.0, 1.5, 251)  # temperatures that are tried


@dataclass(frozen=True)
class JudgeAnswers:
    """A judge's logits for clips whose truth is known."""

    videos: Sequence[VideoLogits]
    clips: JudgeClips

    def readings(self, temperatures: Temperatures) -> list[JudgeReading]:
        """Of every video."""
        return [video.reading(temperatures) for video in self.videos]


def answers(net: JudgeNet, clips: JudgeClips) -> JudgeAnswers:
    """The network on every clip."""
    return JudgeAnswers([read_video(net, frames, clips.canvas) for frames in clips.frames_NTHWC], clips)


def fit_temperatures(calibration: JudgeAnswers) -> Temperatures:
    """The temperatures of least negative log likelihood, of the states over all clips and of the families over those
    that show one.

    Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017).
    """
    states = torch.from_numpy(calibration.clips.states())
    shown = states == INSTRUMENT
    state_N3 = torch.from_numpy(np.stack([video.state_3 for video in calibration.videos]))
    families_NK = torch.from_numpy(np.stack([video.families_K for video in calibration.videos]))
    truth_NK = torch.from_numpy(calibration.clips.families_NK).double()
    of_states = torch.stack([F.cross_entropy(state_N3 / t, states) for t in _GRID])
    if not bool(shown.any()):
        return Temperatures(float(_GRID[of_states.argmin()]))
    of_families = torch.stack([
        F.binary_cross_entropy_with_logits(families_NK[shown] / t, truth_NK[shown]) for t in _GRID])
    return Temperatures(float(_GRID[_least(of_states)]), float(_GRID[_least(of_families)]))


def _least(losses: Tensor) -> int:
    """The middle of the losses that are least: with few clips, all right, they do not tell temperatures apart."""
    least = torch.nonzero(losses <= losses.min() + 1e-3).flatten()
    return int(least[len(least) // 2])


@dataclass(frozen=True)
class Reliability:
    """The reliability curve: of each bin its mean confidence, the share right and the number of videos; and the ECE."""

    ece: float
    bins: list[tuple[float, float, int]]


def reliability(confidence_N: np.ndarray, right_N: np.ndarray) -> Reliability:
    """The curve and the ECE of verdicts.

    Args:
        confidence_N: 0..1.
        right_N: bool.
    """
    at = np.minimum((confidence_N * BINS).astype(int), BINS - 1)
    bins = [(float(confidence_N[at == b].mean()), float(right_N[at == b].mean()), int((at == b).sum()))
            for b in range(BINS) if (at == b).any()]
    ece = sum(count * abs(confidence - right) for confidence, right, count in bins) / max(len(confidence_N), 1)
    return Reliability(float(ece), bins)


def is_right(reading: JudgeReading, state: int, families_K: np.ndarray) -> bool:
    """Whether the verdict is the clip's: its state and, of an instrument, exactly the families that it shows."""
    if state != INSTRUMENT or reading.state != INSTRUMENT:
        return reading.state == state
    return reading.shows(np.flatnonzero(families_K > 0.5).tolist())


def identity(judged: JudgeAnswers, temperatures: Temperatures) -> np.ndarray:
    """[n] bool: of each clip with an instrument, whether exactly its families are seen."""
    states = judged.clips.states()
    return np.array([is_right(reading, INSTRUMENT, families) for reading, families, state
                     in zip(judged.readings(temperatures), judged.clips.families_NK, states, strict=True)
                     if state == INSTRUMENT])


def state_figures(judged: JudgeAnswers, temperatures: Temperatures) -> dict[str, float]:
    """Precision and recall of `none` and of `unclear`; NaN where there are no such clips or no such verdicts."""
    truth = judged.clips.states()
    verdicts = np.array([reading.state for reading in judged.readings(temperatures)])
    figures = {}
    for state in (NONE, UNCLEAR):
        both = float(((truth == state) & (verdicts == state)).sum())
        said, there = float((verdicts == state).sum()), float((truth == state).sum())
        figures[f"{STATES[state]}_precision"] = both / said if said else float("nan")
        figures[f"{STATES[state]}_recall"] = both / there if there else float("nan")
    return figures


def false_positives(judged: JudgeAnswers, temperatures: Temperatures, state: int,
                    names: Sequence[str]) -> dict[str, float]:
    """Of the clips of this state, the share in which an instrument is seen: in all (`any`), and by family."""
    rows = [reading for reading, truth in zip(judged.readings(temperatures), judged.clips.states(), strict=True)
            if truth == state]
    if not rows:
        return {}
    seen = np.array([[k in reading.seen for k in range(len(names))] for reading in rows])
    return {"any": float(seen.any(axis=1).mean()),
            **{name: float(seen[:, k].mean()) for k, name in enumerate(names)}}


def tip_hit_share(judged: JudgeAnswers) -> float:
    """Share of the known tips that lie within 5 % of the canvas's diagonal of the true ones; NaN without tips."""
    canvas, hits = judged.clips.canvas, []
    scale = np.array([canvas.width, canvas.height])
    for video, tips_TK2 in zip(judged.videos, judged.clips.tips_NTK2, strict=True):
        known = ((tips_TK2 >= 0) & (tips_TK2 <= 1)).all(axis=-1)
        distance = np.linalg.norm((video.tips_TK2 - tips_TK2) * scale, axis=-1)[known]
        hits += (distance <= TIP_WITHIN * np.hypot(*scale)).tolist()
    return float(np.mean(hits)) if hits else float("nan")


def verdict_reliability(judged: JudgeAnswers, temperatures: Temperatures) -> Reliability:
    """The reliability of the verdicts on all clips. Of an instrument the verdict is the most likely family."""
    truth, families = judged.clips.states(), judged.clips.families_NK
    confidence, right = [], []
    for reading, state, families_K in zip(judged.readings(temperatures), truth, families, strict=True):
        confidence.append(reading.confidence)
        right.append(reading.state == state and (state != INSTRUMENT or bool(families_K[reading.top] > 0.5)))
    return reliability(np.array(confidence), np.array(right))


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`."""
    if not count:
        return 0.0, 1.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def judge_figures(
    by_set: Mapping[str, JudgeAnswers], everything: JudgeAnswers, temperatures: Temperatures, names: Sequence[str],
) -> dict[str, object]:
    """The figures that a judge's file stores.

    Args:
        by_set: clips with an instrument, by what they are: `reconstructed`, `source`, ...
        everything: all test clips, for calibration and the states.
        temperatures: of the judge.
        names: of its families.
    """
    curve = verdict_reliability(everything, temperatures)
    figures: dict[str, object] = {"videos": len(everything.clips), "ece": curve.ece, "reliability": curve.bins}
    for name, judged in by_set.items():
        right = identity(judged, temperatures)
        share = float(right.mean()) if len(right) else float("nan")
        figures[f"identity_{name}"] = share
        figures[f"identity_{name}_ci95"] = list(wilson(share, len(right))) if len(right) else None
        figures[f"videos_{name}"] = len(right)
        figures[f"tip_accuracy_{name}"] = tip_hit_share(judged)
    figures |= state_figures(everything, temperatures)
    states = everything.clips.states()
    for state in (NONE, UNCLEAR):
        figures[f"false_positives_{STATES[state]}"] = false_positives(everything, temperatures, state, names)
        figures[f"videos_{STATES[state]}"] = int((states == state).sum())
    return figures
