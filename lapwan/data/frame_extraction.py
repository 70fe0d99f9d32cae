"""Which frames of a clip become training items: head, chunk, slide, uniform or full, by musubi-tuner's rule.

Frames are counted at the model's frame rate, not the file's. How to add a mode: a name in `FrameExtraction`, the same
name in `CacheSettings.frame_extraction` (lapwan/settings/cache.py), and a branch in `frame_windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lapwan.data.buckets import Buckets

FrameExtraction = Literal["head", "chunk", "slide", "uniform", "full"]


class Window(NamedTuple):
    """`frames` frames from frame `start` on."""

    start: int
    frames: int


@dataclass(frozen=True)
class Extraction:
    """The size bucket and the frames taken of each clip; see `Buckets` and `frame_windows`.

    `source_fps` overrides the frame rate that files report; None keeps it. `earlier_buckets` are those of an older
    version, whose cache files stay valid.
    """

    buckets: Buckets
    target_frames: tuple[int, ...]
    frame_extraction: FrameExtraction = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None
    earlier_buckets: Buckets | None = None

    def windows(self, count: int) -> list[Window]:
        """The windows of a clip of `count` frames; empty if the clip is shorter than every target."""
        return frame_windows(count, self.frame_extraction, self.target_frames, self.frame_stride, self.frame_sample,
                             self.max_frames)


def round_frames(frames: int, stride: int = 4) -> int:
    """The largest stride·N + 1 that is not above `frames`."""
    return (frames - 1) // stride * stride + 1


def frame_windows(
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
    result: list[Window] = []
    for frames in sorted({round_frames(target) for target in target_frames}):
        last_start = count - frames
        if last_start < 0:
            continue
        if extraction == "chunk":
            starts = list(range(0, last_start + 1, frames))
        elif extraction == "slide":
            starts = list(range(0, last_start + 1, frame_stride))
        elif extraction == "uniform" and frame_sample > 1:
            # The division first: numpy's linspace multiplies by the step, and rounding down must agree with it.
            step = last_start / (frame_sample - 1)
            starts = [int(i * step) for i in range(frame_sample - 1)] + [last_start]
        else:
            starts = [0]
        result += [Window(start, frames) for start in dict.fromkeys(starts)]
    return result
