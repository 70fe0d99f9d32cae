"""The picture of `inspect-weights --plot`: magnitudes and ratios over steps, and a heat map of the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.diagnostics.lora_figures import Figures, ModuleFigures
from lapwan.diagnostics.tables import RATIOS, ratios
from lapwan.diagnostics.verdict import Preset
from lapwan.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

# Inches.
_WIDTH, _CHART, _ROW, _TALLEST = 11.0, 3.2, 0.16, 9.0
_RATIO_COLOURS = {"mean|w|": plots.GREY, "mean|B|": plots.GREEN, "update": plots.PURPLE}
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
        preset: its wanted mean|B| is drawn, unless it is a mixture.
        mixture, routing: as in the JSON.
    """
    rows = _rows(modules)
    parts: list[tuple[float, Callable[[Any], None]]] = []
    if len(steps) > 1 and None not in steps:
        numbers = [float(step or 0) for step in steps]
        parts.append((_CHART, lambda part: _charts(part, numbers, history, None if mixture else preset)))
    if mixture:
        parts.append((_CHART, lambda part: _gates(part, mixture, routing or {})))
    parts.append((min(1.9 + _ROW * max(len(rows), 8), _TALLEST), lambda part: _maps(part, modules, rows)))
    return plots.stacked(parts, _WIDTH)


def _charts(
    part: SubFigure, steps: Sequence[float], history: Sequence[Mapping[str, Figures]], preset: Preset | None
) -> None:
    left, right = part.subplots(1, 2)
    labels = list(dict.fromkeys(label for figures in history for label in figures))
    magnitudes = {label: [(step, figures[label].mean_abs_B or 0.0)
                          for step, figures in zip(steps, history, strict=True) if label in figures]
                  for label in labels}
    plots.line_chart(left, "mean|B|: what training added", magnitudes, plots.NOISE_EXPERT_COLOURS, "step", "mean|B|")
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, figures in zip(steps, history, strict=True):
        for key, value in ratios(figures, {}).items():
            if value is not None and key in _RATIO_NAMES:
                lines.setdefault(_RATIO_NAMES[key], []).append((step, value))
    if not lines:
        right.remove()
        return
    wanted = {}
    if preset is not None:  # None for a mixture, to which the rules for plain LoRAs do not apply
        wanted = {"mean|B| wanted for motion": 2.0} if preset.leader == "high" else {"mean|B| wanted at most": 0.5}
    plots.line_chart(right, "high / low", lines, _RATIO_COLOURS, "step", "ratio", wanted)


def _gates(part: SubFigure, mixture: Mapping[str, Any], routing: Mapping[str, Any]) -> None:
    """w(σ) on the left; on the right each expert's usage, and the router's entropy over the largest possible."""
    left, right = part.subplots(1, 2)
    gates = {label: described["timestep_gate"] for label, described in mixture.items()}
    curves = {label: list(zip(gate["sigma"], gate["strength"], strict=True)) for label, gate in gates.items()}
    plots.line_chart(left, "w(sigma): the timestep gates", curves, plots.NOISE_EXPERT_COLOURS, "sigma (1: pure noise)",
                     "strength w")
    windows = routing.get("windows") or []
    if len(windows) < 2:
        right.remove()
        return
    families = routing["router"]["families"]
    colours = {family: plots.PALETTE[n % len(plots.PALETTE)] for n, family in enumerate(families)}
    lines = {family: [(w["to_step"], w["usage"][family]) for w in windows if w["usage"][family] is not None]
             for family in families}
    largest = routing["router"]["largest_entropy"]
    if largest > 0:
        colours[_ENTROPY] = plots.INK
        lines[_ENTROPY] = [(w["to_step"], w["entropy"] / largest) for w in windows if w["entropy"] is not None]
    lines = {name: points for name, points in lines.items() if points}
    plots.line_chart(right, "usage of the experts, after top-k", lines, colours, "step", "share of the gates")


def _rows(modules: Mapping[str, Sequence[ModuleFigures]]) -> list[str]:
    blocks = {m.block for members in modules.values() for m in members}
    return sorted(blocks, key=lambda b: (0, int(b)) if b.isdigit() else (1, 0))


def _maps(part: SubFigure, modules: Mapping[str, Sequence[ModuleFigures]], rows: Sequence[str]) -> None:
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
    maps = part.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axes, (label, values) in zip(maps, cells.items(), strict=True):
        image = plots.heat_map(axes, f"{label}: norm of the update", columns, rows, values, largest)
    maps[0].set_ylabel("block")
    plots.colour_bar(part, image, list(maps), "norm of (alpha/r) B A")
