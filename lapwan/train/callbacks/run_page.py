"""The page of a run, `report.html` in its folder: what metrics.jsonl and `previews/` hold at the time.

It has no state, so it goes on after a kill, and it draws no random numbers: a run's bits are those of a run without it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from lapwan import console
from lapwan.diagnostics.run_folder import metrics
from lapwan.documents import read_text
from lapwan.errors import UserError
from lapwan.report import plots
from lapwan.report.page import PAGE_FILE, Bilingual, Block, Page, Plot, VideoCell, VideoGrid, VideoRow, write_page
from lapwan.train.callbacks.base import Callback, Evaluation
from lapwan.train.run_folder import PREVIEWS, SETTINGS_FILE

_COLUMNS = 8  # steps whose previews are shown: the first, the last, and some between
_POINTS, _SMOOTH = 150, 24  # of a line; more are averaged
_WIDTH, _CHART = 11.0, 3.0  # inches
_SAMPLE = re.compile(r"step_(\d+)_(.+)\.(?:mp4|png)")
_SIGMA = re.compile(r"loss_at_sigma/([\d.]+)-([\d.]+)")
_GATE = re.compile(r"timestep_gate/(\w+)/w_at_([\d.]+)")

Lines = Sequence[Mapping[str, Any]]
Series = dict[str, list[tuple[float, float]]]


class RunPage(Callback):
    """Writes the page after each preview, and once more at the end of the run (`finish`).

    Args:
        run: the run folder.
        samples: what is sampled, by the names in the files of previews.
        shape: frames, (height, width) and frames a second of a sample.
        every: steps between two previews.
        total: steps of the run.
        command: what continues the run.
    """

    name = "page"

    def __init__(
        self, run: Path, samples: Mapping[str, VideoRow], shape: tuple[int, tuple[int, int], float], every: int,
        total: int, command: str,
    ) -> None:
        self.every, self._total = every, total
        self._run, self._samples, self._shape, self._command = run, samples, shape, command

    def on_step(self, step: int, board: Any) -> Evaluation:
        if step < self._total:  # at the end `finish` writes it, with the last line of metrics
            self._write(step)
        return Evaluation({})

    def finish(self, step: int) -> None:
        """Write the page of a run that has ended."""
        self._write(step, running=False)

    def _write(self, step: int, running: bool = True) -> None:
        """A page that cannot be written is a warning: it must not end a run."""
        path = self._run / PAGE_FILE
        try:
            if write_page(path, self._page(step, running)):
                console.detail(f"page {path}")
        except (OSError, UserError, ValueError) as error:
            console.warn(f"{path} is not written: {error}")

    def _page(self, step: int, running: bool) -> Page:
        lines = metrics(self._run)
        blocks: list[Block] = [self._videos()] if self._samples else []
        if charts := run_charts(lines):
            blocks.insert(0, Plot(Bilingual("Curves", "曲线"), charts))
        facts = ((Bilingual("run", "训练"), str(self._run)), (Bilingual("step", "步数"), f"{step} / {self._total}"))
        settings = self._run / SETTINGS_FILE
        return Page("train", Bilingual("Training run", "训练过程"), facts, tuple(blocks), self._command,
                    read_text(settings) if settings.is_file() else "", running, Bilingual("Continue", "继续训练"))

    def _videos(self) -> VideoGrid:
        """A row for each sample, a column for each step."""
        by_name: dict[str, dict[int, Path]] = {}
        folder = self._run / PREVIEWS
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if match := _SAMPLE.fullmatch(path.name):
                by_name.setdefault(match[2], {})[int(match[1])] = path
        steps = sorted({step for paths in by_name.values() for step in paths})
        if len(steps) > _COLUMNS:
            steps = [steps[round(i * (len(steps) - 1) / (_COLUMNS - 1))] for i in range(_COLUMNS)]
        rows = []
        for name, row in self._samples.items():
            paths = by_name.get(name, {})
            cells = tuple(VideoCell(f"step {step}", paths[step]) for step in steps if step in paths)
            rows.append(replace(row, cells=cells))
        frames, size, fps = self._shape
        note = Bilingual("A row has the same prompt and noise; columns are steps of the run.",
                         "同一行使用相同的提示词和噪声；各列为训练步数。")
        return VideoGrid(Bilingual("Previews", "预览"), tuple(rows), frames, fps, size, note)


def run_charts(lines: Lines) -> Image.Image | None:
    """Charts of a run so far: losses over steps and by sigma, validation, ratios, usage, gates; None without lines."""
    charts = [chart for chart in (
        _losses(lines), _by_sigma(lines), _tagged(lines, "validation/", "/loss", "validation loss", "loss"),
        _tagged(lines, "held_out/", "", "held-out prompts", "reward"),
        _tagged(lines, "weights/ratio/", "", "high / low", "ratio"),
        _tagged(lines, "metrics/expert_usage_", "", "usage of the experts, after top-k", "share of the gates"),
        _gates(lines),
    ) if chart is not None]
    if not charts:
        return None
    pairs = [charts[n : n + 2] for n in range(0, len(charts), 2)]

    def draw(part: Any, pair: Sequence[Callable[[Any], None]]) -> None:
        axes = part.subplots(1, 2)
        for chart, place in zip(pair, axes, strict=False):
            chart(place)
        for place in axes[len(pair) :]:
            place.remove()

    return plots.stacked([(_CHART, functools.partial(draw, pair=pair)) for pair in pairs], _WIDTH)


def _chart(title: str, series: Series, x: str, y: str) -> Callable[[Any], None] | None:
    """A line chart of the series that have points; None without any."""
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return None
    fixed = {name: plots.NOISE_EXPERT_COLOURS.get(name.split(",")[0]) for name in shown}
    free = iter(n for n in range(len(shown)))
    colours = {name: colour or plots.PALETTE[next(free) % len(plots.PALETTE)] for name, colour in fixed.items()}
    return lambda axes: plots.line_chart(axes, title, shown, colours, x, y)


def _losses(lines: Lines) -> Callable[[Any], None] | None:
    """The flow loss; the loss itself in a run that has no other."""
    key = "loss/diffusion" if any("loss/diffusion" in line for line in lines) else "loss"
    series = {label: _averaged([(line["step"], line.get(key)) for line in lines if line.get("noise_expert") == label])
              for label in _labels(lines)}
    return _chart("loss by noise expert" if key == "loss" else "flow loss by noise expert", series, "step", "loss")


def _by_sigma(lines: Lines) -> Callable[[Any], None] | None:
    """Mean loss in each bin of sigma, over the first and the last quarter of a noise expert's lines."""
    series: Series = {}
    for label in _labels(lines):
        mine = [line for line in lines if line.get("noise_expert") == label]
        quarter = max(1, len(mine) // 4)
        for part, chosen in (("first quarter", mine[:quarter]), ("last quarter", mine[-quarter:])):
            bins: dict[float, list[float]] = {}
            for line in chosen:
                for key, value in line.items():
                    if (match := _SIGMA.fullmatch(key)) and _finite(value):
                        bins.setdefault((float(match[1]) + float(match[2])) / 2, []).append(value)
            series[f"{label}, {part}"] = [(sigma, sum(v) / len(v)) for sigma, v in sorted(bins.items())]
    return _chart("flow loss by sigma", series, "sigma (1: pure noise)", "loss")


def _tagged(lines: Lines, start: str, end: str, title: str, y: str) -> Callable[[Any], None] | None:
    """The figures under tags that begin and end so, over steps, named by what is between."""
    tags = dict.fromkeys(key for line in lines for key in line if key.startswith(start) and key.endswith(end))
    series = {tag.removeprefix(start).removesuffix(end):
              _averaged([(line["step"], line.get(tag)) for line in lines], _SMOOTH) for tag in tags}
    return _chart(title, {name: points for name, points in series.items() if "/" not in name}, "step", y)


def _gates(lines: Lines) -> Callable[[Any], None] | None:
    """w(σ) as last logged."""
    for line in reversed(lines):
        series: Series = {}
        for key, value in line.items():
            if (match := _GATE.fullmatch(key)) and _finite(value):
                series.setdefault(match[1], []).append((float(match[2]), value))
        if series:
            curves = {name: sorted(points) for name, points in series.items()}
            return _chart("w(sigma): the timestep gates", curves, "sigma (1: pure noise)", "strength w")
    return None


def _labels(lines: Lines) -> list[str]:
    return list(dict.fromkeys(str(line["noise_expert"]) for line in lines if line.get("noise_expert")))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _averaged(points: Sequence[tuple[int, Any]], most: int = _POINTS) -> list[tuple[float, float]]:
    """The finite points, at most `most`: neighbours are averaged."""
    finite = [(float(step), float(value)) for step, value in points if _finite(value)]
    size = max(1, math.ceil(len(finite) / most))
    groups = [finite[n : n + size] for n in range(0, len(finite), size)]
    return [(sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
            for group in groups]
