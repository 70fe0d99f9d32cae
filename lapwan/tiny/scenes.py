"""Synthetic laparoscopic scenes: seeded, deterministic, with the exact position of the instrument's tip per frame.

`render(SceneSpec(...)) -> Scene`. The tip's path depends only on the motion, its direction and the start. The first
frame shows start, shaft and bend, the caption gives motion and direction (see `captions`), so a model with both can
predict the path. Other random properties (tissue, target's form, sparks) do not affect the path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lapwan.tiny import instruments, scene_targets, tissue
from lapwan.tiny import motion as paths
from lapwan.tiny.captions import caption_for
from lapwan.tiny.drawing import SceneCanvas
from lapwan.tiny.instruments import INSTRUMENTS, Pose

STYLES = ("surgical", "neutral")
# The users' four families (taxonomy `surgical4`).
FAMILIES = {"scissors": "Scissors", "hook": "Hook/Electrocautery", "suction": "Suction", "grasper": "Other"}
_PORT_DISTANCE = 2.3  # units from the view's centre to where the shaft passes through the abdominal wall
# One random stream per purpose, so that a change in one does not affect the others.
_PATH, _TISSUE, _TARGET, _EFFECTS, _CAPTION, _SECOND = range(6)


@dataclass(frozen=True)
class SceneSpec:
    """The complete description of a scene; equal specs give equal scenes.

    `direction` None is the motion's default, `target` None the instrument's. `start` is the tip in the first frame,
    x and y in 0..1; None draws it from the seed near the middle of the view. `second` is an instrument that holds still
    beside the first, from another side; without it the pixels are the same as before there was one.
    """

    instrument: str
    side: str = "left"
    motion: str | None = None
    direction: str | None = None
    target: str | None = None
    style: str = "surgical"
    seed: int = 0
    frames: int = 17
    size: tuple[int, int] = (128, 128)  # height, width
    fps: float = 16.0
    start: tuple[float, float] | None = None
    second: str | None = None

    def __post_init__(self) -> None:
        _known("instrument", self.instrument, INSTRUMENTS)
        if self.second is not None:
            _known("second instrument", self.second, tuple(i for i in INSTRUMENTS if i != self.instrument))
        _known("side", self.side, tuple(paths.SIDES))
        _known("style", self.style, STYLES)
        if self.motion is None:
            object.__setattr__(self, "motion", paths.CHARACTERISTIC[self.instrument][0])
        _known("motion", self.motion, tuple(paths.MOTIONS))
        if self.direction is None:
            object.__setattr__(self, "direction", paths.MOTIONS[str(self.motion)][0])
        _known(f"direction of {self.motion}", self.direction, paths.MOTIONS[str(self.motion)])
        if self.target is None:
            object.__setattr__(self, "target", scene_targets.TARGETS[self.instrument][0])
        _known("target", self.target, scene_targets.TARGET_NAMES)
        if self.frames < 1 or min(self.size) < 16 or self.fps <= 0:
            raise ValueError(f"a scene needs frames >= 1, a size of at least 16x16 and fps > 0, got {self.frames} "
                             f"frames of {self.size[0]}x{self.size[1]} at {self.fps}")

    @property
    def family(self) -> str:
        """The users' family of the instrument."""
        return FAMILIES[self.instrument]


@dataclass(frozen=True)
class Scene:
    """A rendered scene."""

    spec: SceneSpec
    frames_THWC: np.ndarray  # uint8 RGB
    tips: np.ndarray  # [T, 2] x, y in 0..1 (may be fractions of a pixel)
    boxes: np.ndarray  # [T, 4] x0, y0, x1, y1 in 0..1 around the instrument's head
    caption: str
    family: str
    second_tips: np.ndarray | None = None  # of the second instrument, as `tips`
    second_boxes: np.ndarray | None = None


def _known(what: str, value: str | None, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; one of {', '.join(known)}")


def sample_spec(rng: np.random.Generator, instrument: str, motion: str | None = None, **fixed: object) -> SceneSpec:
    """A random scene of `instrument` among its characteristic motions and usual targets; `fixed` fields are kept.

    At least four scenes in ten have the motion's default direction, so that short captions are not rare.
    """
    motion = motion or str(rng.choice(paths.CHARACTERISTIC[instrument]))
    directions = paths.MOTIONS[motion]
    drawn = {
        "side": str(rng.choice(list(paths.SIDES))),
        "direction": directions[0] if rng.uniform() < 0.4 else str(rng.choice(directions)),
        "target": str(rng.choice(scene_targets.TARGETS[instrument])),
        "seed": int(rng.integers(2**31)),
    }
    return replace(SceneSpec(instrument, motion=motion), **{**drawn, **fixed})  # type: ignore[arg-type]


def _poses(spec: SceneSpec, canvas: SceneCanvas) -> list[Pose]:
    """The instrument in every frame."""
    motion, direction = str(spec.motion), str(spec.direction)
    rng = np.random.default_rng([spec.seed, _PATH])
    angle, away = rng.uniform(0, 2 * math.pi), 0.20 * math.sqrt(rng.uniform())
    tilt, bend = rng.uniform(-0.7, 0.7), float(rng.choice((-1.0, 1.0)))
    out = np.array(paths.SIDES[spec.side])
    wider = abs(out[0]) * (canvas.half_width - 1) + abs(out[1]) * (canvas.half_height - 1)
    port = out * (_PORT_DISTANCE + wider) + tilt * np.array([-out[1], out[0]])
    steps = [i / max(spec.frames - 1, 1) for i in range(spec.frames)]

    def axis_at(point: np.ndarray) -> np.ndarray:
        unit: np.ndarray = (point - port) / np.hypot(*(point - port))
        return unit

    if spec.start is None:
        # The whole path, not its first point, is centred near the middle of the view; a little beyond it as seen
        # from the port, because the head lies behind the tip.
        middle = away * np.array([math.cos(angle), math.sin(angle)]) - 0.14 * out
        path = np.array([paths.offset(motion, axis_at(middle), direction, s) for s in np.linspace(0, 1, 33)])
        start = middle - (path.min(axis=0) + path.max(axis=0)) / 2
    else:
        start = (2 * np.array(spec.start) - 1) * [canvas.half_width, canvas.half_height]
    axis = axis_at(start)
    tips = [start + paths.offset(motion, axis, direction, s) for s in steps]
    return [Pose(tip, axis_at(tip), instruments.opening(spec.instrument, motion, s), bend)
            for tip, s in zip(tips, steps, strict=True)]


def _second_poses(spec: SceneSpec, canvas: SceneCanvas, first: list[Pose]) -> list[Pose]:
    """The second instrument in every frame: it holds with a slight drift, clear of the first one's path."""
    rng = np.random.default_rng([spec.seed, _SECOND])
    side = str(rng.choice([side for side in paths.SIDES if side != spec.side]))
    out = np.array(paths.SIDES[side])
    across = np.array([-out[1], out[0]])
    path = np.array([pose.tip for pose in first])
    # On its own side of the path, aside of the other shaft, and with most of its head in view.
    aside = rng.uniform(0.10, 0.30) * float(rng.choice((-1.0, 1.0)))
    middle = path.mean(axis=0) + out * rng.uniform(0.12, 0.30) + across * aside
    edge = np.array([canvas.half_width, canvas.half_height]) - 0.45
    tip = np.clip(middle, -edge, edge)
    wider = abs(out[0]) * (canvas.half_width - 1) + abs(out[1]) * (canvas.half_height - 1)
    port = out * (_PORT_DISTANCE + wider) + rng.uniform(-0.7, 0.7) * across
    drift, turn = rng.uniform(0.02, 0.08), rng.uniform(0, 2 * math.pi)
    shift = drift * np.array([math.cos(turn), math.sin(turn)])
    bend = float(rng.choice((-1.0, 1.0)))
    open_ = 0.0 if spec.second == "grasper" else float(rng.uniform(0.2, 0.6))
    poses = []
    for index in range(spec.frames):
        at = tip + shift * index / max(spec.frames - 1, 1)
        poses.append(Pose(at, (at - port) / np.hypot(*(at - port)), open_, bend))
    return poses


def render(spec: SceneSpec, with_instrument: bool = True) -> Scene:
    """Draw the scene; without the instruments everything else (target, traces of the work) stays the same.

    The tip is the middle between the points of blades or jaws, the free end of the hook, the middle of the suction
    hole.
    """
    height, width = spec.size
    canvas = SceneCanvas(height, width)
    surgical = spec.style == "surgical"
    ground = tissue.Tissue(np.random.default_rng([spec.seed, _TISSUE]),
                           tissue.SURGICAL if surgical else tissue.NEUTRAL, canvas)
    poses = _poses(spec, canvas)
    second = [] if spec.second is None else _second_poses(spec, canvas, poses)
    renderer = _FrameRenderer(spec, canvas, ground, poses, second)
    frames = np.empty((spec.frames, height, width, 3), np.uint8)
    for index in range(spec.frames):
        renderer.draw_frame(index, with_instrument)
        frames[index] = np.clip(canvas.rgb_HWC + 0.5, 0, 255).astype(np.uint8)
    tips, boxes = _tips_and_boxes(spec.instrument, poses, canvas)
    caption = caption_for(spec, np.random.default_rng([spec.seed, _CAPTION]))
    if spec.second is None:
        return Scene(spec, frames, tips, boxes, caption, spec.family)
    return Scene(spec, frames, tips, boxes, caption, spec.family, *_tips_and_boxes(spec.second, second, canvas))


def _tips_and_boxes(instrument: str, poses: list[Pose], canvas: SceneCanvas) -> tuple[np.ndarray, np.ndarray]:
    """The tip [T, 2] and the box of the head [T, 4] in 0..1."""
    half = np.array([canvas.half_width, canvas.half_height])
    tips = np.array([(pose.tip / half + 1) / 2 for pose in poses])
    boxes = np.array([instruments.head_box(instrument, pose) for pose in poses])
    return tips, np.clip((boxes / np.tile(half, 2) + 1) / 2, 0.0, 1.0)


class _FrameRenderer:
    """Draws one scene frame by frame, back to front."""

    def __init__(self, spec: SceneSpec, canvas: SceneCanvas, ground: tissue.Tissue, poses: list[Pose],
                 second: list[Pose]) -> None:
        self._spec, self._canvas, self._ground, self._poses, self._second = spec, canvas, ground, poses, second
        self._motion = str(spec.motion)
        self._surgical = spec.style == "surgical"
        self._shape = np.random.default_rng([spec.seed, _TARGET]).uniform(0, 1, 8)
        effects = np.random.default_rng([spec.seed, _EFFECTS])
        self._flicker = effects.uniform(0, 1, spec.frames)
        self._drift = effects.uniform(-1, 1)
        tips = np.array([pose.tip for pose in poses])
        # The target lies where the work begins, or in the middle of the path for motions that pass over it.
        begin = paths.working_from(self._motion) * (spec.frames - 1)
        low = int(begin)
        high = min(low + 1, spec.frames - 1)
        self._begin = tips[low] + (begin - low) * (tips[high] - tips[low])
        worked = tips[low:]
        passes = self._motion in ("stroke", "sweep", "circle")
        self._anchor = (worked.min(axis=0) + worked.max(axis=0)) / 2 if passes else self._begin
        self._heading = paths.heading(self._motion, poses[0].axis, str(spec.direction))

    def draw_frame(self, index: int, with_instrument: bool) -> None:
        spec, canvas, pose = self._spec, self._canvas, self._poses[index]
        s, seconds = index / max(spec.frames - 1, 1), index / spec.fps
        self._ground.paint(seconds)
        work = self._work(pose, s, self._ground.displacement(seconds))
        burning = self._surgical and spec.instrument == "hook" and 0.0 < paths.engaged(self._motion, s) < 1.0
        tone = scene_targets.surgical_tone if self._surgical else scene_targets.neutral_tone
        scene_targets.draw(canvas, str(spec.target), work, tone)
        if self._surgical and spec.instrument == "hook" and self._motion != "pull":
            scene_targets.scorch(canvas, self._trail(index))
        if self._surgical:
            self._ground.glint(seconds)
            if spec.instrument == "suction" and spec.target in ("blood", "fluid"):
                colour = (124.0, 6.0, 14.0) if spec.target == "blood" else (168.0, 158.0, 40.0)
                scene_targets.droplets(canvas, pose.tip, work.anchor, 1.7 * s, colour)
        if with_instrument:
            palette = instruments.SURGICAL if self._surgical else instruments.NEUTRAL
            if spec.second is not None:
                instruments.draw(canvas, spec.second, self._second[index], palette)
            instruments.draw(canvas, spec.instrument, pose, palette)
        if burning:
            scene_targets.spark(canvas, pose.tip, float(self._flicker[index]))
            scene_targets.smoke(canvas, work.anchor, paths.engaged(self._motion, s), self._drift)
        self._ground.see_through_scope()

    def _work(self, pose: Pose, s: float, displacement: np.ndarray) -> scene_targets.Work:
        spec, motion = self._spec, self._motion
        progress = paths.engaged(motion, s)
        anchor = self._anchor + displacement
        holds = spec.instrument == "grasper" or (spec.instrument == "hook" and motion == "pull")
        working = s >= paths.working_from(motion)
        pull = pose.tip - anchor if holds and working else np.zeros(2)
        cut = 0.0
        if spec.instrument in ("scissors", "hook"):
            # A hook lifts before it burns through; a stroke parts the target when it passes its middle.
            late = {"pull": 0.70, "stroke": 0.35}.get(motion, 0.0)
            cut = max(0.0, (progress - late) / (1.0 - late))
        return scene_targets.Work(anchor, pose.tip, self._poses[0].axis, self._heading, self._begin + displacement,
                                  pull, progress, cut, self._shape)

    def _trail(self, index: int) -> np.ndarray:
        first = math.ceil(paths.working_from(self._motion) * (self._spec.frames - 1))
        return np.array([pose.tip for pose in self._poses[first:index + 1]])
