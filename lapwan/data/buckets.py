"""Buckets: the sizes a dataset of mixed shapes is cut to, with musubi-tuner's rule, so that caches agree.

All sizes here are (width, height) in pixels, as dataset files say them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Size = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """Bucket sizes around an area.

    Widths w go from half of sqrt(area) up to sqrt(area) in steps of `step`, heights are area // w rounded down to the
    step, and each (w, h) also counts as (h, w). A clip goes to the nearest aspect ratio w / h (the first of equals in
    sorted order). Without `enable`, `resolution` is the only bucket. With `no_upscale` a clip no larger than the area
    keeps its own size, rounded down to the step. Source: musubi-tuner's dataset documentation.
    """

    resolution: Size
    enable: bool = False
    no_upscale: bool = False
    step: int = 16
    sizes: tuple[Size, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", self._all() if self.enable else (self.resolution,))

    def _all(self) -> tuple[Size, ...]:
        area = self.resolution[0] * self.resolution[1]
        root = math.isqrt(area)
        found: set[Size] = set()
        for width in range(max(self.step, _down(root // 2, self.step)), root + self.step, self.step):
            height = _down(area // width, self.step)
            if height:
                found |= {(width, height), (height, width)}
        return tuple(sorted(found))

    def choose(self, width: int, height: int) -> Size:
        """The bucket of a clip of this size."""
        area = self.resolution[0] * self.resolution[1]
        if self.enable and self.no_upscale and width * height <= area:
            return max(self.step, _down(width, self.step)), max(self.step, _down(height, self.step))
        return min(self.sizes, key=lambda size: abs(size[0] / size[1] - width / height))


def _down(value: int, step: int) -> int:
    return value - value % step


@dataclass(frozen=True)
class Crop:
    """Resize to `resized`, then cut the bucket out at (left, top)."""

    resized: Size
    left: int
    top: int
    bucket: Size


def centre_crop(width: int, height: int, bucket: Size) -> Crop:
    """How a frame fills its bucket: scaled so that the tighter side fits, then cut in the centre."""
    scale = max(bucket[0] / width, bucket[1] / height)
    resized = max(bucket[0], int(width * scale + 0.5)), max(bucket[1], int(height * scale + 0.5))
    return Crop(resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, bucket)

FrameExtraction = Literal["head", "chunk", "slide", "uniform", "full"]


class Window(NamedTuple):
    """`frames` frames from frame `start` on, counted at the model's frame rate."""

    start: int
    frames: int


def round_frames(frames: int, stride: int = 4) -> int:
    """The largest stride·N + 1 that is not above `frames`."""
    return (frames - 1) // stride * stride + 1


def windows(
    count: int,
    extraction: FrameExtraction,
    target_frames: Sequence[int] = (),
    frame_stride: int = 1,
    frame_sample: int = 1,
    max_frames: int = 129,
) -> list[Window]:
    """The windows of a clip of `count` frames, in order of target, without repetition.

    head: [0, T). chunk: 0, T, 2T, ... while whole. slide: every `frame_stride`. uniform: `frame_sample` starts,
    i·(count - T) / (frame_sample - 1) rounded down; one sample is head. full: min(count, max_frames) rounded down to
    4N+1, whatever the targets. Targets longer than the clip give nothing.
    Source: musubi-tuner's dataset documentation.
    """
    if extraction == "full":
        return [Window(0, round_frames(min(count, max_frames)))] if count else []
    found: list[Window] = []
    for frames in sorted({round_frames(target) for target in target_frames}):
        room = count - frames
        if room < 0:
            continue
        if extraction == "chunk":
            starts = list(range(0, room + 1, frames))
        elif extraction == "slide":
            starts = list(range(0, room + 1, frame_stride))
        elif extraction == "uniform" and frame_sample > 1:
            # The division first: numpy's linspace multiplies by the step, and rounding down must agree with it.
            step = room / (frame_sample - 1)
            starts = [int(i * step) for i in range(frame_sample - 1)] + [room]
        else:
            starts = [0]
        found += [Window(start, frames) for start in dict.fromkeys(starts)]
    return found
