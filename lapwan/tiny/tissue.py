"""The background of a scene: tissue that breathes, wet glints, the round view and its vignette.

The tissue is painted once per scene as a texture somewhat larger and finer than the picture, then sampled for every
frame at coordinates displaced by breathing and pulse. Units and suffixes as in `drawing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lapwan.tiny.drawing import Field, SceneCanvas, SceneColour, grid_noise, polyline, smoothstep

VIEW_RADIUS = 1.03  # units: the black ring just touches the picture's shorter sides
_MARGIN = 0.16  # units of texture beyond the picture, so that displaced coordinates stay on it
_FINENESS = 1.4  # texels per pixel


@dataclass(frozen=True)
class Ground:
    """Colours and details of the tissue."""

    base: tuple[SceneColour, ...]  # two are drawn from these and mixed
    lobe: tuple[SceneColour, ...]
    fat: SceneColour
    fine_vessel: SceneColour
    fat_clusters: int  # at most
    wet: float  # strength of reflections
    round_view: bool


SURGICAL = Ground(base=((206, 98, 92), (190, 80, 78), (216, 120, 106), (222, 136, 122), (178, 70, 66)),
                  lobe=((124, 42, 40), (142, 56, 44), (196, 110, 92), (150, 60, 66)),
                  fat=(226, 182, 92), fine_vessel=(150, 26, 34), fat_clusters=3, wet=1.0, round_view=True)
NEUTRAL = Ground(base=((188, 196, 202), (204, 206, 200), (176, 190, 196), (198, 200, 210)),
                 lobe=((160, 174, 182), (184, 184, 174), (168, 170, 184)),
                 fat=(210, 206, 186), fine_vessel=(170, 178, 186), fat_clusters=1, wet=0.0, round_view=False)


class Tissue:
    """The ground of one scene; everything random about it comes from `rng`."""

    def __init__(self, rng: np.random.Generator, ground: Ground, canvas: SceneCanvas) -> None:
        self._canvas, self._ground = canvas, ground
        self._period = rng.uniform(2.4, 3.6)  # seconds a breath
        self._phase = rng.uniform(0, 2 * math.pi)
        angle = rng.uniform(0, 2 * math.pi)
        self._sway = np.array([math.cos(angle), math.sin(angle)]) * rng.uniform(0.035, 0.06)
        self._pulse_phase = rng.uniform(0, 2 * math.pi)
        self._glints = _scatter_glints(rng) if ground.wet else []
        self._texel = canvas.pixel / _FINENESS
        self._width = math.ceil(2 * (canvas.half_width + _MARGIN) / self._texel) + 1
        self._height = math.ceil(2 * (canvas.half_height + _MARGIN) / self._texel) + 1
        xs = np.arange(self._width, dtype=np.float32) * self._texel - (canvas.half_width + _MARGIN)
        ys = np.arange(self._height, dtype=np.float32) * self._texel - (canvas.half_height + _MARGIN)
        x_HW, y_HW = np.meshgrid(xs, ys)
        self._texture = _paint(rng, ground, x_HW, y_HW, self._texel).reshape(-1, 3)
        radius = np.hypot(canvas.whole.x_HW, canvas.whole.y_HW)
        if ground.round_view:
            self._light = canvas.coverage(radius - VIEW_RADIUS) * (1.10 - 0.52 * np.minimum(radius, 1.2) ** 2.2)
        else:
            self._light = (1.04 - 0.10 * radius * radius).astype(np.float32)
        self._stretch = grid_noise(rng, 3, canvas.whole.x_HW, canvas.whole.y_HW, 2.0)

    def displacement(self, seconds: float) -> np.ndarray:
        """[2] displacement of the tissue at the picture's centre, in units."""
        breath = math.sin(2 * math.pi * seconds / self._period + self._phase)
        pulse = 0.006 * math.sin(2 * math.pi * 1.2 * seconds + self._pulse_phase)
        moved: np.ndarray = self._sway * breath + np.array([0.0, pulse])
        return moved

    def paint(self, seconds: float) -> None:
        """Fill the canvas with the tissue at this time."""
        whole = self._canvas.whole
        dx, dy = self.displacement(seconds)
        uneven = 1.0 + 0.35 * self._stretch
        half_width, half_height = self._canvas.half_width + _MARGIN, self._canvas.half_height + _MARGIN
        u = np.clip((whole.x_HW - dx * uneven + half_width) / self._texel, 0, self._width - 1.001)
        v = np.clip((whole.y_HW - dy * uneven + half_height) / self._texel, 0, self._height - 1.001)
        i, j = u.astype(np.int32), v.astype(np.int32)
        fu, fv = (u - i)[..., None], (v - j)[..., None]
        at = j * self._width + i
        texture = self._texture
        top = texture[at] + fu * (texture[at + 1] - texture[at])
        at += self._width
        bottom = texture[at] + fu * (texture[at + 1] - texture[at])
        self._canvas.rgb_HWC[...] = top + fv * (bottom - top)

    def glint(self, seconds: float) -> None:
        """Wet reflections: they follow the tissue half as far, because the light travels with the camera."""
        dx, dy = 0.5 * self.displacement(seconds)
        for x, y, size, turn, phase, rate in self._glints:
            window = self._canvas.window((x + dx, y + dy), 3.2 * size)
            if not window.x_HW.size:
                continue
            px, py = window.x_HW - x - dx, window.y_HW - y - dy
            along = px * math.cos(turn) + py * math.sin(turn)
            over = -px * math.sin(turn) + py * math.cos(turn)
            power = 0.62 + 0.38 * math.sin(phase + rate * seconds)
            spot = np.exp(-((along / (1.5 * size)) ** 2 + (over / (0.7 * size)) ** 2))
            self._canvas.glow(window, spot * (215.0 * power * self._ground.wet), (1.0, 0.97, 0.92))

    def see_through_scope(self) -> None:
        """Vignette, and black outside the round view."""
        self._canvas.shade(self._canvas.whole, self._light)


def _scatter_glints(rng: np.random.Generator) -> list[tuple[float, ...]]:
    return [(rng.normal(0, 0.42), rng.normal(0, 0.42), rng.uniform(0.012, 0.030), rng.uniform(0, math.pi),
             rng.uniform(0, 2 * math.pi), rng.uniform(2, 6)) for _ in range(int(rng.integers(9, 16)))]


def _paint(rng: np.random.Generator, ground: Ground, x: Field, y: Field, texel: float) -> np.ndarray:
    """The texture [H, W, 3]: soft tissue, a lobe, fat, fine vessels, lit by their relief from the upper left."""
    reach = float(max(np.abs(x).max(), np.abs(y).max())) + 0.05
    coarse, medium = grid_noise(rng, 4, x, y, reach), grid_noise(rng, 9, x, y, reach)
    fine = grid_noise(rng, 30, x, y, reach)
    first, second = rng.choice(len(ground.base), 2, replace=False)
    mix = smoothstep(-0.5, 0.5, coarse + 0.4 * medium)[..., None]
    colour = np.asarray(ground.base[first], np.float32) * (1 - mix) + np.asarray(ground.base[second], np.float32) * mix
    colour = colour * (1.0 + 0.035 * fine)[..., None]
    height = 0.05 * coarse + 0.035 * medium + 0.006 * fine

    colour, height = _lobe(rng, ground, x, y, medium, fine, colour, height)
    colour = _fine_vessels(rng, ground, x, y, reach, texel, colour)
    colour, height = _fat(rng, ground, x, y, fine, colour, height)

    slope_y, slope_x = np.gradient(height, texel)
    lit = np.clip(1.0 + 0.55 * (0.5 * slope_x + 0.8 * slope_y), 0.55, 1.35)
    # Reflections where the relief faces the camera's light; broken up by the fine noise.
    facing = np.exp(-((slope_x + 0.10) ** 2 + (slope_y + 0.14) ** 2) / 0.006)
    wet = ground.wet * 60.0 * facing * smoothstep(-0.1, 0.7, fine)
    texture: np.ndarray = (colour * lit[..., None] + wet[..., None]).astype(np.float32)
    return texture


def _lobe(rng: np.random.Generator, ground: Ground, x: Field, y: Field, medium: Field, fine: Field,
          colour: np.ndarray, height: Field) -> tuple[np.ndarray, Field]:
    """An organ's edge across one part of the view."""
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.28, 0.75)
    inside = x * math.cos(angle) + y * math.sin(angle) - depth + 0.16 * medium
    inside = inside + 0.10 * np.sin(3.0 * (-x * math.sin(angle) + y * math.cos(angle)) + rng.uniform(0, 6))
    alpha = smoothstep(-0.015, 0.015, inside)[..., None]
    tone = np.asarray(ground.lobe[rng.integers(len(ground.lobe))], np.float32) * (1.0 + 0.05 * fine)[..., None]
    shadow = 1.0 - 0.35 * np.exp(-np.maximum(-inside, 0.0) / 0.07)[..., None] * (1 - alpha)
    bulge = 0.12 * (1.0 - np.exp(-np.maximum(inside, 0.0) / 0.10))
    return colour * shadow * (1 - alpha) + tone * alpha, height + bulge


def _fine_vessels(rng: np.random.Generator, ground: Ground, x: Field, y: Field, reach: float, texel: float,
                  colour: np.ndarray) -> np.ndarray:
    """A web of capillaries where two noises cross zero, and two larger vessels."""
    web = np.minimum(np.abs(grid_noise(rng, 6, x, y, reach)), np.abs(grid_noise(rng, 8, x, y, reach)))
    alpha = 0.32 * np.exp(-((web / 0.045) ** 2))
    for _ in range(2):
        angle, shift = rng.uniform(0, math.pi), rng.uniform(-0.7, 0.7)
        along = np.linspace(-1.2 * reach, 1.2 * reach, 9)
        over = shift + 0.12 * np.sin(along * rng.uniform(2, 3.5) + rng.uniform(0, 6))
        points = np.stack([along * math.cos(angle) - over * math.sin(angle),
                           along * math.sin(angle) + over * math.cos(angle)], axis=1)
        distance = polyline(x, y, points, rng.uniform(0.012, 0.022))
        alpha = np.maximum(alpha, 0.7 * np.clip(0.5 - distance / (1.5 * texel), 0, 1))
    painted: np.ndarray = colour + alpha[..., None] * (np.asarray(ground.fine_vessel, np.float32) - colour)
    return painted


def _fat(rng: np.random.Generator, ground: Ground, x: Field, y: Field, fine: Field, colour: np.ndarray,
         height: Field) -> tuple[np.ndarray, Field]:
    """Clusters of yellow lobules towards the rim."""
    lumps = np.zeros_like(x)
    for _ in range(int(rng.integers(1, ground.fat_clusters + 1))):
        angle, away = rng.uniform(0, 2 * math.pi), rng.uniform(0.66, 1.0)
        for _ in range(8):
            cx = away * math.cos(angle) + rng.normal(0, 0.12)
            cy = away * math.sin(angle) + rng.normal(0, 0.12)
            size = rng.uniform(0.07, 0.15)
            lumps = np.maximum(lumps, np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (size * size)))
    alpha = smoothstep(0.22, 0.34, lumps)[..., None]
    shine = np.asarray(ground.fat, np.float32) * (0.80 + 0.24 * lumps + 0.05 * fine)[..., None]
    return colour + alpha * (shine - colour), height + 0.05 * lumps * alpha[..., 0]
