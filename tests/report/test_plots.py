"""Plots hold their data: the right colour in each cell, counts, no text cut off or over another, equal bytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from lapwan.report import plots

KEYS = ("scissors", "hook", "suction", "other")
ZH = {"scissors": "剪刀", "hook": "电凝钩"}
COLOURS = {"high": plots.VERMILION, "low": plots.BLUE}


def pixel(image: Image.Image, axes: Axes, x: float, y: float) -> tuple[int, ...]:
    """The colour at a point given in the axes' data."""
    across, up = axes.transData.transform((x, y))
    return image.getpixel((round(across), image.height - 1 - round(up)))


def rgb(colour: object) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(colour))


def near(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return max(abs(p - q) for p, q in zip(a, b, strict=True)) <= 3


def drawn(draw: Callable[[Axes], None], width: float = 5, height: float = 4) -> tuple[Image.Image, Axes]:
    """An image of one chart, checked for text that is cut off or over other text, and its axes."""
    kept: list[Axes] = []

    def on(figure: Figure) -> None:
        kept.append(figure.subplots())
        draw(kept[0])

    image = plots.render(on, width, height, dpi=100)
    assert image.size == (round(100 * width), round(100 * height))
    figure = kept[0].get_figure()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
              if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
              for label in (tick.label1, tick.label2)}
    extents = {}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text not in hidden:
            extents[text] = text.get_window_extent()
            inside = extents[text].padded(-1)
            assert inside.x0 >= 0 and inside.y0 >= 0 and inside.x1 <= image.width and inside.y1 <= image.height, text
    for axis in (kept[0].xaxis, kept[0].yaxis):
        labels = [extents[label] for label in axis.get_ticklabels() if label in extents and not label.get_rotation()]
        assert not any(a.overlaps(b) for n, a in enumerate(labels) for b in labels[:n])
    return image, kept[0]


def test_a_heat_map_puts_each_value_in_its_cell():
    values = {("0", "a"): 0.0, ("0", "b"): 2.0, ("1", "a"): 1.0}
    image, axes = drawn(lambda axes: plots.heat_map(axes, "t", ["a", "b"], ["0", "1"], values, 2.0) and None)
    viridis = matplotlib.colormaps["viridis"]
    for (row, column), share in {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5}.items():
        assert near(pixel(image, axes, column, row), rgb(viridis(share)[:3]))
    assert near(pixel(image, axes, 1, 1), rgb(plots.MISSING))
    assert "grey" in axes.get_xlabel()


@pytest.mark.parametrize("blocks", [1, 40, 400])
def test_a_heat_map_of_many_blocks_is_readable(blocks):
    columns = [f"cross_attn.{n}" for n in range(10)]
    rows = [str(block) for block in range(blocks)]
    cells = {(row, column): 1.0 for row in rows for column in columns}
    _, axes = drawn(lambda axes: plots.heat_map(axes, "t", columns, rows, cells, 1.0) and None, 5, 8)
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == rows[: 18 : max(1, -(-blocks // 48))][:2]
    assert axes.get_xlabel() == ""


@pytest.mark.parametrize("families", [1, 2, 4, 12, 20])
def test_a_confusion_matrix_has_counts_labels_and_colours_by_row(families):
    labels = [f"family_of_instruments_{n}" for n in range(families)]
    counts = np.arange(families**2).reshape(families, families) * 7
    image, axes = drawn(lambda axes: plots.confusion(axes, "t", labels, counts, "clips"),
                        *plots.confusion_size(families))
    texts = [text.get_text() for text in axes.texts]
    assert texts == ([str(count) for count in counts.flatten()] if families <= 16 else [])
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    blues = matplotlib.colormaps["Blues"]
    for row in range(min(families, 3)):
        want = rgb(blues(counts[row, -1] / counts[row].sum())[:3]) if counts[row].any() else rgb(plots.MISSING)
        assert near(pixel(image, axes, families - 1 - 0.4, row - 0.4), want)
    bar = axes.get_figure().axes[1]
    assert bar.get_ylabel() == "share of the label's clips" and bar.get_ylim() == (0, 1)


def test_lines_levels_and_a_legend_that_covers_nothing():
    series = {"high": [(step, 1 + step / 1e4) for step in range(0, 20001, 1000)], "low": [(0, 0.5), (20000, np.nan)]}
    image, axes = drawn(lambda axes: plots.line_chart(axes, "mean|B|", series, COLOURS, "step", "mean|B|",
                                                      {"wanted for motion": 4.0}))
    assert near(pixel(image, axes, 10000, 2.0), rgb(plots.VERMILION))
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 4
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["high", "low", "wanted for motion"]
    assert legend.get_title().get_text() == "mean|B|"
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "mean|B|")
    assert "10000" in [label.get_text() for label in axes.get_xticklabels()]


def test_many_families_share_no_line():
    names = [f"a_family_with_a_long_name_{n}" for n in range(12)]
    colours = {name: plots.PALETTE[n % len(plots.PALETTE)] for n, name in enumerate(names)}
    series = {name: [(0, n / 12), (1, n / 12)] for n, name in enumerate(names)}
    _, axes = drawn(lambda axes: plots.line_chart(axes, "usage", series, colours, "step", "share"), 5.5, 4)
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_lines_of_no_or_one_value():
    for points in ([], [(3.0, 0.0)], [(3.0, -2.0)], [(3.0, np.nan)], [(1, 5e5), (2, 5e5)]):
        drawn(lambda axes, points=points: plots.line_chart(axes, "t", {"high": points}, COLOURS, "step", "y"))


def test_intervals_in_rows():
    estimates = {"high": (0.5, 0.25, 1.0), "low": (np.nan, np.nan, np.nan)}
    image, axes = drawn(lambda axes: plots.intervals(axes, "psnr", estimates, COLOURS, 0.9))
    assert near(pixel(image, axes, 0.3, 0), rgb(plots.VERMILION)) and near(pixel(image, axes, 0.3, 1), (255, 255, 255))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "low"]
    assert not near(pixel(image, axes, 0.9, 1.2), (255, 255, 255)) or not near(
        pixel(image, axes, 0.9, 1.24), (255, 255, 255))  # a dash or the other
    assert plots.shortened("a" * 40 + "step_100") == "a" * 14 + "…" + "a" * 7 + "step_100"


def test_equal_data_are_equal_bytes_whatever_the_users_style():
    def picture() -> bytes:
        return plots.render(lambda figure: plots.confusion(figure.subplots(), "t", KEYS, np.eye(4) * 3, "clips"), 4, 3
                            ).tobytes()

    before = dict(matplotlib.rcParams)
    first = picture()
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "figure.dpi": 30}):
        assert picture() == first
    assert len(set(zip(*[iter(first)] * 3, strict=True))) > 20  # colours: it is no empty picture


@pytest.fixture
def no_other_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system with matplotlib's own fonts alone."""
    monkeypatch.setattr(fontManager, "ttflist", [font for font in fontManager.ttflist if "DejaVu" in font.name])
    plots._glyphs.cache_clear()
    yield
    plots._glyphs.cache_clear()


def labelled() -> tuple[Image.Image, list[str]]:
    labels = plots.family_labels(KEYS, ZH)
    return drawn(lambda axes: plots.confusion(axes, "t", labels, np.eye(4), "clips"))[0], labels


def test_without_a_font_for_chinese_labels_are_the_keys(no_other_fonts, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        labels = labelled()[1]
    assert labels == list(KEYS)
    assert plots.drawable("混合", "adapter 2") == "adapter 2" and plots.drawable("σ, é", "x") == "σ, é"
    logging.getLogger("matplotlib.font_manager").warning("findfont: nothing")
    assert capfd.readouterr() == ("", "")


def test_with_a_font_for_chinese_labels_have_the_names(no_other_fonts, tmp_path: Path):
    plain, _ = labelled()
    fontManager.addfont(chinese_font(tmp_path / "font.ttf", "WenQuanYi Zen Hei", "剪刀电凝钩"))
    plots._glyphs.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        image, labels = labelled()
    assert labels == ["scissors 剪刀", "hook 电凝钩", "suction", "other"]
    assert image.tobytes() != plain.tobytes()


def chinese_font(path: Path, family: str, characters: str) -> Path:
    """A font whose characters are all the same square."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(character):04X}" for character in characters)]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(character): name for character, name in zip(characters, names[1:], strict=True)})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": family, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return path
