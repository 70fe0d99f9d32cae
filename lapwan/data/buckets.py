"""Size buckets and centre crops: the width and height a clip is resized and cropped to, by musubi-tuner's rule.

All sizes here are (width, height) in pixels, as in dataset files. Which frames are taken: `frame_extraction.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Size = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """Bucket sizes around an area.

    Widths w go from half of sqrt(area) up to sqrt(area) in steps of `step`, heights are area // w rounded down to the
    step, and each (w, h) also counts as (h, w). A clip goes to the nearest aspect ratio w / h (the first of equals in
    sorted order). Without `enable`, `resolution` is the only bucket. With `no_upscale` a clip no larger than the area
    keeps its size, rounded down to the step. Source: musubi-tuner's dataset documentation.
    """

    resolution: Size
    enable: bool = False
    no_upscale: bool = False
    step: int = 16
    sizes: tuple[Size, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", self._all_sizes() if self.enable else (self.resolution,))

    def _all_sizes(self) -> tuple[Size, ...]:
        area = self.resolution[0] * self.resolution[1]
        root = math.isqrt(area)
        sizes: set[Size] = set()
        for width in range(max(self.step, _round_down(root // 2, self.step)), root + self.step, self.step):
            height = _round_down(area // width, self.step)
            if height:
                sizes |= {(width, height), (height, width)}
        return tuple(sorted(sizes))

    def choose(self, width: int, height: int) -> Size:
        """The bucket of a clip of this size."""
        area = self.resolution[0] * self.resolution[1]
        if self.enable and self.no_upscale and width * height <= area:
            return max(self.step, _round_down(width, self.step)), max(self.step, _round_down(height, self.step))
        return min(self.sizes, key=lambda size: abs(size[0] / size[1] - width / height))


def _round_down(value: int, step: int) -> int:
    return value - value % step


@dataclass(frozen=True)
class Crop:
    """Resize to `resized`, then crop to `bucket` with its corner at (left, top)."""

    resized: Size
    left: int
    top: int
    bucket: Size


def centre_crop(width: int, height: int, bucket: Size) -> Crop:
    """Scale a frame by max(bucket_w / width, bucket_h / height), so that it covers the bucket, and crop the centre."""
    scale = max(bucket[0] / width, bucket[1] / height)
    resized = max(bucket[0], int(width * scale + 0.5)), max(bucket[1], int(height * scale + 0.5))
    return Crop(resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, bucket)
