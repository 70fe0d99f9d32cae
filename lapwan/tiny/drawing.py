"""Anti-aliased drawing with signed distance fields, in numpy.

Lengths are in *units*: half the shorter side of the picture, origin at its centre, x to the right, y down. So one scene
looks the same at every resolution. A distance field d is negative inside; its coverage of a pixel is
`clip(1/2 - d / pixel, 0, 1)`.

Suffixes: H, W pixels; `_HW` a field over the picture or over a window of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Field = np.ndarray  # float32, over the picture or a window of it
SceneColour = tuple[float, float, float]  # 0..255
Point = np.ndarray | tuple[float, float]  # x, y


@dataclass(frozen=True)
class SceneWindow:
    """A rectangle of the picture with the coordinates of its pixel centres."""

    rows: slice
    columns: slice
    x_HW: Field
    y_HW: Field


class SceneCanvas:
    """A float picture to composite on; values 0..255."""

    def __init__(self, height: int, width: int) -> None:
        self.pixel = 2.0 / min(height, width)  # units
        self.half_width, self.half_height = width * self.pixel / 2, height * self.pixel / 2
        self._xs = ((np.arange(width) + 0.5) * self.pixel - self.half_width).astype(np.float32)
        self._ys = ((np.arange(height) + 0.5) * self.pixel - self.half_height).astype(np.float32)
        self.rgb_HWC = np.zeros((height, width, 3), np.float32)
        self.whole = self._window(slice(0, height), slice(0, width))

    def _window(self, rows: slice, columns: slice) -> SceneWindow:
        x_HW, y_HW = np.meshgrid(self._xs[columns], self._ys[rows])
        return SceneWindow(rows, columns, x_HW, y_HW)

    def window(self, centre: Point, radius: float) -> SceneWindow:
        """The part of the picture within `radius` of `centre`; it may be empty."""
        x, y = centre
        left, right = np.searchsorted(self._xs, (x - radius, x + radius))
        top, bottom = np.searchsorted(self._ys, (y - radius, y + radius))
        return self._window(slice(int(top), int(bottom)), slice(int(left), int(right)))

    def coverage(self, distance: Field) -> Field:
        """The share of each pixel that lies inside."""
        return np.clip(0.5 - distance / self.pixel, 0.0, 1.0)

    def paint(self, window: SceneWindow, alpha: Field, colour: SceneColour | np.ndarray) -> None:
        """`rgb <- rgb + alpha (colour - rgb)`; `colour` is one colour or [h, w, 3] over the window."""
        part = self.rgb_HWC[window.rows, window.columns]
        part += alpha[..., None] * (np.asarray(colour, np.float32) - part)

    def shade(self, window: SceneWindow, factor: Field) -> None:
        """`rgb <- rgb * factor`."""
        self.rgb_HWC[window.rows, window.columns] *= factor[..., None]

    def glow(self, window: SceneWindow, strength: Field, colour: SceneColour) -> None:
        """`rgb <- rgb + strength * colour`: light that adds."""
        self.rgb_HWC[window.rows, window.columns] += strength[..., None] * np.asarray(colour, np.float32)


def segment(x: Field, y: Field, a: Point, b: Point, radius_a: float, radius_b: float | None = None) -> Field:
    """Distance to a line from a to b with round ends, its radius running from `radius_a` to `radius_b`."""
    (ax, ay), (bx, by) = a, b
    dx, dy = bx - ax, by - ay
    along = np.clip(((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-9), 0.0, 1.0)
    radius = radius_a if radius_b is None else radius_a + (radius_b - radius_a) * along
    return np.hypot(x - ax - along * dx, y - ay - along * dy) - radius


def polyline(x: Field, y: Field, points: np.ndarray, radius: float) -> Field:
    """Distance to a chain of segments through `points` [n, 2]."""
    distance = segment(x, y, points[0], points[1], radius)
    for a, b in pairwise(points[1:]):
        distance = np.minimum(distance, segment(x, y, a, b, radius))
    return distance


def polygon(x: Field, y: Field, points: np.ndarray) -> Field:
    """Signed distance to a simple closed polygon through `points` [n, 2]."""
    squared = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey + 1e-12), 0.0, 1.0)
        squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        # Even-odd rule: each edge that a ray to the right crosses turns inside into outside.
        if ay != by:
            crosses = ((y >= ay) != (y >= by)) & (wx < ex * wy / ey)
            inside ^= crosses
    distance: Field = np.sqrt(squared) * np.where(inside, np.float32(-1), np.float32(1))
    return distance


def ellipse(x: Field, y: Field, cx: float, cy: float, rx: float, ry: float) -> Field:
    """Distance to an ellipse with axes along x and y, exact on its outline and close to it nearby."""
    u, v = (x - cx) / rx, (y - cy) / ry
    k0 = np.hypot(u, v)
    k1 = np.hypot(u / rx, v / ry)
    return k0 * (k0 - 1.0) / np.maximum(k1, 1e-6)


def box(x: Field, y: Field, cx: float, cy: float, half_x: float, half_y: float, corner: float = 0.0) -> Field:
    """Distance to a rectangle with rounded corners."""
    u = np.abs(x - cx) - (half_x - corner)
    v = np.abs(y - cy) - (half_y - corner)
    return np.hypot(np.maximum(u, 0.0), np.maximum(v, 0.0)) + np.minimum(np.maximum(u, v), 0.0) - corner


def blurred_shift(mask_HW: Field, dx: int, dy: int, radius: int) -> Field:
    """`mask_HW` moved by (dx, dy) >= 0 pixels and blurred by two box filters of 2 radius + 1 pixels."""
    height, width = mask_HW.shape
    field = np.zeros_like(mask_HW)
    field[dy:, dx:] = mask_HW[:height - dy, :width - dx]
    if radius < 1:
        return field
    for axis in (0, 1, 0, 1):
        edge = [(radius + 1, radius) if a == axis else (0, 0) for a in (0, 1)]
        sums = np.cumsum(np.pad(field, edge), axis=axis, dtype=np.float32)
        length = field.shape[axis]
        window = 2 * radius + 1
        field = (np.take(sums, range(window, window + length), axis) - np.take(sums, range(length), axis)) / window
    return field


def smoothstep(low: float, high: float, value: Field) -> Field:
    """0 below `low`, 1 above `high`, `3t² - 2t³` between; `low` > `high` falls instead of rising."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def ease(value: float, low: float, high: float) -> float:
    """`smoothstep` of one number."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


def grid_noise(rng: np.random.Generator, cells: int, x: Field, y: Field, extent: float) -> Field:
    """Smooth noise in -1..1: random values on a grid of `cells` over [-extent, extent]², smoothly joined.

    The grid is turned by a random angle, so that its rows do not show in a sum of several.
    """
    turn = rng.uniform(0, math.pi)
    size = math.ceil(1.5 * cells)
    values = rng.uniform(-1.0, 1.0, (size + 2, size + 2)).astype(np.float32)
    scale = cells / (2 * extent)
    u = np.clip((x * math.cos(turn) - y * math.sin(turn)) * scale + size / 2, 0.0, size - 1e-3)
    v = np.clip((x * math.sin(turn) + y * math.cos(turn)) * scale + size / 2, 0.0, size - 1e-3)
    i, j = u.astype(np.int32), v.astype(np.int32)
    fu, fv = u - i, v - j
    fu, fv = (f * f * f * (f * (6 * f - 15) + 10) for f in (fu, fv))
    top = values[j, i] + fu * (values[j, i + 1] - values[j, i])
    bottom = values[j + 1, i] + fu * (values[j + 1, i + 1] - values[j + 1, i])
    return top + fv * (bottom - top)
