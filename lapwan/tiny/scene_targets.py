"""Targets of the instruments (tissue, vessel, bag, blood...) and the traces of the work: cuts, scorch marks, smoke.

Units and suffixes as in `drawing`. To add a target: a `_draw_*` function, a row in `_DRAW`, its words in `captions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lapwan.tiny.drawing import (
    Field,
    SceneCanvas,
    SceneColour,
    SceneWindow,
    ellipse,
    polygon,
    polyline,
    segment,
    smoothstep,
)

# Targets of each instrument; the first is the default, the only one that a caption may omit.
TARGETS: dict[str, tuple[str, ...]] = {
    "scissors": ("tissue", "vessel", "adhesion", "ligament"),
    "hook": ("vessel", "tissue", "adhesion", "gallbladder", "ligament"),
    "suction": ("blood", "fluid"),
    "grasper": ("bag", "gallbladder", "tissue", "ligament"),
}
_LONG = 2.5  # units: vessels and ligaments extend beyond the view


@dataclass(frozen=True)
class Work:
    """The state of the work in one frame."""

    anchor: np.ndarray  # [2] where the target lies in the tissue, in units
    tip: np.ndarray  # [2] the instrument's tip
    axis: np.ndarray  # [2] the shaft's direction at the start
    heading: np.ndarray  # [2] unit vector of the work's direction: strands lie across it
    begin: np.ndarray  # [2] where the work began
    pull: np.ndarray  # [2] how far a held target has been drawn from the anchor
    progress: float  # 0 = untouched, 1 = done
    cut: float  # 0 = whole, 1 = cut through
    shape: np.ndarray  # [8] fixed random numbers 0..1 of the scene: the target's individual form


def _window(canvas: SceneCanvas, work: Work, reach: float) -> SceneWindow:
    middle = work.anchor + work.pull / 2
    return canvas.window(middle, reach + float(np.abs(work.pull).max()) / 2)


def _frame(window: SceneWindow, centre: np.ndarray, turn: float) -> tuple[Field, Field]:
    x, y = window.x_HW - centre[0], window.y_HW - centre[1]
    return x * math.cos(turn) + y * math.sin(turn), -x * math.sin(turn) + y * math.cos(turn)


def _across(work: Work) -> float:
    """The angle across the work, with some variation: strands lie so that the tool meets them."""
    return math.atan2(work.heading[1], work.heading[0]) + math.pi / 2 + 0.7 * (float(work.shape[0]) - 0.5)


def _lump(canvas: SceneCanvas, window: SceneWindow, distance: Field, colour: SceneColour, depth: float) -> None:
    """A rounded body: a dark rim below it, light on its upper left."""
    if not distance.size:
        return
    shadow = 0.45 * smoothstep(0.10, -0.02, distance)
    canvas.shade(window, 1.0 - shadow)
    rise = np.clip(-distance / depth, 0.0, 1.0)
    light = 0.70 + 0.38 * np.sqrt(rise)
    if distance.shape[0] > 1 and distance.shape[1] > 1:
        slope_y, slope_x = np.gradient(np.sqrt(rise + 1e-3), canvas.pixel)
        light = light + 0.05 * np.clip(0.5 * slope_x + 0.85 * slope_y, -3.0, 3.0)
    canvas.paint(window, canvas.coverage(distance), np.asarray(colour, np.float32) * light[..., None])


def _tether(window: SceneWindow, work: Work, base: float, end: float) -> Field:
    """A tapered bridge from the anchor to where the held target has been drawn."""
    tip = work.anchor + work.pull
    return segment(window.x_HW, window.y_HW, work.anchor, tip, base, end)


def _draw_tissue(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    window = _window(canvas, work, 0.55)
    turn = _across(work)
    u, v = _frame(window, work.anchor + 0.08 * work.axis, turn)
    around = np.arctan2(v, u)
    wave = 0.022 * np.sin(3.0 * around + 6.0 * work.shape[1]) + 0.012 * np.sin(5.0 * around + 6.0 * work.shape[2])
    distance = ellipse(u, v, 0.0, 0.0, 0.40, 0.26) + wave
    if float(np.abs(work.pull).max()) > 0.02:
        distance = np.minimum(distance, _tether(window, work, 0.20, 0.07))
    _lump(canvas, window, distance, tone((240, 160, 140)), 0.16)
    if work.cut > 0:
        # The slit opens along the work's direction, from its start to the tip.
        done = float(np.dot(work.tip - work.begin, work.heading))
        back, front = work.begin - 0.14 * work.cut * work.heading, work.begin + max(done, 0.1 * work.cut) * work.heading
        slit = segment(window.x_HW, window.y_HW, back, front, 0.015 + 0.030 * work.cut, 0.012)
        canvas.paint(window, canvas.coverage(np.maximum(slit, distance)), tone((112, 14, 20)))


def _draw_vessel(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    window = canvas.whole
    turn = _across(work)
    direction, side = np.array([math.cos(turn), math.sin(turn)]), np.array([-math.sin(turn), math.cos(turn)])
    along = np.array([-_LONG, -0.9, -0.6, -0.35, -0.17, 0.0, 0.17, 0.35, 0.6, 0.9, _LONG])
    bow = 0.10 * (work.shape[1] - 0.5)
    for radius, shift, colour in ((0.045, 0.135, (206, 30, 40)), (0.082, 0.0, (82, 70, 150))):
        tent = np.exp(-((along / 0.34) ** 2))[:, None] * work.pull
        aside = shift + bow * np.cos(2.0 * np.clip(along, -1, 1))
        points = work.anchor + along[:, None] * direction + aside[:, None] * side + tent
        distance = polyline(window.x_HW, window.y_HW, points, radius)
        if work.cut > 0:
            s, _ = _frame(window, work.anchor, turn)
            distance = np.maximum(distance, 0.17 * work.cut - np.abs(s))
        u = np.clip(1.0 + distance / radius, 0.0, 1.0)  # 0 on the middle line, 1 at the wall
        shine = 0.5 + 0.5 * np.sqrt(1.0 - u * u)
        body = np.asarray(tone(colour), np.float32) * shine[..., None] + (60.0 * np.exp(-((u / 0.35) ** 2)))[..., None]
        canvas.paint(window, canvas.coverage(distance), body)


def _draw_adhesion(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    window = _window(canvas, work, 0.70)
    turn = _across(work)
    direction, side = np.array([math.cos(turn), math.sin(turn)]), np.array([-math.sin(turn), math.cos(turn)])
    u, v = _frame(window, work.anchor, turn)
    torn = smoothstep(0.26 * work.cut - 0.03, 0.26 * work.cut + 0.03, np.abs(u)) if work.cut > 0 else np.ones_like(u)
    waist = 0.11 + 0.42 * u * u
    film = smoothstep(0.03, -0.05, np.maximum(np.abs(v) - waist, np.abs(u) - 0.54))
    canvas.paint(window, 0.42 * film * torn, tone((250, 226, 214)))
    along = np.linspace(-0.58, 0.58, 7)
    fade = np.clip((0.60 - np.abs(u)) / 0.12, 0.0, 1.0)
    for strand in range(5):
        fan = (strand - 2) * 0.055 * (1.0 + 4.0 * along * along)
        sag = 0.10 * (work.shape[2 + strand] - 0.5) * np.cos(2.6 * along + 3.0 * work.shape[strand])
        tent = np.exp(-((along / 0.25) ** 2))[:, None] * work.pull
        points = work.anchor + along[:, None] * direction + (fan + sag)[:, None] * side + tent
        distance = polyline(window.x_HW, window.y_HW, points, 0.013 + 0.012 * work.shape[7 - strand])
        canvas.paint(window, 0.92 * canvas.coverage(distance) * torn * fade, tone((255, 240, 226)))


def _draw_gallbladder(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    window = _window(canvas, work, 0.95)
    lead = work.axis * 0.30 + 0.55 * work.pull
    turn = math.atan2(work.axis[1], work.axis[0]) + 0.5 * (work.shape[0] - 0.5)
    u, v = _frame(window, work.anchor + lead, turn)
    body = ellipse(u, v, 0.0, 0.0, 0.40, 0.27)
    neck = segment(u, v, (0.25, 0.0), (0.62, 0.10), 0.14, 0.07)
    distance = np.minimum(body, neck)
    if float(np.abs(work.pull).max()) > 0.02:
        distance = np.minimum(distance, segment(window.x_HW, window.y_HW, work.anchor + lead, work.tip, 0.16, 0.06))
    _lump(canvas, window, distance, tone((126, 162, 124)), 0.26)


def _draw_ligament(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    window = canvas.whole
    turn = _across(work)
    u, v = _frame(window, work.anchor, turn)
    bent = v - np.exp(-((u / 0.35) ** 2)) * (work.pull[0] * -math.sin(turn) + work.pull[1] * math.cos(turn))
    distance = np.abs(bent) - (0.12 + 0.05 * np.minimum(u * u, 1.0))
    if work.cut > 0:
        # A notch from the instrument's side, through at 1.
        notch = 0.15 * work.cut - np.abs(u) * (0.6 + 0.4 * work.cut)
        distance = np.maximum(distance, np.minimum(notch, 0.16 - (-bent + 0.16) + 0.40 * work.cut))
    fibres = 0.88 + 0.10 * np.sin(62.0 * bent + 5.0 * u)
    canvas.shade(window, 1.0 - 0.35 * smoothstep(0.07, -0.02, distance))
    canvas.paint(window, canvas.coverage(distance), np.asarray(tone((250, 226, 176)), np.float32) * fibres[..., None])


_POUCH = np.array([(-0.24, -0.12), (-0.10, -0.17), (0.10, -0.30), (0.36, -0.26), (0.42, 0.0), (0.36, 0.26),
                   (0.10, 0.30), (-0.10, 0.17), (-0.24, 0.12)])


def _draw_bag(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    centre = work.anchor + work.pull + 0.20 * work.axis
    window = canvas.window(centre, 0.66)
    u, v = _frame(window, centre, math.atan2(work.axis[1], work.axis[0]))
    pouch = polygon(u, v, _POUCH) - 0.05
    canvas.shade(window, 1.0 - 0.40 * smoothstep(0.09, -0.02, pouch))
    # Folds run together at the gathered mouth.
    folds = 0.88 + 0.10 * np.sin(26.0 * v / (0.75 + 1.2 * np.maximum(u + 0.25, 0.0)) + 6.0 * work.shape[1])
    cloth = np.asarray(tone((222, 236, 250)), np.float32) * folds[..., None]
    canvas.paint(window, 0.93 * canvas.coverage(pouch), cloth)
    specimen = ellipse(u, v, 0.20, 0.02, 0.14, 0.16)
    canvas.paint(window, 0.50 * smoothstep(0.06, -0.06, specimen), tone((170, 60, 60)))
    canvas.paint(window, canvas.coverage(np.abs(pouch + 0.016) - 0.014), tone((120, 160, 214)))
    string = segment(u, v, (-0.22, -0.15), (-0.22, 0.15), 0.034)
    canvas.paint(window, canvas.coverage(string), tone((36, 96, 190)))


def _draw_pool(canvas: SceneCanvas, work: Work, colour: SceneColour, shine: float) -> None:
    left = 1.0 - 0.72 * work.progress  # what suction has left of it
    size = 0.50 * math.sqrt(left)
    window = canvas.window(work.anchor, 0.85)
    distance = np.full(window.x_HW.shape, 9.0, np.float32)
    for k in range(4):
        angle = 2 * math.pi * (k / 4 + 0.2 * work.shape[k])
        away = 0.5 * size * (0.6 + 0.5 * work.shape[4 + k])
        blob = np.hypot(window.x_HW - work.anchor[0] - away * math.cos(angle),
                        (window.y_HW - work.anchor[1] - away * math.sin(angle)) * 1.2) - 0.66 * size
        # Smooth union of the drops.
        h = np.clip(0.5 + 0.5 * (distance - blob) / 0.12, 0.0, 1.0)
        distance = distance + h * (blob - distance) - 0.12 * h * (1 - h)
    body = np.asarray(colour, np.float32) * (0.82 + 0.18 * smoothstep(0.0, -0.2, distance))[..., None]
    canvas.paint(window, 0.94 * canvas.coverage(distance), body)
    edge = np.exp(-(((distance + 0.05) / 0.022) ** 2)) * smoothstep(0.1, 0.5, work.anchor[1] - window.y_HW + 0.25)
    canvas.glow(window, shine * edge, (1.0, 0.8, 0.75))


def _draw_blood(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    _draw_pool(canvas, work, tone((124, 6, 14)), 110.0)


def _draw_fluid(canvas: SceneCanvas, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    _draw_pool(canvas, work, tone((168, 158, 40)), 130.0)


_DRAW: dict[str, Callable[[SceneCanvas, Work, Callable[[SceneColour], SceneColour]], None]] = {
    "tissue": _draw_tissue, "vessel": _draw_vessel, "adhesion": _draw_adhesion, "gallbladder": _draw_gallbladder,
    "ligament": _draw_ligament, "bag": _draw_bag, "blood": _draw_blood, "fluid": _draw_fluid,
}
TARGET_NAMES = tuple(_DRAW)


def surgical_tone(colour: SceneColour) -> SceneColour:
    """The colour itself."""
    return colour


def neutral_tone(colour: SceneColour) -> SceneColour:
    """The colour nearly without its hue, pale."""
    grey = 0.30 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    r, g, b = (120.0 + 0.45 * (grey + 0.15 * (c - grey)) for c in colour)
    return r, g, b


def draw(canvas: SceneCanvas, target: str, work: Work, tone: Callable[[SceneColour], SceneColour]) -> None:
    """Composite the target in the state `work`."""
    _DRAW[target](canvas, work, tone)


def scorch(canvas: SceneCanvas, trail: np.ndarray) -> None:
    """The charred line that a hook leaves along `trail` [n, 2]."""
    if len(trail) < 2:
        return
    whole = canvas.whole
    distance = polyline(whole.x_HW, whole.y_HW, trail, 0.030)
    canvas.paint(whole, 0.35 * smoothstep(0.06, 0.0, distance), (236, 206, 150))
    canvas.paint(whole, 0.85 * canvas.coverage(distance), (52, 26, 18))


def spark(canvas: SceneCanvas, tip: np.ndarray, flicker: float) -> None:
    """The arc at a burning hook's tip; `flicker` 0..1."""
    window = canvas.window(tip, 0.24)
    distance = np.hypot(window.x_HW - tip[0], window.y_HW - tip[1])
    canvas.glow(window, (60.0 + 110.0 * flicker) * np.exp(-((distance / 0.10) ** 2)), (1.0, 0.78, 0.42))
    canvas.paint(window, np.exp(-((distance / 0.042) ** 2)), (255, 250, 214))


def smoke(canvas: SceneCanvas, origin: np.ndarray, amount: float, drift: float) -> None:
    """Puffs that rise from `origin`; `amount` 0..1 of them so far, `drift` -1..1 to the side."""
    for k in range(3):
        age = amount - 0.18 * k
        if age <= 0:
            continue
        x = origin[0] + drift * (0.05 + 0.14 * age) + 0.04 * math.sin(5 * age + 2 * k)
        y = origin[1] - 0.14 - 0.50 * age
        size = 0.09 + 0.16 * age
        window = canvas.window((x, y), 2.2 * size)
        puff = np.exp(-((window.x_HW - x) ** 2 + (window.y_HW - y) ** 2) / (size * size))
        canvas.paint(window, 0.34 * (1.0 - 0.5 * age) * puff, (214, 210, 208))


def droplets(canvas: SceneCanvas, tip: np.ndarray, anchor: np.ndarray, phase: float, colour: SceneColour) -> None:
    """Drops that move from the pool into the suction hole; `phase` advances them."""
    path = tip - anchor
    length = float(np.hypot(*path))
    if length < 0.12:
        return
    for k in range(4):
        share = (phase + k / 4) % 1.0
        drop = anchor + path * share
        side = np.array([-path[1], path[0]]) / length * 0.05 * math.sin(7 * k + 3 * share) * (1 - share)
        drop = drop + side
        window = canvas.window(drop, 0.12)
        distance = np.hypot(window.x_HW - drop[0], window.y_HW - drop[1]) - (0.045 - 0.015 * share)
        canvas.paint(window, 0.9 * canvas.coverage(distance), colour)
