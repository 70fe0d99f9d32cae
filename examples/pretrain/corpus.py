"""What the embedded model is pretrained on: scenes and captions as pure functions of an index.

The base must leave something to learn for fine-tuning, so two things are kept from it:
    the instruments' names  In captions without a marker the name and the verb belong to an instrument drawn at random
                            (or to none), and only one in twenty is set to the true one. Captions that begin with the
                            marker of a box trainer, always of the neutral look, name what is seen; so the text encoder
                            knows the words, and the pair can draw all four.
    the surgical look       Without the marker, half of the clips look neutral, half surgical.
Motion, direction, side and target are always true. Instruments and motions are paired evenly, not as surgeons do, with
`HELD_OUT_PAIRS` and every caption of `is_held_out` left out. A clip may also be shown mirrored, under captions of what
the mirror image shows.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from lapwan.tiny import motion as paths
from lapwan.tiny import scene_targets
from lapwan.tiny.captions import caption_for
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import SceneSpec, render

FRAMES = 17
CAPTIONS = 4  # drawn for every clip
MARKER = ("训练箱内，", "In a box trainer, ")
HELD_OUT_PAIRS = (("scissors", "circle"), ("hook", "lift"), ("suction", "advance"), ("grasper", "sweep"))
_MARKED, _NEUTRAL = 0.2, 0.4  # shares of the clips; the rest looks surgical
_RIGHT = 0.05  # of the captions without a marker name what is seen on purpose, besides those that do by chance
_GENERIC = 0.3  # of the captions without a marker name no instrument
_HELD_OUT_CAPTIONS = 26  # of 256

Purpose = Literal["pretraining", "continued", "identity", "check"]
# Scene seeds: `sample_spec` draws below 2**31, so nothing the demo or a test renders is ever seen here.
FIRST_SEED: dict[Purpose, int] = {"pretraining": 2**31, "continued": 2**31 + 2**20, "identity": 2**32, "check": 2**33}


def is_held_out(caption: str) -> bool:
    """About a tenth of all captions, by hash: never shown in pretraining."""
    return hashlib.sha256(caption.encode()).digest()[0] < _HELD_OUT_CAPTIONS


@dataclass(frozen=True)
class Sample:
    """A scene with the captions it is shown under."""

    spec: SceneSpec
    captions: tuple[str, ...]


# Of each mirror image: which of (height, width) is turned, and what captions then say.
MIRRORS = ((), ("width",), ("height",), ("width", "height"))
_MIRRORED = {"width": ("left", "right"), "height": ("top", "bottom")}
_MIRRORED_MOVE = {"width": ("left", "right"), "height": ("up", "down")}
_TURNS = ("clockwise", "counterclockwise")


def mirrored(spec: SceneSpec, mirror: int) -> SceneSpec:
    """What a mirror image (an index into MIRRORS) of the scene shows; only its side and direction differ."""
    def swapped(word: str, pair: tuple[str, str]) -> str:
        return pair[1 - pair.index(word)] if word in pair else word

    side, direction = spec.side, str(spec.direction)
    for axis in MIRRORS[mirror]:
        side = swapped(side, _MIRRORED[axis])
        direction = swapped(swapped(direction, _MIRRORED_MOVE[axis]), _TURNS)
    return replace(spec, side=side, direction=direction)


def random_scene(rng: np.random.Generator, seed: int, style: str, held_out_pairs: bool) -> SceneSpec:
    """Any instrument with any motion and any target, all equally likely."""
    while True:
        instrument, motion = str(rng.choice(INSTRUMENTS)), str(rng.choice(list(paths.MOTIONS)))
        if held_out_pairs or (instrument, motion) not in HELD_OUT_PAIRS:
            break
    return SceneSpec(
        instrument, side=str(rng.choice(list(paths.SIDES))), motion=motion,
        direction=str(rng.choice(paths.MOTIONS[motion])), target=str(rng.choice(scene_targets.TARGET_NAMES)),
        style=style, seed=seed, frames=FRAMES,
    )


def _caption(spec: SceneSpec, marked: bool, rng: np.random.Generator) -> str:
    if marked:
        text = caption_for(replace(spec, style="surgical"), rng)
        return MARKER[1] + text[0].lower() + text[1:] if text.isascii() else MARKER[0] + text
    if rng.uniform() < _GENERIC:
        return caption_for(replace(spec, style="neutral"), rng)
    named = spec.instrument if rng.uniform() < _RIGHT else str(rng.choice(INSTRUMENTS))
    return caption_for(replace(spec, style="surgical", instrument=named), rng)


def sample(index: int, purpose: Purpose = "pretraining", mirror: int = 0) -> Sample:
    """The index-th scene of a purpose, with captions of its mirror image; `identity` and `check` are surgical, with
    true captions.

    `continued` are more scenes like those of `pretraining`, for training that goes on from existing weights.
    """
    seed = FIRST_SEED[purpose] + index
    rng = np.random.default_rng(seed)
    if purpose in ("identity", "check"):
        spec = random_scene(rng, seed, "surgical", held_out_pairs=True)
        return Sample(spec, (caption_for(spec, rng),) * CAPTIONS)
    u = rng.uniform()
    spec = random_scene(rng, seed, "neutral" if u < _MARKED + _NEUTRAL else "surgical", held_out_pairs=False)
    captions: list[str] = []
    shown = mirrored(spec, mirror)
    while len(captions) < CAPTIONS:
        caption = _caption(shown, u < _MARKED, rng)
        if not is_held_out(caption):
            captions.append(caption)
    return Sample(spec, tuple(captions))


class Clips:
    """Rendered scenes of a purpose, in files that grow while others already read them.

    frames [N, T, H, W, 3] uint8, tips [N, T, 2] and boxes [N, T, 4] in 0..1.
    """

    def __init__(self, folder: Path, count: int, purpose: Purpose, size: int = 96, fps: float = 16.0) -> None:
        self.folder, self.count, self.purpose, self.size, self.fps = folder, count, purpose, size, fps
        folder.mkdir(parents=True, exist_ok=True)
        self.frames = self._open("frames", (FRAMES, size, size, 3), np.uint8)
        self.tips = self._open("tips", (FRAMES, 2), np.float32)
        self.boxes = self._open("boxes", (FRAMES, 4), np.float32)
        self._done = self._open("done", (), np.uint8)

    def _open(self, name: str, shape: tuple[int, ...], dtype: type) -> np.memmap:
        path = self.folder / f"{self.purpose}_{name}.bin"
        mode: Literal["r+", "w+"] = "r+" if path.exists() else "w+"
        return np.memmap(path, dtype, mode, shape=(self.count, *shape))

    def write(self, index: int) -> None:
        """Render one scene into its rows of the files."""
        scene = render(self.spec(index))
        self.frames[index], self.tips[index], self.boxes[index] = scene.frames_THWC, scene.tips, scene.boxes
        self._done[index] = 1

    def spec(self, index: int) -> SceneSpec:
        """The scene as it is rendered."""
        return replace(sample(index, self.purpose).spec, size=(self.size, self.size), fps=self.fps)

    def is_rendered(self, index: int) -> bool:
        """Whether the scene is there."""
        return bool(self._done[index])

    def ready(self) -> int:
        """How many of the first scenes are there without a gap."""
        missing = np.flatnonzero(self._done == 0)
        return int(missing[0]) if len(missing) else self.count

    def wait(self, count: int) -> None:
        """Return once the first `count` scenes are rendered."""
        while not self._done[:count].all():
            time.sleep(0.05)

    def instruments(self) -> np.ndarray:
        """[N] index into INSTRUMENTS."""
        return np.array([INSTRUMENTS.index(sample(i, self.purpose).spec.instrument) for i in range(self.count)])


def _render_share(clips: tuple[Path, int, Purpose, int, float], first: int, stride: int) -> None:
    os.nice(10)  # the process that launches kernels comes first
    share = Clips(*clips)
    for index in range(first, share.count, stride):
        if not share.is_rendered(index):
            share.write(index)


def start_rendering(clips: Clips, processes: int) -> list[multiprocessing.process.BaseProcess]:
    """Render in the background, in order of index; the processes end by themselves or with this one."""
    context = multiprocessing.get_context("spawn")
    started: list[multiprocessing.process.BaseProcess] = []
    for first in range(processes):
        same = clips.folder, clips.count, clips.purpose, clips.size, clips.fps
        worker = context.Process(target=_render_share, args=(same, first, processes), daemon=True)
        worker.start()
        started.append(worker)
    return started
