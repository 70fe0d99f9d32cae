"""Paths of an instrument's tip: functions of the first frame and of the motion and direction in the caption.

`tip(s) = start + offset(motion, direction, shaft axis at the start; s)`, s = 0 at the first and 1 at the last frame.
Units: half the picture's shorter side (see `drawing`).

To add a motion: one function in `_OFFSETS`, one row in `MOTIONS`, one in `_ENGAGED`, and its phrases in `captions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lapwan.tiny.drawing import ease

Vector = tuple[float, float]

SIDES: dict[str, Vector] = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "top": (0.0, -1.0), "bottom": (0.0, 1.0)}
_DIRECTIONS: dict[str, Vector] = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_TURNS = {"clockwise": 1.0, "counterclockwise": -1.0}  # as seen on the picture, whose y axis points down

# Directions of each motion; the first is the default, the only one that a caption may omit.
MOTIONS: dict[str, tuple[str, ...]] = {
    "advance": ("inward",),
    "pull": ("outward",),
    "stroke": ("down", "up", "left", "right"),
    "sweep": ("right", "left", "up", "down"),
    "circle": ("clockwise", "counterclockwise"),
    "lift": ("up", "down", "left", "right"),
    "retract": ("outward",),
}
# Typical motions of each instrument; the first is the default. `render` accepts any pair.
CHARACTERISTIC: dict[str, tuple[str, ...]] = {
    "scissors": ("advance", "stroke"),
    "hook": ("pull", "stroke"),
    "suction": ("sweep", "circle"),
    "grasper": ("lift", "retract"),
}
# When the instrument works (scissors snip, the hook burns, the tube sucks, the jaws hold): from s to s.
_ENGAGED: dict[str, tuple[float, float]] = {
    "advance": (0.40, 1.0), "pull": (0.22, 1.0), "stroke": (0.15, 0.95), "sweep": (0.0, 1.0), "circle": (0.0, 1.0),
    "lift": (0.36, 1.0), "retract": (0.36, 1.0),
}


def engaged(motion: str, s: float) -> float:
    """0 before the work begins, 1 once it is over, rising evenly between."""
    begin, end = _ENGAGED[motion]
    return min(max((s - begin) / (end - begin), 0.0), 1.0)


def working_from(motion: str) -> float:
    """The s at which the work begins; the target lies at the tip's position then."""
    return _ENGAGED[motion][0]


def heading(motion: str, axis: np.ndarray, direction: str) -> np.ndarray:
    """Unit vector of the work's direction: the named direction, otherwise the shaft's."""
    return np.array(_DIRECTIONS[direction]) if direction in _DIRECTIONS else axis


def _advance(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    bite = 0.05 * math.sin(math.pi * engaged("advance", s) * 4) if s > 0.4 else 0.0
    return axis * (0.50 * ease(s, 0.0, 0.40) + bite)


def _pull(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    reach = 0.26 * ease(s, 0.0, 0.20)
    strokes = ease(s, 0.22, 0.48) - ease(s, 0.50, 0.68) + ease(s, 0.70, 0.98)
    return axis * (reach - 0.40 * strokes)


def _stroke(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    return axis * (0.12 * ease(s, 0.0, 0.15)) + np.array(_DIRECTIONS[direction]) * (0.70 * ease(s, 0.12, 0.95))


def _sweep(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    return np.array(_DIRECTIONS[direction]) * (0.38 * math.sin(2 * math.pi * s))


def _circle(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    radius, angle = 0.30, 2 * math.pi * s * _TURNS[direction]
    back = -axis  # the circle's centre lies ahead of the start
    turned = np.array([back[0] * math.cos(angle) - back[1] * math.sin(angle),
                       back[0] * math.sin(angle) + back[1] * math.cos(angle)])
    offset_from_start: np.ndarray = radius * (turned - back)
    return offset_from_start


def _lift(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    return axis * (0.26 * ease(s, 0.0, 0.26)) + np.array(_DIRECTIONS[direction]) * (0.62 * ease(s, 0.42, 0.95))


def _retract(axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    return axis * (0.32 * ease(s, 0.0, 0.26) - 0.66 * ease(s, 0.42, 0.95))


_OFFSETS: dict[str, Callable[[np.ndarray, str, float], np.ndarray]] = {
    "advance": _advance, "pull": _pull, "stroke": _stroke, "sweep": _sweep, "circle": _circle, "lift": _lift,
    "retract": _retract,
}


def offset(motion: str, axis: np.ndarray, direction: str, s: float) -> np.ndarray:
    """Offset of the tip from its start at s; `axis` is the unit vector along the shaft at the start, into the view."""
    return _OFFSETS[motion](axis, direction, s)
