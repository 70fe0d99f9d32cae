"""Line charts and heat maps drawn with Pillow: enough for a diagnostic picture, without a plotting library.

Everything is drawn at twice its size and scaled down at the end, for antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE = 2
INK, FAINT, GRID = (40, 40, 40), (120, 120, 120), (228, 228, 228)
# Anchors of a perceptually uniform colour map, dark to light, and the colour of a missing cell.
_RAMP = ((28, 20, 70), (52, 80, 140), (38, 130, 142), (72, 185, 110), (250, 230, 60))
_EMPTY = (240, 240, 240)

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the finished image."""

    left: float
    top: float
    right: float
    bottom: float


class Canvas:
    """A white image of `width` x `height` pixels."""

    def __init__(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._fonts: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}

    def finish(self) -> Image.Image:
        """The image at its final size."""
        return self._image.resize(self._size, Image.Resampling.LANCZOS)

    def text(self, x: float, y: float, text: str, anchor: str = "la", size: int = 12, colour: Colour = INK) -> None:
        """Draw text. `anchor` as in Pillow: horizontal l, m, r; vertical a (top), m, s (baseline), d (bottom)."""
        font = self._fonts.setdefault(size, ImageFont.load_default(size * _SCALE))
        self._draw.text((x * _SCALE, y * _SCALE), text, fill=colour, font=font, anchor=anchor)

    def upright(self, x: float, bottom: float, text: str, size: int = 11) -> None:
        """Draw text rotated to read upwards, its centre at `x`, its start at `bottom`."""
        font = self._fonts.setdefault(size, ImageFont.load_default(size * _SCALE))
        left, top, right, lower = font.getbbox(text)
        label = Image.new("L", (math.ceil(right - left), math.ceil(lower - top)), 0)
        ImageDraw.Draw(label).text((-left, -top), text, fill=255, font=font)
        rotated = label.rotate(90, expand=True)
        corner = (round(x * _SCALE - rotated.width / 2), round(bottom * _SCALE - rotated.height))
        self._image.paste(INK, (*corner, corner[0] + rotated.width, corner[1] + rotated.height), rotated)

    def line(self, points: Points, colour: Colour, width: float = 1) -> None:
        """Draw a polyline."""
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * _SCALE)), joint="curve")

    def dot(self, x: float, y: float, colour: Colour, radius: float = 2.5) -> None:
        """Draw a filled circle."""
        box = [(v * _SCALE) for v in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(box, fill=colour)

    def rectangle(self, box: Box, colour: Colour) -> None:
        """Draw a filled rectangle."""
        self._draw.rectangle([round(box.left * _SCALE), round(box.top * _SCALE), round(box.right * _SCALE) - 1,
                              round(box.bottom * _SCALE) - 1], fill=colour)

    def line_chart(
        self, box: Box, title: str, series: Mapping[str, Points], colours: Mapping[str, Colour], x_name: str,
        marks: Mapping[str, float] | None = None,
    ) -> None:
        """Draw lines with dots over a common x axis, with a legend above; `marks` are named dashed levels."""
        marks = marks or {}
        xs = [x for points in series.values() for x, _ in points]
        ys = [y for points in series.values() for _, y in points] + list(marks.values())
        x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(0.0, *ys), max(ys))
        plot = Box(box.left + 56, box.top + 54, box.right - 8, box.bottom - 38)

        def to_pixels(x: float, y: float) -> tuple[float, float]:
            across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
            up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
            return plot.left + across * (plot.right - plot.left), plot.bottom - up * (plot.bottom - plot.top)

        self.text(box.left, box.top, title, size=14)
        for y in y_ticks:
            height = to_pixels(x_ticks[0], y)[1]
            self.line([(plot.left, height), (plot.right, height)], GRID)
            self.text(plot.left - 6, height, number(y), "rm", 11, FAINT)
        for x in x_ticks:
            at = to_pixels(x, y_ticks[0])[0]
            self.line([(at, plot.bottom), (at, plot.bottom + 4)], FAINT)
            self.text(at, plot.bottom + 7, number(x), "ma", 11, FAINT)
        self.line([(plot.left, plot.bottom), (plot.right, plot.bottom)], FAINT)
        self.text((plot.left + plot.right) / 2, plot.bottom + 22, x_name, "ma", 11, FAINT)
        for name, level in marks.items():
            self._dashed(plot, to_pixels(x_ticks[0], level)[1], name)
        for name, points in series.items():
            pixels = [to_pixels(x, y) for x, y in points]
            self.line(pixels, colours[name], 2)
            for x, y in pixels:
                self.dot(x, y, colours[name], 3)
        self._legend(box.left, box.top + 24, series, colours)

    def _dashed(self, plot: Box, height: float, name: str) -> None:
        x = plot.left
        while x < plot.right:
            self.line([(x, height), (min(x + 6, plot.right), height)], FAINT)
            x += 10
        self.text(plot.right, height - 2, name, "rd", 11, FAINT)

    def _legend(self, left: float, top: float, names: Mapping[str, object], colours: Mapping[str, Colour]) -> None:
        for name in names:
            self.line([(left, top + 7), (left + 18, top + 7)], colours[name], 2)
            self.text(left + 24, top, name, size=12)
            left += 40 + 7 * len(name)

    def heat_map(
        self, box: Box, title: str, columns: Sequence[str], rows: Sequence[str],
        values: Mapping[tuple[str, str], float], top_value: float,
    ) -> None:
        """Draw cells (row, column) from 0 to `top_value`; missing ones are grey. Column names are vertical, below."""
        plot = Box(box.left + 40, box.top + 24, box.right - 8, box.bottom - 92)
        wide, high = (plot.right - plot.left) / len(columns), (plot.bottom - plot.top) / len(rows)
        self.text(box.left, box.top, title, size=14)
        every = max(1, math.ceil(12 / high))  # so that row names do not overlap
        for i, row in enumerate(rows):
            if i % every == 0:
                self.text(plot.left - 6, plot.top + (i + 0.5) * high, row, "rm", 11, FAINT)
            for j, column in enumerate(columns):
                value = values.get((row, column))
                colour = _EMPTY if value is None else ramp(value / top_value if top_value > 0 else 0.0)
                self.rectangle(Box(plot.left + j * wide, plot.top + i * high, plot.left + (j + 1) * wide,
                                   plot.top + (i + 1) * high), colour)
        for j, column in enumerate(columns):
            width = self._fonts.setdefault(11, ImageFont.load_default(11 * _SCALE)).getlength(column) / _SCALE
            self.upright(plot.left + (j + 0.5) * wide, plot.bottom + 6 + width, column)

    def colour_bar(self, box: Box, top_value: float, name: str) -> None:
        """Draw the vertical scale of a heat map, from 0 to `top_value`, with its name above."""
        steps = 64
        high = (box.bottom - box.top) / steps
        for n in range(steps):
            self.rectangle(Box(box.left, box.bottom - (n + 1) * high, box.right, box.bottom - n * high),
                           ramp((n + 0.5) / steps))
        for value in ticks(0.0, top_value):
            if value <= top_value * 1.001:
                height = box.bottom - value / (top_value or 1.0) * (box.bottom - box.top)
                self.text(box.right + 5, height, number(value), "lm", 11, FAINT)
        self.text(box.left, box.top - 8, name, "ld", 11, FAINT)


def ramp(share: float) -> Colour:
    """The colour of the map at `share` in 0..1."""
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    part = position - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_RAMP[index], _RAMP[index + 1], strict=True))
    return red, green, blue


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from at or below `low` to at or above `high`, in steps of 1, 2 or 5 times a power of ten."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """Four significant digits, without trailing zeros."""
    return f"{value:.4g}"
