"""The plot of an evaluation: every metric's means with intervals, an adapter a line, and the routers' confusion."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from lapwan.diagnostics.canvas import FAINT, GRID, Box, Canvas, Colour, number, ticks
from lapwan.evaluation.bootstrap import Estimate
from lapwan.evaluation.report import SHARES, Interval, measured
from lapwan.evaluation.routing import RoutingScores
from lapwan.evaluation.study import Findings, Study

_WIDTH, _MARGIN, _LINE, _HEAD, _AXIS, _NAMES = 900, 24, 22, 30, 34, 190
_COLOURS: tuple[Colour, ...] = (
    (120, 120, 120), (38, 98, 168), (208, 72, 52), (20, 130, 110), (140, 70, 160), (190, 140, 20))
_MAP = 320  # height of a confusion map


def picture(study: Study, found: Findings, interval: Interval) -> Image.Image:
    """A panel for each metric, then a map for each router and set of captions."""
    by_arm = {arm.name: measured(found, arm.name) for arm in study.arms}
    metrics = list(dict.fromkeys(metric for own in by_arm.values() for metric in own))
    panels = {
        metric: {name: interval.of(own[metric]) for name, own in by_arm.items() if metric in own}
        for metric in metrics
    }
    maps = [(f"{name}: {which}", scores) for name, sets in found.routing.items() for which, scores in sets.items()]
    heights = [_HEAD + _LINE * len(own) + _AXIS for own in panels.values()]
    canvas = Canvas(_WIDTH, 2 * _MARGIN + sum(heights) + _MAP * ((len(maps) + 1) // 2))
    top = float(_MARGIN)
    colours = {arm.name: _COLOURS[i % len(_COLOURS)] for i, arm in enumerate(study.arms)}
    for (metric, own), height in zip(panels.items(), heights, strict=True):
        mark = interval.of(found.ceiling[metric]).mean if metric in found.ceiling else None
        _panel(canvas, top, metric, own, colours, mark)
        top += height
    half = (_WIDTH - 2 * _MARGIN) / 2
    for i, (title, scores) in enumerate(maps):
        left = _MARGIN + (i % 2) * half
        _confusion(canvas, Box(left, top + (i // 2) * _MAP, left + half - 20, top + (i // 2 + 1) * _MAP - 10), title,
                   scores)
    return canvas.finish()


def _panel(
    canvas: Canvas, top: float, metric: str, own: Mapping[str, Estimate], colours: Mapping[str, Colour],
    ceiling: float | None,
) -> None:
    scale = 100.0 if metric in SHARES else 1.0
    ends = [v * scale for e in own.values() for v in (e.mean, e.low, e.high) if v == v]  # NaN is not itself
    if ceiling is not None:
        ends.append(ceiling * scale)
    marks = ticks(min(ends), max(ends))
    left, right, bottom = _MARGIN + _NAMES, _WIDTH - _MARGIN - 20, top + _HEAD + _LINE * len(own)

    def at(value: float) -> float:
        return left + (value * scale - marks[0]) / (marks[-1] - marks[0]) * (right - left)

    canvas.text(_MARGIN, top, f"{metric}, %" if metric in SHARES else metric, size=14)
    for mark in marks:
        canvas.line([(at(mark / scale), top + _HEAD - 6), (at(mark / scale), bottom)], GRID)
        canvas.text(at(mark / scale), bottom + 4, number(mark), "ma", 11, FAINT)
    if ceiling is not None:
        canvas.line([(at(ceiling), top + _HEAD - 6), (at(ceiling), bottom)], FAINT)
        canvas.text(at(ceiling), top + _HEAD - 8, "ceiling", "md", 11, FAINT)
    for i, (name, estimate) in enumerate(own.items()):
        middle = top + _HEAD + _LINE * (i + 0.5)
        canvas.text(left - 12, middle, name[:26], "rm", 12)
        if estimate.low == estimate.low:
            canvas.line([(at(estimate.low), middle), (at(estimate.high), middle)], colours[name], 3)
        if estimate.mean == estimate.mean:
            canvas.dot(at(estimate.mean), middle, colours[name], 5)


def _confusion(canvas: Canvas, box: Box, title: str, scores: RoutingScores) -> None:
    """Shares of each label's captions by answer: a good router has a bright diagonal."""
    total = scores.confusion_EE.sum(axis=1, keepdims=True).clip(min=1)
    share = scores.confusion_EE / total
    families = scores.families
    values = {(row, column): float(share[i, j]) for i, row in enumerate(families) for j, column in enumerate(families)}
    canvas.heat_map(box, f"{title}: label (row) and answer", families, families, values, 1.0)
