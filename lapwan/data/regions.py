"""Regions of interest at latent resolution: what part of each latent cell the boxes or the mask cover.

A box or mask travels with the frames: same resize, same crop, same resampling in time. Shapes: T latent frames,
H, W latent height and width.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapwan.data.buckets import Crop
from lapwan.data.video import VideoFacts, probe, read_frames, source_times

Box = tuple[float, float, float, float]


def boxes_at(roi: Sequence[Mapping[str, Any]], frames: Sequence[int]) -> list[list[Box]]:
    """The boxes that hold on source frames `frames`.

    A frame takes the boxes of the nearest annotated frame, no farther than half the usual gap between annotations:
    dense annotations hold for their own frame only, sparse ones until half-way to the next.
    """
    by_frame: dict[int, list[Box]] = {}
    for entry in roi:
        by_frame.setdefault(int(entry["frame"]), []).append(tuple(float(v) for v in entry["box"]))  # type: ignore[arg-type]
    known = sorted(by_frame)
    gaps = [b - a for a, b in itertools.pairwise(known)]
    reach = statistics.median(gaps) / 2 if gaps else float("inf")
    found: list[list[Box]] = []
    for frame in frames:
        at = bisect.bisect_left(known, frame)
        nearest = min(known[max(0, at - 1) : at + 1], key=lambda other: abs(other - frame), default=None)
        found.append(by_frame[nearest] if nearest is not None and abs(nearest - frame) <= reach else [])
    return found


def _covered(low: float, high: float, cells: int) -> np.ndarray:
    """[cells]: how much of each unit cell [i, i + 1) lies in [low, high]."""
    edges = np.arange(cells + 1, dtype=np.float32)
    covered: np.ndarray = np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, 1)
    return covered


def box_masks(boxes: Sequence[Sequence[Box]], crop: Crop) -> np.ndarray:
    """[frames, height, width] in [0, 1] at bucket resolution: the part of each pixel inside any box."""
    width, height = crop.bucket
    masks = np.zeros((len(boxes), height, width), np.float32)
    for mask, frame_boxes in zip(masks, boxes, strict=True):
        for x0, y0, x1, y1 in frame_boxes:
            across = _covered(x0 * crop.resized[0] - crop.left, x1 * crop.resized[0] - crop.left, width)
            down = _covered(y0 * crop.resized[1] - crop.top, y1 * crop.resized[1] - crop.top, height)
            np.maximum(mask, down[:, None] * across[None, :], out=mask)
    return masks


def to_latent(masks: np.ndarray, temporal_stride: int, spatial_stride: int) -> np.ndarray:
    """Mean over the pixels of each latent cell: [4N+1, h, w] -> [N+1, h/8, w/8]; the first frame is alone in its."""
    frames, height, width = masks.shape
    s = spatial_stride
    small = masks.reshape(frames, height // s, s, width // s, s).mean(axis=(2, 4))
    rest = small[1:].reshape(-1, temporal_stride, *small.shape[1:]).mean(axis=1)
    return np.ascontiguousarray(np.concatenate([small[:1], rest]), dtype=np.float32)


def region(
    roi: Sequence[Mapping[str, Any]], mask: Path | None, path: Path, indices: Sequence[int], crop: Crop, fps: float,
    facts: VideoFacts, source_fps: float | None, strides: tuple[int, int],
) -> np.ndarray:
    """[T, H, W] for frames `indices` (at `fps`) of a clip; strides are (temporal, spatial).

    Raises:
        BadClip: the mask cannot be read or is shorter than the clip.
    """
    if mask is None:
        times = source_times(path, facts, fps, source_fps)
        frames = [max(0, bisect.bisect_right(times, index / fps + facts.late) - 1) for index in indices]
        return to_latent(box_masks(boxes_at(roi, frames), crop), *strides)
    mask_facts = probe(mask, fps, source_fps)
    wanted = [0] if mask_facts.is_image else indices
    pixels = read_frames(mask, wanted, crop, fps, mask_facts, source_fps)
    white = (pixels.mean(axis=-1) > 127.5).astype(np.float32)
    return to_latent(np.repeat(white, len(indices), axis=0) if mask_facts.is_image else white, *strides)

def motion_region(latents_CTHW: Tensor, share: float = 0.2) -> Tensor:
    """m_thw = 1 where mean_c |x_t − x_{t−1}| is among the clip's largest `share`, else 0: [T, H, W].

    The first frame takes the second one's. All zero where nothing moves, or for a single frame: then there is no
    region. A moving camera moves everything, so this is worth less than boxes.
    """
    frames = latents_CTHW.shape[1]
    if frames < 2:
        return latents_CTHW.new_zeros(latents_CTHW.shape[1:])
    moved = (latents_CTHW[:, 1:] - latents_CTHW[:, :-1]).abs().mean(dim=0)
    moved = torch.cat([moved[:1], moved])
    count = max(1, round(share * moved.numel()))
    threshold = moved.flatten().topk(count).values[-1]
    return ((moved >= threshold) & (moved > 0)).to(latents_CTHW.dtype)
