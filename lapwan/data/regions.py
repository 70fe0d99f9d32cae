"""Regions of interest at latent resolution: the part of each latent cell that boxes or a mask cover.

A box or mask is resized, cropped and resampled in time as its frames are. Without either, `motion_region` takes the
cells that move most. Shapes: T latent frames, H, W latent height and width. No torch until `motion_region` runs.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapwan.data.buckets import Crop
from lapwan.data.video import VideoFacts, probe, read_frames, source_times

if TYPE_CHECKING:
    from torch import Tensor

RegionBox = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0..1 of the frame


def boxes_at(roi: Sequence[Mapping[str, Any]], frames: Sequence[int]) -> list[list[RegionBox]]:
    """The boxes of source frames `frames`.

    A frame takes the boxes of the nearest annotated frame, no farther than half the usual gap between annotations:
    dense annotations hold for their own frame only, sparse ones until half-way to the next.
    """
    by_frame: dict[int, list[RegionBox]] = {}
    for entry in roi:
        by_frame.setdefault(int(entry["frame"]), []).append(tuple(float(v) for v in entry["box"]))  # type: ignore[arg-type]
    annotated = sorted(by_frame)
    gaps = [b - a for a, b in itertools.pairwise(annotated)]
    reach = statistics.median(gaps) / 2 if gaps else float("inf")
    boxes: list[list[RegionBox]] = []
    for frame in frames:
        at = bisect.bisect_left(annotated, frame)
        nearest = min(annotated[max(0, at - 1) : at + 1], key=lambda other: abs(other - frame), default=None)
        boxes.append(by_frame[nearest] if nearest is not None and abs(nearest - frame) <= reach else [])
    return boxes


def _covered(low: float, high: float, cells: int) -> np.ndarray:
    """[cells]: the part of each unit cell [i, i + 1) inside [low, high]."""
    edges = np.arange(cells + 1, dtype=np.float32)
    covered: np.ndarray = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, 1)
    return covered


def box_masks(boxes: Sequence[Sequence[RegionBox]], crop: Crop) -> np.ndarray:
    """[frames, height, width] in [0, 1] at bucket resolution: the part of each pixel inside any box."""
    width, height = crop.bucket
    masks = np.zeros((len(boxes), height, width), np.float32)
    for mask, frame_boxes in zip(masks, boxes, strict=True):
        for x0, y0, x1, y1 in frame_boxes:
            across = _covered(x0 * crop.resized[0] - crop.left, x1 * crop.resized[0] - crop.left, width)
            down = _covered(y0 * crop.resized[1] - crop.top, y1 * crop.resized[1] - crop.top, height)
            np.maximum(mask, down[:, None] * across[None, :], out=mask)
    return masks


def mask_to_latent(masks: np.ndarray, temporal_stride: int, spatial_stride: int) -> np.ndarray:
    """Mean over the pixels of each latent cell, [4N+1, h, w] -> [N+1, h/8, w/8]; the first has only one pixel frame."""
    frames, height, width = masks.shape
    s = spatial_stride
    small = masks.reshape(frames, height // s, s, width // s, s).mean(axis=(2, 4))
    rest = small[1:].reshape(-1, temporal_stride, *small.shape[1:]).mean(axis=1)
    return np.ascontiguousarray(np.concatenate([small[:1], rest]), dtype=np.float32)


def latent_region(
    roi: Sequence[Mapping[str, Any]], mask: Path | None, path: Path, indices: Sequence[int], crop: Crop, fps: float,
    facts: VideoFacts, source_fps: float | None, strides: tuple[int, int],
) -> np.ndarray:
    """`pixel_region` at latent resolution, [T, H, W]; `strides`: (temporal, spatial), pixels per latent cell."""
    return mask_to_latent(pixel_region(roi, mask, path, indices, crop, fps, facts, source_fps), *strides)


def pixel_region(
    roi: Sequence[Mapping[str, Any]], mask: Path | None, path: Path, indices: Sequence[int], crop: Crop, fps: float,
    facts: VideoFacts, source_fps: float | None = None,
) -> np.ndarray:
    """[frames, height, width] in [0, 1]: how much of each pixel lies in a clip's mask or, without one, its boxes.

    Args:
        roi: boxes by source frame, as in clips.jsonl.
        mask: a video, or one picture for every frame; white is inside.
        indices: the clip's frames, counted at `fps`.

    Raises:
        BadClip: the mask cannot be read or is shorter than the clip.
    """
    if mask is None:
        times = source_times(path, facts, fps, source_fps)
        frames = [max(0, bisect.bisect_right(times, index / fps + facts.late) - 1) for index in indices]
        return box_masks(boxes_at(roi, frames), crop)
    mask_facts = probe(mask, fps, source_fps)
    mask_frames = [0] if mask_facts.is_image else indices
    pixels = read_frames(mask, mask_frames, crop, fps, mask_facts, source_fps)
    white = (pixels.mean(axis=-1) > 127.5).astype(np.float32)
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
