"""The four instruments: shape, colours and jaws.

Each is drawn in its own frame: origin at the tip, `u` along the shaft (forward is positive, the shaft lies at
negative u), `w` across it; lengths in units (see `drawing`). Heads are about a quarter of the view's diameter:
smaller ones do not survive a small VAE.

To add an instrument: one `_draw_*` function that returns `InstrumentPart`s, one row in `HEADS`, its motions in
`motion`, its targets in `scene_targets`, its words in `captions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lapwan.tiny import motion as paths
from lapwan.tiny.drawing import (
    Field,
    SceneCanvas,
    SceneColour,
    SceneWindow,
    blurred_shift,
    box,
    ease,
    ellipse,
    polygon,
    polyline,
    segment,
)

_FAR = 4.0  # units: the shaft's other end, outside every view


@dataclass(frozen=True)
class Pose:
    """Where an instrument is in one frame."""

    tip: np.ndarray  # [2] x, y in units
    axis: np.ndarray  # [2] unit vector along the shaft, towards the tip
    opening: float  # of the jaws, 0..1
    bend: float  # +1 or -1: the side to which the hook bends

    def local(self, window: SceneWindow) -> tuple[Field, Field]:
        """(u, w) of the window's pixels."""
        x, y = window.x_HW - self.tip[0], window.y_HW - self.tip[1]
        return x * self.axis[0] + y * self.axis[1], (-x * self.axis[1] + y * self.axis[0]) * self.bend

    def picture(self, points_uw: np.ndarray) -> np.ndarray:
        """Local points [n, 2] -> picture points [n, 2]."""
        normal = np.array([-self.axis[1], self.axis[0]]) * self.bend
        placed: np.ndarray = self.tip + points_uw[:, :1] * self.axis + points_uw[:, 1:] * normal
        return placed


@dataclass(frozen=True)
class Palette:
    """Colours of the instruments' materials, 0..255."""

    steel: SceneColour
    dark_steel: SceneColour
    ceramic: SceneColour
    wire: SceneColour
    tube: SceneColour
    shafts: dict[str, SceneColour]
    gloss: float  # strength of the highlights, 0..1


SURGICAL = Palette(steel=(226, 232, 240), dark_steel=(180, 188, 200), ceramic=(246, 240, 222), wire=(240, 186, 84),
                   tube=(176, 206, 226), gloss=1.0,
                   shafts={"scissors": (46, 46, 52), "hook": (62, 50, 46), "suction": (176, 206, 226),
                           "grasper": (38, 92, 168)})
_MATTE: SceneColour = (112, 116, 120)
NEUTRAL = Palette(steel=(150, 153, 156), dark_steel=(136, 139, 142), ceramic=(140, 143, 146), wire=(128, 131, 134),
                  tube=_MATTE, gloss=0.25, shafts=dict.fromkeys(("scissors", "hook", "suction", "grasper"), _MATTE))


@dataclass(frozen=True)
class InstrumentPart:
    """One piece of an instrument, over one window."""

    window: SceneWindow
    distance: Field
    colour: SceneColour
    across: Field | None = None  # -1..1 over a round piece, for its shading; None: flat metal
    gloss: float = 1.0
    outline: float = 0.55  # brightness at the very edge of a flat piece


def opening(instrument: str, motion: str, s: float) -> float:
    """How far the jaws are open at s: scissors snip about every fifth of a second, a grasper closes once and holds."""
    begin = paths.working_from(motion)
    work = paths.engaged(motion, s)
    if instrument == "scissors":
        if s < begin:
            return 0.35 + 0.65 * ease(s, 0.0, 0.8 * begin)
        snips = max(1, round((1.0 - begin) * 3.4))
        return 0.5 + 0.5 * math.cos(2 * math.pi * snips * work)
    if instrument == "grasper":
        wide = 0.55 + 0.45 * ease(s, 0.0, 0.5 * begin) if begin > 0 else 1.0
        return wide * (1.0 - ease(s, begin - 0.12, begin)) if begin > 0 else 0.0
    return 0.0


def _shaft(canvas: SceneCanvas, pose: Pose, end: float, radius: float, colour: SceneColour, gloss: float,
           w0: float = 0.0) -> InstrumentPart:
    u, w = pose.local(canvas.whole)
    distance = segment(u, w, (-_FAR, w0), (end, w0), radius)
    return InstrumentPart(canvas.whole, distance, colour, np.clip((w - w0) / radius, -1, 1) * pose.bend, gloss)


def _blade(u: Field, w: Field, hinge: float, gap: float, outline: np.ndarray) -> Field:
    """A jaw or blade from the hinge at (hinge, 0) to the point (0, gap): `outline` in (share of length, outward)."""
    length = math.hypot(hinge, gap)
    t_axis = np.array([-hinge, gap]) / length
    outward = np.array([-t_axis[1], t_axis[0]]) * (1.0 if gap >= 0 else -1.0)
    points = np.array([hinge, 0.0]) + outline[:, :1] * length * t_axis + outline[:, 1:] * outward
    return polygon(u, w, points)


_SCISSOR_HINGE = -0.60
_SCISSOR_BLADE = np.array([(-0.02, -0.03), (0.04, 0.060), (0.22, 0.098), (0.45, 0.096), (0.72, 0.062), (1.0, 0.0),
                           (0.6, -0.012), (0.15, -0.020)])


def _draw_scissors(canvas: SceneCanvas, pose: Pose, palette: Palette) -> list[InstrumentPart]:
    gap = 0.012 + 0.25 * pose.opening
    middle = pose.tip + pose.axis * (_SCISSOR_HINGE / 2)
    window = canvas.window(middle, 0.58)
    u, w = pose.local(window)
    steel, gloss = palette.steel, palette.gloss
    # Rounded by a little: a point of no width would vanish between the pixels.
    far = _blade(u, w, _SCISSOR_HINGE, -gap, _SCISSOR_BLADE) - 0.010
    near = _blade(u, w, _SCISSOR_HINGE, gap, _SCISSOR_BLADE) - 0.010
    clevis = segment(u, w, (_SCISSOR_HINGE - 0.18, 0.0), (_SCISSOR_HINGE + 0.02, 0.0), 0.088, 0.070)
    screw = np.hypot(u - _SCISSOR_HINGE, w)
    dim = tuple(0.80 * c for c in steel)
    return [
        _shaft(canvas, pose, _SCISSOR_HINGE - 0.20, 0.085, palette.shafts["scissors"], gloss),
        InstrumentPart(window, clevis, palette.dark_steel, np.clip(w / 0.08, -1, 1) * pose.bend, gloss),
        InstrumentPart(window, far, (dim[0], dim[1], dim[2]), gloss=gloss),
        InstrumentPart(window, near, steel, gloss=gloss),
        InstrumentPart(window, screw - 0.052, (70, 74, 82), gloss=0.0),
        InstrumentPart(window, screw - 0.026, steel, gloss=0.0),
    ]


_JAW_HINGE = -0.60
_TEETH = 4


def _jaw_outline(phase: float) -> np.ndarray:
    """`phase` +1 or -1: the two jaws' teeth are opposite, so that they fit into each other when closed."""
    edges = np.linspace(0.97, 0.28, 2 * _TEETH + 1)
    teeth = [(t, phase * (0.036 if i % 2 == 0 else -0.036)) for i, t in enumerate(edges)]
    back = [(0.0, -0.04), (0.0, 0.075), (0.15, 0.135), (0.45, 0.165), (0.80, 0.160), (0.97, 0.130), (1.04, 0.080),
            (1.03, 0.020)]
    return np.array(back + teeth)


_JAWS = {sign: _jaw_outline(sign) for sign in (1.0, -1.0)}
# The window of a fenestrated jaw.
_SLIT = np.array([(0.44, 0.096), (0.49, 0.122), (0.78, 0.122), (0.82, 0.096)])


def _draw_grasper(canvas: SceneCanvas, pose: Pose, palette: Palette) -> list[InstrumentPart]:
    gap = 0.006 + 0.24 * pose.opening
    middle = pose.tip + pose.axis * (_JAW_HINGE / 2)
    window = canvas.window(middle, 0.62)
    u, w = pose.local(window)
    gloss = palette.gloss
    jaws = []
    for sign, brightness in ((-1.0, 0.84), (1.0, 1.0)):
        jaw = _blade(u, w, _JAW_HINGE, sign * gap, _JAWS[sign])
        slit = _blade(u, w, _JAW_HINGE, sign * gap, _SLIT)
        dim = tuple(brightness * c for c in palette.dark_steel)
        jaws.append(InstrumentPart(window, np.maximum(jaw, -slit), (dim[0], dim[1], dim[2]), gloss=gloss, outline=0.45))
    clevis = box(u, w, _JAW_HINGE - 0.09, 0, 0.12, 0.105, 0.03)
    pin = np.hypot(u - _JAW_HINGE, w)
    return [
        _shaft(canvas, pose, _JAW_HINGE - 0.16, 0.100, palette.shafts["grasper"], gloss),
        *jaws,
        InstrumentPart(window, clevis, palette.dark_steel, np.clip(w / 0.105, -1, 1) * pose.bend, gloss),
        InstrumentPart(window, pin - 0.036, (60, 62, 70), gloss=0.0),
    ]


_HOOK_OFFSET = -0.30  # w of the stem: the tip is the end of the leg that sticks out sideways
_HOOK_WIRE = np.array([(-0.36, _HOOK_OFFSET), (0.0, _HOOK_OFFSET), (0.055, _HOOK_OFFSET + 0.03),
                       (0.075, _HOOK_OFFSET + 0.09), (0.06, -0.10), (0.0, 0.0)])


def _draw_hook(canvas: SceneCanvas, pose: Pose, palette: Palette) -> list[InstrumentPart]:
    middle = pose.picture(np.array([(-0.25, _HOOK_OFFSET / 2)]))[0]
    window = canvas.window(middle, 0.60)
    u, w = pose.local(window)
    wire = polyline(u, w, _HOOK_WIRE, 0.046)
    sleeve = box(u, w, -0.45, _HOOK_OFFSET, 0.14, 0.066, 0.02)
    across = np.clip((w - _HOOK_OFFSET) / 0.066, -1, 1) * pose.bend
    gloss = palette.gloss
    return [
        _shaft(canvas, pose, -0.58, 0.080, palette.shafts["hook"], gloss, _HOOK_OFFSET),
        InstrumentPart(window, sleeve, palette.ceramic, across, 0.4 * gloss),
        InstrumentPart(window, wire, palette.wire, gloss=gloss, outline=0.6),
    ]


def _draw_suction(canvas: SceneCanvas, pose: Pose, palette: Palette) -> list[InstrumentPart]:
    radius = 0.135
    u, w = pose.local(canvas.whole)
    # Flat-ended: the round face is the ellipse at the tip.
    tube = np.maximum(np.abs(w) - radius, u)
    across = np.clip(w / radius, -1, 1) * pose.bend
    window = canvas.window(pose.tip - 0.2 * pose.axis, 0.45)
    hu, hw = pose.local(window)
    rim = ellipse(hu, hw, 0.0, 0.0, 0.092, radius)
    hole = ellipse(hu, hw, 0.005, 0.0, 0.064, 0.098)
    vents = np.minimum(ellipse(hu, hw, -0.24, 0.045, 0.038, 0.030), ellipse(hu, hw, -0.40, -0.045, 0.038, 0.030))
    dark: SceneColour = (22, 14, 18)
    return [
        InstrumentPart(canvas.whole, tube, palette.tube, across, palette.gloss),
        InstrumentPart(window, rim, tuple(min(255.0, 1.2 * c) for c in palette.tube), gloss=0.0, outline=0.8),  # type: ignore[arg-type]
        InstrumentPart(window, hole, dark, gloss=0.0, outline=1.0),
        InstrumentPart(window, vents, dark, gloss=0.0, outline=1.0),
    ]


@dataclass(frozen=True)
class Head:
    """How to draw an instrument, and the local outline (u, w) of its head for the box."""

    draw: Callable[[SceneCanvas, Pose, Palette], list[InstrumentPart]]
    back: float  # u at which the head ends and the shaft begins
    half_width: Callable[[float], float]  # of the head, by opening
    shift: float = 0.0  # w of the head's middle


HEADS: dict[str, Head] = {
    "scissors": Head(_draw_scissors, -0.68, lambda o: 0.09 + 0.19 * o),
    "hook": Head(_draw_hook, -0.42, lambda o: 0.21, _HOOK_OFFSET / 2),
    "suction": Head(_draw_suction, -0.46, lambda o: 0.14),
    "grasper": Head(_draw_grasper, -0.68, lambda o: 0.17 + 0.20 * o),
}
INSTRUMENTS = tuple(HEADS)


def head_box(instrument: str, pose: Pose) -> np.ndarray:
    """x0, y0, x1, y1 in units around the head."""
    head = HEADS[instrument]
    half, front = head.half_width(pose.opening), 0.10 if instrument != "scissors" else 0.03
    corners = np.array([(u, head.shift + w) for u in (head.back, front) for w in (-half, half)])
    points = pose.picture(corners)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def draw(canvas: SceneCanvas, instrument: str, pose: Pose, palette: Palette) -> None:
    """Composite the instrument with its soft shadow."""
    parts = HEADS[instrument].draw(canvas, pose, palette)
    parts = [part for part in parts if part.distance.size]
    covers = [canvas.coverage(part.distance) for part in parts]
    silhouette = np.zeros(canvas.rgb_HWC.shape[:2], np.float32)
    for part, cover in zip(parts, covers, strict=True):
        target = silhouette[part.window.rows, part.window.columns]
        np.maximum(target, cover, out=target)
    shift = round(0.055 / canvas.pixel)
    shadow = blurred_shift(silhouette, shift, round(1.5 * shift), round(0.035 / canvas.pixel))
    canvas.shade(canvas.whole, 1.0 - 0.5 * shadow)
    # The light comes from the upper left of the picture, whatever the shaft's direction.
    towards_light = 1.0 if -pose.axis[1] * -0.5 + pose.axis[0] * -0.85 > 0 else -1.0
    for part, cover in zip(parts, covers, strict=True):
        canvas.paint(part.window, cover, _shading(part, towards_light))


def _shading(part: InstrumentPart, towards_light: float) -> np.ndarray:
    base = np.asarray(part.colour, np.float32)
    if part.across is None:
        # Flat ground metal: dark at the very edge, bright inside.
        inner = np.clip(-part.distance / 0.035, 0.0, 1.0)
        return base * (part.outline + (1.0 - part.outline) * inner)[..., None]
    across = part.across
    body = 0.42 + 0.58 * np.sqrt(np.maximum(1.0 - across * across, 0.0))
    highlight = np.exp(-(((across - 0.38 * towards_light) / 0.20) ** 2)) * (0.55 * part.gloss)
    colour: np.ndarray = base * body[..., None] + (255.0 - base) * highlight[..., None]
    return colour
