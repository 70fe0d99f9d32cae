"""Pictures of an evaluation: a plot of means, differences and confusion matrices, and contact sheets of the videos."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lapwan.evaluation.bootstrap import Estimate
from lapwan.evaluation.clips import EvaluationClip, VideoShape, evenly_spaced
from lapwan.evaluation.router_accuracy import RoutingScores
from lapwan.evaluation.study import Study, StudyResults
from lapwan.evaluation.tables import SHARES, IntervalRule, metrics_of
from lapwan.evaluation.videos import VideoStore
from lapwan.report import plots
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.start_image import read_clip

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

# Inches: the whole, a row of an interval, and what a chart of them takes besides.
_WIDTH, _ROW, _CHART = 10.0, 0.24, 0.75
_FRAME_WIDTH = 128  # of contact sheets, pixels


def draw_plot(study: Study, results: StudyResults, interval: IntervalRule) -> Image.Image:
    """For each metric the means and, on the right, the paired differences to the first arm; then a confusion matrix for
    each router and set of captions."""
    by_arm = {arm.name: metrics_of(results, arm.name) for arm in study.arms}
    names = {name: plots.drawable(name, f"adapter {i + 1}") for i, name in enumerate(by_arm)}
    metrics = list(dict.fromkeys(metric for arm_metrics in by_arm.values() for metric in arm_metrics))
    parts: list[tuple[float, Callable[[Any], None]]] = []
    for metric in metrics:
        values_of = {names[name]: arm_metrics[metric] for name, arm_metrics in by_arm.items() if metric in arm_metrics}
        parts.append((_CHART + _ROW * len(values_of), functools.partial(
            _metric, metric=metric, values_of=values_of, names=list(names.values()), results=results,
            interval=interval)))
    maps = [(f"{name}: {which}", scores) for name, sets in results.routing.items() for which, scores in sets.items()]
    labels = {family.key: family.names_zh[0] for family in study.taxonomy.families if family.names_zh}
    for pair in (maps[n : n + 2] for n in range(0, len(maps), 2)):
        height = max(plots.confusion_size(len(scores.families))[1] for _, scores in pair)
        parts.append((height, functools.partial(_confusions, pair=pair, names_zh=labels)))
    if not parts:  # captions alone, and no adapter with a router
        parts.append((_CHART, lambda part: part.suptitle("nothing to plot")))
    return plots.stacked(parts, _WIDTH)


def _metric(
    part: SubFigure, metric: str, values_of: Mapping[str, np.ndarray], names: Sequence[str], results: StudyResults,
    interval: IntervalRule,
) -> None:
    """A metric's means with the ceiling, and the differences to the first arm."""
    left, right = part.subplots(1, 2, width_ratios=(0.56, 0.44))
    share = metric in SHARES
    colours = {name: plots.PALETTE[i % len(plots.PALETTE)] for i, name in enumerate(names)}

    def scaled(estimates: Mapping[str, Estimate]) -> dict[str, tuple[float, float, float]]:
        scale = 100.0 if share else 1.0
        return {name: (e.mean * scale, e.low * scale, e.high * scale) for name, e in estimates.items()}

    ceiling, title = None, f"{metric}, %" if share else metric
    if metric in results.ceiling:
        (ceiling, *_), = scaled({"": interval.of(results.ceiling[metric])}).values()
        title += " (dashed: the ceiling)"
    plots.intervals(
        left, title, scaled({name: interval.of(values) for name, values in values_of.items()}), colours, ceiling)
    first = names[0]
    if first not in values_of or len(values_of) < 2:
        right.remove()
        return
    gaps = {name: interval.between(values, values_of[first]) for name, values in values_of.items()}
    title = f"difference to {plots.shortened(first)}" + (", points" if share else "")
    plots.intervals(right, title, scaled(gaps), colours, 0.0)
    right.set_yticklabels([])


def _confusions(part: SubFigure, pair: Sequence[tuple[str, RoutingScores]], names_zh: Mapping[str, str]) -> None:
    """Two confusion matrices side by side: a good router has a dark diagonal."""
    charts = part.subplots(1, 2)
    for axes in charts[len(pair) :]:
        axes.remove()
    for axes, (title, scores) in zip(charts, pair, strict=False):
        title = plots.shortened(plots.drawable(title, title.rsplit(": ", 1)[-1]), 44)
        plots.confusion(axes, title, plots.family_labels(scores.families, names_zh), scores.confusion_EE, "captions")


def side_by_side_sheet(study: Study, store: VideoStore, count: int) -> Image.Image:
    """Reference and every arm's video at the first seed, for `count` evenly spaced clips."""
    assert study.sampling is not None
    shape = study.sampling.shape
    rows: list[np.ndarray] = []
    captions: list[str] = []
    for clip in evenly_spaced(study.clips, count):
        if clip.reference_error(shape) is None:
            rows.append(clip.frames(shape))
            captions.append(f"clip: {clip.prompt}")
        for arm in study.arms:
            rows.append(_read(store, study, clip, arm.name))
            hint = arm.hint_for(clip)
            captions.append(arm.name if hint is None else f"{arm.name} ({hint})")
    return contact_sheet(rows, captions=captions, scale=_scale(shape))


def arm_sheet(study: Study, store: VideoStore, name: str, count: int) -> Image.Image:
    """One arm's videos of `count` clips, under their prompts."""
    assert study.sampling is not None
    clips = evenly_spaced(study.clips, count)
    return contact_sheet([_read(store, study, clip, name) for clip in clips],
                         captions=[_title(clip) for clip in clips], scale=_scale(study.sampling.shape))


def _title(clip: EvaluationClip) -> str:
    return f"{clip.instrument}: {clip.prompt}" if clip.instrument else clip.prompt


def _read(store: VideoStore, study: Study, clip: EvaluationClip, name: str) -> np.ndarray:
    assert study.sampling is not None
    shape = study.sampling.shape
    arm = next(arm for arm in study.arms if arm.name == name)
    return read_clip(store.path(arm, clip, 0), shape.frames, shape.size, shape.fps)


def _scale(shape: VideoShape) -> int:
    return max(1, round(_FRAME_WIDTH / shape.size[1]))
