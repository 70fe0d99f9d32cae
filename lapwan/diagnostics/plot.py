"""The picture of `inspect-weights --plot`: magnitudes and ratios over steps, and a heat map of the update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.diagnostics.lora_figures import Figures, ModuleFigures
from lapwan.diagnostics.tables import RATIOS, ratios
from lapwan.diagnostics.verdict import Preset
from lapwan.report.canvas import Box, Canvas, Colour

_WIDTH, _CHART, _MARGIN, _BAR = 1100, 320, 28, 90
NOISE_EXPERT_COLOURS: dict[str, Colour] = {"high": (208, 72, 52), "low": (38, 98, 168)}
_COLOURS: dict[str, Colour] = {**NOISE_EXPERT_COLOURS, "file": (80, 80, 80)}
_RATIO_COLOURS: dict[str, Colour] = {
    "mean|w|": (150, 150, 150), "mean|B|": (20, 130, 110), "update": (140, 70, 160),
}
_FAMILY_COLOURS: tuple[Colour, ...] = (
    (208, 72, 52), (38, 98, 168), (20, 130, 110), (140, 70, 160), (196, 140, 20), (80, 80, 80), (0, 150, 200),
    (160, 90, 60),
)
_ENTROPY = "entropy / ln E"
_RATIO_NAMES = dict(zip(RATIOS, _RATIO_COLOURS, strict=True))


def draw_plot(
    steps: Sequence[int | None], history: Sequence[Mapping[str, Figures]],
    modules: Mapping[str, Sequence[ModuleFigures]], preset: Preset, mixture: Mapping[str, Any] | None = None,
    routing: Mapping[str, Any] | None = None,
) -> Image.Image:
    """Line charts over the checkpoints (if there are two or more), a mixture's gates and routing, and a heat map of the
    last checkpoint's update by noise expert.

    Args:
        steps: of each checkpoint, oldest first.
        history: figures by label at each checkpoint.
        modules: the last checkpoint's modules by label.
        mixture, routing: as in the JSON.
    """
    rows = _rows(modules)
    map_height = max(220, 120 + 12 * len(rows))
    charts = _CHART if len(steps) > 1 and None not in steps else 0
    gates = _CHART if mixture else 0
    canvas = Canvas(_WIDTH, charts + gates + map_height + 2 * _MARGIN)
    if charts:
        _charts(canvas, [float(step or 0) for step in steps], history, None if mixture else preset)
    if mixture:
        _gates(canvas, charts, mixture, routing or {})
    _maps(canvas, charts + gates + _MARGIN, map_height, modules, rows)
    return canvas.finish()


def _charts(
    canvas: Canvas, steps: Sequence[float], history: Sequence[Mapping[str, Figures]], preset: Preset | None
) -> None:
    middle, bottom = _WIDTH / 2, _MARGIN + _CHART - 20
    labels = list(dict.fromkeys(label for figures in history for label in figures))
    magnitudes = {label: [(step, figures[label].mean_abs_B or 0.0)
                          for step, figures in zip(steps, history, strict=True) if label in figures]
                  for label in labels}
    left = Box(_MARGIN, _MARGIN, middle - 14, bottom)
    canvas.line_chart(left, "mean|B|: what training added", magnitudes, _COLOURS, "step")
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, figures in zip(steps, history, strict=True):
        for key, value in ratios(figures, {}).items():
            if value is not None and key in _RATIO_NAMES:
                lines.setdefault(_RATIO_NAMES[key], []).append((step, value))
    if lines:
        wanted = {}
        if preset is not None:  # None for a mixture, to which the rules for plain LoRAs do not apply
            wanted = {"mean|B| wanted for motion": 2.0} if preset.leader == "high" else {"mean|B| wanted at most": 0.5}
        canvas.line_chart(Box(middle + 14, _MARGIN, _WIDTH - _MARGIN, bottom), "high / low", lines, _RATIO_COLOURS,
                          "step", wanted)


def _gates(canvas: Canvas, top: float, mixture: Mapping[str, Any], routing: Mapping[str, Any]) -> None:
    """w(σ) on the left; on the right each expert's usage, and the router's entropy over the largest possible."""
    middle, bottom = _WIDTH / 2, top + _MARGIN + _CHART - 20
    gates = {label: described["timestep_gate"] for label, described in mixture.items()}
    curves = {label: list(zip(gate["sigma"], gate["strength"], strict=True)) for label, gate in gates.items()}
    canvas.line_chart(Box(_MARGIN, top + _MARGIN, middle - 14, bottom), "w(sigma): the timestep gates", curves,
                      _COLOURS, "sigma")
    windows = routing.get("windows") or []
    if len(windows) < 2:
        return
    families = routing["router"]["families"]
    colours = {family: _FAMILY_COLOURS[n % len(_FAMILY_COLOURS)] for n, family in enumerate(families)}
    lines = {family: [(w["to_step"], w["usage"][family]) for w in windows if w["usage"][family] is not None]
             for family in families}
    largest = routing["router"]["largest_entropy"]
    if largest > 0:
        colours[_ENTROPY] = (150, 150, 150)
        lines[_ENTROPY] = [(w["to_step"], w["entropy"] / largest) for w in windows if w["entropy"] is not None]
    canvas.line_chart(Box(middle + 14, top + _MARGIN, _WIDTH - _MARGIN, bottom), "usage of the experts, after top-k",
                      {name: points for name, points in lines.items() if points}, colours, "step")


def _rows(modules: Mapping[str, Sequence[ModuleFigures]]) -> list[str]:
    blocks = {m.block for members in modules.values() for m in members}
    return sorted(blocks, key=lambda b: (0, int(b)) if b.isdigit() else (1, 0))


def _maps(
    canvas: Canvas, top: float, height: float, modules: Mapping[str, Sequence[ModuleFigures]], rows: Sequence[str]
) -> None:
    present = {m.projection for members in modules.values() for m in members}
    columns = [p for p in PROJECTIONS if p in present] + sorted(present - set(PROJECTIONS))
    cells: dict[str, dict[tuple[str, str], float]] = {}
    for label, members in modules.items():
        squares: dict[tuple[str, str], float] = {}
        for module in members:
            if module.finite:  # several experts of a mixture share a cell: their squares add up
                key = (module.block, module.projection)
                squares[key] = squares.get(key, 0.0) + module.delta_norm**2
        cells[label] = {key: math.sqrt(value) for key, value in squares.items()}
    largest = max((value for values in cells.values() for value in values.values()), default=0.0)
    width = (_WIDTH - 2 * _MARGIN - _BAR) / len(cells)
    for n, (label, values) in enumerate(cells.items()):
        box = Box(_MARGIN + n * width, top, _MARGIN + (n + 1) * width - 12, top + height)
        canvas.heat_map(box, f"{label}: norm of the update by block and projection", columns, rows, values, largest)
    bar = Box(_WIDTH - _MARGIN - _BAR + 16, top + 44, _WIDTH - _MARGIN - _BAR + 32, top + height - 92)
    canvas.colour_bar(bar, largest, "norm")
