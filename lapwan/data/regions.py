"""Regions of interest at latent resolution: the part of each latent cell that boxes, polygons or a mask cover.

A shape or mask is resized, cropped and resampled in time as its frames are. Without either, `motion_region` takes the
cells that move most. Shapes: T latent frames, H, W latent height and width. No torch until `motion_region` runs.

Between two annotated frames a shape moves in a straight line; before the first and after the last it stays for half
the usual gap. Annotations of every frame hold for their own frame only, and a gap of more than twice the usual one is
not bridged: nothing was there. One annotated frame holds for the whole clip.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lapwan.data.annotations import RoiEntry
from lapwan.data.buckets import Crop
from lapwan.data.video import VideoFacts, probe, read_frames, source_times

if TYPE_CHECKING:
    from torch import Tensor

_FINER = 4  # polygons are drawn at this multiple of the bucket's resolution


@dataclass(frozen=True)
class RegionShape:
    """Points (x, y) in 0..1 of the frame: two corners of a box, or the vertices of a polygon; `track` tells objects
    apart where the annotation does."""

    points: tuple[tuple[float, float], ...]
    polygon: bool = False
    track: str | None = None

    def towards(self, other: RegionShape, share: float) -> RegionShape:
        """(1 − share) · this + share · other, point by point."""
        points = tuple(((1 - share) * x + share * to_x, (1 - share) * y + share * to_y)
                       for (x, y), (to_x, to_y) in zip(self.points, other.points, strict=True))
        return replace(self, points=points)


def region_shapes(roi: Sequence[RoiEntry], size: tuple[int, int]) -> dict[int, list[RegionShape]]:
    """The shapes by annotated frame; an empty list where the annotation says that nothing is there.

    Args:
        roi: entries of `read_roi`.
        size: (width, height) of the upright frames as they are stored, to which pixels refer.
    """
    by_frame: dict[int, list[RegionShape]] = {}
    for entry in roi:
        shapes = by_frame.setdefault(int(entry["frame"]), [])
        polygon = entry.get("polygon")
        corners = polygon if polygon is not None else entry["box"]
        if corners is None:
            continue
        points = corners if polygon is not None else (corners[:2], corners[2:])
        width, height = size if entry.get("pixels") else (1, 1)
        shapes.append(RegionShape(tuple((float(x) / width, float(y) / height) for x, y in points), polygon is not None,
                                  entry.get("track")))
    return by_frame


def is_interpolated(roi: Sequence[RoiEntry]) -> bool:
    """Whether some frames of a clip take their shapes from those before and after."""
    annotated = sorted({int(entry["frame"]) for entry in roi})
    gaps = [after - before for before, after in itertools.pairwise(annotated)]
    usual = statistics.median(gaps) if gaps else 0
    return usual > 1 and any(1 < gap <= 2 * usual for gap in gaps)


def shapes_at(by_frame: Mapping[int, Sequence[RegionShape]], frames: Sequence[int]) -> list[list[RegionShape]]:
    """The shapes of source frames `frames`, by the rules of this file."""
    annotated = sorted(by_frame)
    gaps = [after - before for before, after in itertools.pairwise(annotated)]
    usual = statistics.median(gaps) if gaps else float("inf")
    shapes: list[list[RegionShape]] = []
    for frame in frames:
        at = bisect.bisect_right(annotated, frame)
        before = annotated[at - 1] if at else None
        after = annotated[at] if at < len(annotated) else None
        if before is not None and after is not None and frame != before and usual > 1 and after - before <= 2 * usual:
            shapes.append(_between(by_frame[before], by_frame[after], (frame - before) / (after - before)))
            continue
        nearest = min((other for other in (before, after) if other is not None), key=lambda other: abs(other - frame),
                      default=None)
        held = nearest is not None and abs(nearest - frame) <= usual / 2
        shapes.append(list(by_frame[nearest]) if held and nearest is not None else [])
    return shapes


def _between(
    before: Sequence[RegionShape], after: Sequence[RegionShape], share: float
) -> list[RegionShape]:
    """Shapes that both frames have, moved; others for the half of the gap that is nearer to them."""
    pairs, rest = [], list(after)
    for shape in before:
        candidates = [other for other in rest if other.polygon == shape.polygon
                      and len(other.points) == len(shape.points) and other.track == shape.track]
        alike = shape.track is not None or len(before) == len(after)
        match = next(iter(candidates), None) if alike else None
        if match is not None:
            rest.remove(match)
        pairs.append((shape, match))
    moved = [shape.towards(match, share) if match is not None else shape for shape, match in pairs
             if match is not None or share <= 0.5]
    return moved + ([] if share <= 0.5 else rest)


def _covered(low: float, high: float, cells: int) -> np.ndarray:
    """[cells]: the part of each unit cell [i, i + 1) inside [low, high]."""
    edges = np.arange(cells + 1, dtype=np.float32)
    covered: np.ndarray = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, 1)
    return covered


def shape_masks(shapes: Sequence[Sequence[RegionShape]], crop: Crop) -> np.ndarray:
    """[frames, height, width] in [0, 1] at bucket resolution: the part of each pixel inside any shape."""
    width, height = crop.bucket
    masks = np.zeros((len(shapes), height, width), np.float32)
    for mask, frame_shapes in zip(masks, shapes, strict=True):
        for shape in frame_shapes:
            points = [(x * crop.resized[0] - crop.left, y * crop.resized[1] - crop.top) for x, y in shape.points]
            if shape.polygon:
                np.maximum(mask, _polygon(points, width, height), out=mask)
                continue
            (x0, y0), (x1, y1) = points
            across, down = _covered(x0, x1, width), _covered(y0, y1, height)
            np.maximum(mask, down[:, None] * across[None, :], out=mask)
    return masks


def _polygon(points: Sequence[tuple[float, float]], width: int, height: int) -> np.ndarray:
    """[height, width]: the part of each pixel inside a polygon, by 16 samples a pixel."""
    from PIL import Image, ImageDraw

    drawn = Image.new("L", (width * _FINER, height * _FINER))
    # Samples are at the centres of small cells, whose coordinates Pillow counts from 0.
    ImageDraw.Draw(drawn).polygon([(x * _FINER - 0.5, y * _FINER - 0.5) for x, y in points], fill=1)
    cells: np.ndarray = np.asarray(drawn, np.float32).reshape(height, _FINER, width, _FINER).mean(axis=(1, 3))
    return cells


def mask_to_latent(masks: np.ndarray, temporal_stride: int, spatial_stride: int) -> np.ndarray:
    """Mean over the pixels of each latent cell, [4N+1, h, w] -> [N+1, h/8, w/8]; the first has only one pixel frame."""
    frames, height, width = masks.shape
    s = spatial_stride
    small = masks.reshape(frames, height // s, s, width // s, s).mean(axis=(2, 4))
    rest = small[1:].reshape(-1, temporal_stride, *small.shape[1:]).mean(axis=1)
    return np.ascontiguousarray(np.concatenate([small[:1], rest]), dtype=np.float32)


def latent_region(
    roi: Sequence[RoiEntry], mask: Path | None, path: Path, indices: Sequence[int], crop: Crop, fps: float,
    facts: VideoFacts, source_fps: float | None, strides: tuple[int, int],
) -> np.ndarray:
    """`pixel_region` at latent resolution, [T, H, W]; `strides`: (temporal, spatial), pixels per latent cell."""
    return mask_to_latent(pixel_region(roi, mask, path, indices, crop, fps, facts, source_fps), *strides)


def pixel_region(
    roi: Sequence[RoiEntry], mask: Path | None, path: Path, indices: Sequence[int], crop: Crop, fps: float,
    facts: VideoFacts, source_fps: float | None = None,
) -> np.ndarray:
    """[frames, height, width] in [0, 1]: how much of each pixel lies in a clip's mask or, without one, its shapes.

    Args:
        roi: shapes by source frame, as `read_roi` returns them.
        mask: a video, a folder of pictures, or one picture for every frame; white is inside, or in pictures without
            white whatever is not black.
        indices: the clip's frames, counted at `fps`.

    Raises:
        BadClip: the mask cannot be read or is shorter than the clip.
    """
    if mask is None:
        times = source_times(path, facts, fps, source_fps)
        frames = [max(0, bisect.bisect_right(times, facts.begin + index / fps + facts.late) - 1) for index in indices]
        return shape_masks(shapes_at(region_shapes(roi, facts.stored), frames), crop)
    mask_facts = probe(mask, fps, source_fps or (facts.fps if mask.is_dir() else None))
    mask_facts = mask_facts if mask_facts.is_image else replace(mask_facts, begin=facts.begin)
    mask_frames = [0] if mask_facts.is_image else indices
    pixels = read_frames(mask, mask_frames, crop, fps, mask_facts, source_fps)
    level = pixels.mean(axis=-1)
    # Pictures of class numbers or of dark palettes have no white: there, whatever is not 0 is inside.
    pictures = mask.is_dir() or mask_facts.is_image
    white = (level > (0.5 if pictures and level.max() <= 127.5 else 127.5)).astype(np.float32)
    return np.repeat(white, len(indices), axis=0) if mask_facts.is_image else white


def motion_region(latents_CTHW: Tensor, share: float = 0.2) -> Tensor:
    """m_thw = 1 where mean_c |x_t − x_{t−1}| is among the clip's largest `share`, else 0: [T, H, W].

    The first frame takes the values of the second. All zero, which means no region, if nothing moves or for a single
    frame. A moving camera moves everything, so boxes are better.
    """
    import torch

    frames = latents_CTHW.shape[1]
    if frames < 2:
        return latents_CTHW.new_zeros(latents_CTHW.shape[1:])
    moved = (latents_CTHW[:, 1:] - latents_CTHW[:, :-1]).abs().mean(dim=0)
    moved = torch.cat([moved[:1], moved])
    count = max(1, round(share * moved.numel()))
    threshold = moved.flatten().topk(count).values[-1]
    return ((moved >= threshold) & (moved > 0)).to(latents_CTHW.dtype)
