"""Pictures of an evaluation: a plot of means, differences and confusion matrices, and contact sheets of the videos."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image

from lapwan.evaluation.bootstrap import Estimate
from lapwan.evaluation.clips import EvaluationClip, VideoShape, evenly_spaced
from lapwan.evaluation.router_accuracy import RoutingScores
from lapwan.evaluation.study import Study, StudyResults
from lapwan.evaluation.tables import SHARES, IntervalRule, metrics_of
from lapwan.evaluation.videos import VideoStore
from lapwan.report.canvas import FAINT, GRID, Box, Canvas, Colour, number, ticks
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.start_image import read_clip

_WIDTH, _MARGIN, _LINE, _HEAD, _AXIS, _NAMES = 1000, 24, 22, 36, 34, 170
_COLOURS: tuple[Colour, ...] = (
    (120, 120, 120), (38, 98, 168), (208, 72, 52), (20, 130, 110), (140, 70, 160), (190, 140, 20))
_MAP = 320  # height of a confusion matrix
_COLUMNS, _FRAME_WIDTH = 6, 128  # of contact sheets: frames per row, pixels of a frame


def draw_plot(study: Study, results: StudyResults, interval: IntervalRule) -> Image.Image:
    """For each metric the means and, on the right, the paired differences to the first arm; then a confusion matrix for
    each router and set of captions."""
    by_arm = {arm.name: metrics_of(results, arm.name) for arm in study.arms}
    first = study.arms[0].name
    metrics = list(dict.fromkeys(metric for arm_metrics in by_arm.values() for metric in arm_metrics))
    maps = [(f"{name}: {which}", scores) for name, sets in results.routing.items() for which, scores in sets.items()]
    height = _HEAD + _LINE * len(by_arm) + _AXIS
    canvas = Canvas(_WIDTH, 2 * _MARGIN + height * len(metrics) + _MAP * ((len(maps) + 1) // 2))
    colours = {arm.name: _COLOURS[i % len(_COLOURS)] for i, arm in enumerate(study.arms)}
    top = float(_MARGIN)
    middle = _NAMES + (_WIDTH - _NAMES) * 0.56
    for metric in metrics:
        values_of = {name: metrics_[metric] for name, metrics_ in by_arm.items() if metric in metrics_}
        scale = 100.0 if metric in SHARES else 1.0
        canvas.text(_MARGIN, top, f"{metric}, %" if metric in SHARES else metric, size=14)
        for i, name in enumerate(values_of):
            canvas.text(_MARGIN + _NAMES - 12, top + _HEAD + _LINE * (i + 0.5), name[:26], "rm", 12)
        mark = interval.of(results.ceiling[metric]).mean if metric in results.ceiling else None
        box = Box(_MARGIN + _NAMES, top + _HEAD, middle, top + _HEAD + _LINE * len(values_of))
        _dots(canvas, box, {n: interval.of(v) for n, v in values_of.items()}, colours, scale,
              {} if mark is None else {"ceiling": mark})
        if first in values_of and len(values_of) > 1:
            gaps = {name: interval.between(values, values_of[first]) for name, values in values_of.items()}
            box = Box(middle + 40, box.top, _WIDTH - _MARGIN - 10, box.bottom)
            _dots(canvas, box, gaps, colours, scale, {f"difference to {first}": 0.0})
        top += height
    half = (_WIDTH - 2 * _MARGIN) / 2
    for i, (title, scores) in enumerate(maps):
        left, up = _MARGIN + (i % 2) * half, top + (i // 2) * _MAP
        _confusion(canvas, Box(left, up, left + half - 20, up + _MAP - 10), title, scores)
    return canvas.finish()


def _dots(
    canvas: Canvas, box: Box, estimates: Mapping[str, Estimate], colours: Mapping[str, Colour], scale: float,
    levels: Mapping[str, float],
) -> None:
    """A row per estimate with a dot and its interval, and vertical lines at named levels."""
    ends = [v * scale for e in estimates.values() for v in (e.mean, e.low, e.high) if not math.isnan(v)]
    ends += [value * scale for value in levels.values()]
    marks = ticks(min(ends), max(ends), 4)

    def at(value: float) -> float:
        return box.left + (value * scale - marks[0]) / (marks[-1] - marks[0]) * (box.right - box.left)

    for mark in marks:
        canvas.line([(at(mark / scale), box.top - 6), (at(mark / scale), box.bottom)], GRID)
        canvas.text(at(mark / scale), box.bottom + 4, number(mark), "ma", 11, FAINT)
    for name, value in levels.items():
        canvas.line([(at(value), box.top - 6), (at(value), box.bottom)], FAINT)
        canvas.text(min(max(at(value), box.left + 40), box.right - 30), box.top - 8, name, "md", 11, FAINT)
    for i, (name, estimate) in enumerate(estimates.items()):
        middle = box.top + _LINE * (i + 0.5)
        if not math.isnan(estimate.low):
            canvas.line([(at(estimate.low), middle), (at(estimate.high), middle)], colours[name], 3)
        if not math.isnan(estimate.mean):
            canvas.dot(at(estimate.mean), middle, colours[name], 5)


def _confusion(canvas: Canvas, box: Box, title: str, scores: RoutingScores) -> None:
    """Confusion matrix, each row divided by its label's captions: a good router has a bright diagonal."""
    total = scores.confusion_EE.sum(axis=1, keepdims=True).clip(min=1)
    share = scores.confusion_EE / total
    families = scores.families
    values = {(row, column): float(share[i, j]) for i, row in enumerate(families) for j, column in enumerate(families)}
    canvas.heat_map(box, f"{title}: label (row) and answer", families, families, values, 1.0)


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
    return contact_sheet(rows, _COLUMNS, captions, scale=_scale(shape))


def arm_sheet(study: Study, store: VideoStore, name: str, count: int) -> Image.Image:
    """One arm's videos of `count` clips, under their prompts."""
    assert study.sampling is not None
    clips = evenly_spaced(study.clips, count)
    return contact_sheet([_read(store, study, clip, name) for clip in clips], _COLUMNS,
                         [_title(clip) for clip in clips], scale=_scale(study.sampling.shape))


def _title(clip: EvaluationClip) -> str:
    return f"{clip.instrument}: {clip.prompt}" if clip.instrument else clip.prompt


def _read(store: VideoStore, study: Study, clip: EvaluationClip, name: str) -> np.ndarray:
    assert study.sampling is not None
    shape = study.sampling.shape
    arm = next(arm for arm in study.arms if arm.name == name)
    return read_clip(store.path(arm, clip, 0), shape.frames, shape.size, shape.fps)


def _scale(shape: VideoShape) -> int:
    return max(1, round(_FRAME_WIDTH / shape.size[1]))
