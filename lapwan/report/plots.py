"""Plots from plain data, drawn by matplotlib into images: line charts, intervals, confusion matrices, heat maps.

`render` gives the axes' functions a figure to draw on. Equal data give equal pixels: matplotlib's own default style is
the base, whatever the user's matplotlibrc says, the backend is Agg, and pyplot and its global state are not used.
matplotlib is imported by the functions, since most commands draw nothing.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

# Or warnings about fonts and caches are printed between lapwan's lines; a program with logging of its own keeps them.
logging.getLogger("matplotlib").addHandler(logging.NullHandler())

# The colours of Okabe and Ito (Color Universal Design, 2008) that are dark enough for lines on white.
VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777")
PALETTE = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY, GREY)
NOISE_EXPERT_COLOURS = {"high": VERMILION, "low": BLUE, "file": GREY}
MISSING = "#E4E4E4"  # of a cell without a value
INK, _FAINT, _GRID = "#262626", "#666666", "#E4E4E4"
_LINES = ("-", "--", ":", "-.")
_MARKED_POINTS = 40  # a line of more points has no dots
_LARGEST_COUNTED = 16  # a larger confusion matrix shows colours alone
# Fonts with Chinese glyphs, the better ones first. matplotlib knows a collection (.ttc) by its first member.
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Noto Sans CJK JP",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "PingFang HK", "Hiragino Sans GB",
    "Heiti SC", "Heiti TC", "STHeiti", "Arial Unicode MS", "Microsoft YaHei", "SimHei", "SimSun",
)


def render(draw: Callable[[Figure], None], width: float, height: float, dpi: int = 150) -> Image.Image:
    """The image of a figure that `draw` fills.

    Args:
        width, height: in inches; text is 9 points.
        dpi: pixels an inch.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _style()]):
        # Half a pixel more, since matplotlib rounds the size down.
        figure = Figure(((width * dpi + 0.5) / dpi, (height * dpi + 0.5) / dpi), dpi=dpi, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels_HWC = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
        return Image.fromarray(pixels_HWC[..., :3].copy())


def stacked(parts: Sequence[tuple[float, Callable[[Any], None]]], width: float) -> Image.Image:
    """The image of several parts below each other, each given as its height in inches and what fills it."""
    heights = [height for height, _ in parts]

    def draw(figure: Figure) -> None:
        subfigures = figure.subfigures(len(parts), height_ratios=heights, squeeze=False)[:, 0]
        for subfigure, (_, fill) in zip(subfigures, parts, strict=True):
            fill(subfigure)

    return render(draw, width, sum(heights))


def _style() -> dict[str, object]:
    return {
        "font.family": list(_fonts()), "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
        "axes.titlepad": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _FAINT,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": _FAINT, "ytick.color": _FAINT,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8, "ytick.labelsize": 8,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": _GRID, "legend.frameon": False, "legend.fontsize": 8,
        "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08,
    }


def _fonts() -> tuple[str, ...]:
    """matplotlib's own font, and one with Chinese glyphs if the system has any."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ("DejaVu Sans", *[name for name in _CJK_FONTS if name in installed][:1])


@functools.cache
def _glyphs(font: str) -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(font)).get_charmap())


def drawable(text: str, fallback: str) -> str:
    """`text`, or `fallback` where no installed font has its characters, which would be drawn as empty boxes."""
    known = frozenset[int]().union(*map(_glyphs, _fonts()))
    return text if all(ord(character) in known for character in text) else fallback


def family_labels(keys: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The families' keys, each with its Chinese name behind it where a font can draw that.

    Args:
        names: Chinese names by key; families without one may be absent.
    """
    return [drawable(f"{key} {names[key]}", key) if key in names else key for key in keys]


def line_chart(
    axes: Axes, title: str, series: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str],
    x_label: str, y_label: str, levels: Mapping[str, float] | None = None,
) -> None:
    """Lines over a common x axis; y starts at 0 unless values lie below. `levels` are dashed, with their names."""
    lowest = highest = 0.0
    for name, points in series.items():
        x, y = np.asarray(points, dtype=float).reshape(-1, 2).T
        y = np.where(np.isfinite(y), y, np.nan)
        same_colour = [other for other in series if colours[other] == colours[name]].index(name)
        axes.plot(x, y, color=colours[name], linestyle=_LINES[same_colour % len(_LINES)], linewidth=1.6,
                  marker="o" if len(x) <= _MARKED_POINTS else "", markersize=3.5, label=name)
        lowest, highest = np.nanmin(y, initial=lowest), np.nanmax(y, initial=highest)
    for name, level in (levels or {}).items():
        axes.axhline(level, color=_FAINT, linestyle=(0, (5, 3)), linewidth=1, label=name)
        lowest, highest = min(lowest, level), max(highest, level)
    space = 0.06 * (highest - lowest) or 1.0
    axes.set_ylim(lowest - space if lowest < 0 else 0.0, highest + space)
    _plain_numbers(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _legend(axes, title)


def _legend(axes: Axes, title: str) -> None:
    """Title and legend above the axes, where they cover no data."""
    handles, names = axes.get_legend_handles_labels()
    longest = max((len(name) for name in names), default=0)
    columns = max(1, min(len(names), 66 // (longest + 6)))
    legend = axes.legend(handles, names, title=title, title_fontsize=10, alignment="left", ncols=columns,
                         loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0.2, columnspacing=1.4)
    legend.get_title().set_color(INK)


def _plain_numbers(axes: Axes) -> None:
    """Numbers at the ticks without an offset or a power beside the axis, and not too many of them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def number(value: float) -> str:
    """Four significant digits, without trailing zeros; whole numbers up to a million in full."""
    whole = abs(value) < 1e6 and abs(value - round(value)) < 1e-9 * max(1.0, abs(value))
    return f"{round(value)}" if whole else f"{value:.4g}"


def intervals(
    axes: Axes, title: str, estimates: Mapping[str, tuple[float, float, float]], colours: Mapping[str, str],
    level: float | None = None,
) -> None:
    """A row for each estimate (mean, low, high): a dot and its interval. `level` is a dashed vertical line."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for row, (name, (mean, low, high)) in enumerate(estimates.items()):
        if not math.isnan(low):
            axes.plot([low, high], [row, row], color=colours[name], linewidth=2.5, solid_capstyle="butt")
        axes.plot([mean], [row], color=colours[name], marker="o", markersize=6)  # NaN: no dot
    if level is not None and math.isfinite(level):
        axes.axvline(level, color=_FAINT, linestyle=(0, (5, 3)), linewidth=1)
    axes.set_title(title)
    axes.set_yticks(range(len(estimates)), [shortened(name) for name in estimates])
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def shortened(name: str, length: int = 30) -> str:
    """At most `length` characters: the start and the end, which tell files of one folder apart."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def balance(axes: Axes, title: str, labels: Sequence[str], counts: Sequence[int], missing: Sequence[int]) -> None:
    """Bars of the clips of each family, and behind them what is missing for an even set.

    Args:
        missing: clips to add by family.
    """
    positions = range(len(labels))
    axes.barh(positions, counts, color=BLUE, label="clips")
    if any(missing):
        axes.barh(positions, missing, left=counts, color="none", edgecolor=VERMILION, linestyle="--",
                  label="to collect")
        axes.legend(loc="best")
    for at, (count, more) in enumerate(zip(counts, missing, strict=True)):
        axes.annotate(f" {count}" + (f" + {more}" if more else ""), (count + more, at), va="center", fontsize=8)
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("clips by main family")
    axes.set_title(title)


def confusion(axes: Axes, title: str, labels: Sequence[str], counts_EE: np.ndarray, unit: str) -> None:
    """Counts by label (row) and the router's choice (column), coloured by their share of the row, with a colour bar.

    Args:
        unit: what is counted, such as "captions".
    """
    totals_E1 = counts_EE.sum(axis=1, keepdims=True)
    share_EE = np.divide(counts_EE, totals_E1, out=np.full(counts_EE.shape, np.nan), where=totals_E1 > 0)
    image = _matrix(axes, share_EE, "Blues", 1.0, "equal")
    size = 9 if len(labels) <= 8 else 7
    for (row, column), share in np.ndenumerate(share_EE):
        if len(labels) <= _LARGEST_COUNTED:
            axes.text(column, row, number(float(counts_EE[row, column])), ha="center", va="center", fontsize=size,
                      color="white" if share > 0.55 else INK)
    axes.set_xticks(range(len(labels)), labels, rotation=45, rotation_mode="anchor", ha="right", va="top")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("the router's choice")
    axes.set_ylabel("label")
    axes.set_title(title)
    colour_bar(axes.get_figure(), image, [axes], f"share of the label's {unit}")


def confusion_size(families: int) -> tuple[float, float]:
    """Width and height in inches in which the cells of a confusion matrix have room for their counts."""
    cells = max(4, families) * (0.42 if families <= 8 else 0.3)
    return cells + 2.6, cells + 1.5


def heat_map(
    axes: Axes, title: str, columns: Sequence[str], rows: Sequence[str], values: Mapping[tuple[str, str], float],
    top_value: float,
) -> AxesImage:
    """Cells (row, column) from 0 to `top_value`, for a colour bar; those without a value are grey."""
    cells = np.array([[values.get((row, column), np.nan) for column in columns] for row in rows])
    image = _matrix(axes, cells, "viridis", top_value if top_value > 0 else 1.0, "auto")
    for axis, names, most in ((axes.xaxis, columns, 40), (axes.yaxis, rows, 48)):
        every = math.ceil(len(names) / most)  # so that names do not overlap
        axis.set_ticks(range(0, len(names), every), names[::every])
    axes.tick_params(axis="x", labelrotation=90)
    axes.set_title(title)
    if np.isnan(cells).any():
        axes.set_xlabel("grey: no such module, or not finite", fontsize=8, color=_FAINT)
    return image


def colour_bar(figure: Figure | SubFigure | None, image: AxesImage, axes: list[Axes], name: str) -> None:
    """The scale of an image's colours, on the right of `axes`."""
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, label=name)
    bar.outline.set_visible(False)
    bar.ax.grid(visible=False)


def _matrix(
    axes: Axes, values: np.ndarray, colours: str, top: float, aspect: Literal["equal", "auto"]
) -> AxesImage:
    """An image of a matrix, without grid and frame."""
    import matplotlib

    colour_map = matplotlib.colormaps[colours].with_extremes(bad=MISSING)
    image = axes.imshow(values, cmap=colour_map, vmin=0.0, vmax=top, interpolation="nearest", aspect=aspect)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
