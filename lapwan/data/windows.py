"""Which frames of a clip become training items: musubi-tuner's frame extraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

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
