"""Pictures without an instrument, made of pictures with one and its boxes.

Shapes: T frames, H, W pixels, masks [T, H, W] in 0..1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from lapwan.evaluation.judge_net import Canvas

_SMALLEST = 0.35  # of the picture's side, of what is cut out beside the boxes


def middle_of(region_THW: np.ndarray) -> np.ndarray:
    """[T, 2] the middle of each frame's region, x and y in 0..1; NaN without one."""
    height, width = region_THW.shape[1:]
    xs, ys = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    with np.errstate(invalid="ignore", divide="ignore"):
        area = region_THW.sum(axis=(1, 2))
        x = (region_THW.sum(axis=1) * xs).sum(axis=1) / area
        y = (region_THW.sum(axis=2) * ys).sum(axis=1) / area
    return np.stack([x, y], axis=1)


def _extent(region_HW: np.ndarray) -> tuple[int, int, int, int]:
    """top, bottom, left, right (ends excluded) of what is inside."""
    rows, columns = (np.flatnonzero(region_HW.max(axis=axis) > 0.25) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _soft(region_THW: np.ndarray) -> np.ndarray:
    """The region grown by some pixels, its edge soft."""
    grow = max(3, region_THW.shape[1] // 24) | 1
    mask = torch.from_numpy((region_THW > 0.25).astype(np.float32))[:, None]
    mask = F.max_pool2d(mask, grow, 1, grow // 2)
    blurred: np.ndarray = F.avg_pool2d(mask, grow, 1, grow // 2, count_include_pad=False)[:, 0].numpy()
    return blurred


def _shifts(region_THW: np.ndarray) -> list[tuple[int, int]]:
    """Moves (dy, dx) by the size of the region that lead off it and stay in the picture."""
    union = region_THW.max(axis=0)
    height, width = union.shape
    top, bottom, left, right = _extent(union)
    tall, wide = round(1.15 * (bottom - top)) + 2, round(1.15 * (right - left)) + 2
    moves = [(dy, dx) for dy in (-tall, 0, tall) for dx in (-wide, 0, wide) if (dy, dx) != (0, 0)]
    return [(dy, dx) for dy, dx in moves if -0.4 * tall <= top + dy and bottom + dy <= height + 0.4 * tall
            and -0.4 * wide <= left + dx and right + dx <= width + 0.4 * wide]


def _moved(values: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """The picture moved by (dy, dx); what comes in repeats the edge."""
    height, width = values.shape[1:3]
    rows = np.clip(np.arange(height) - dy, 0, height - 1)
    columns = np.clip(np.arange(width) - dx, 0, width - 1)
    return values[:, rows][:, :, columns]


def covered(
    frames_THWC: np.ndarray, region_THW: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray] | None:
    """The frames with the region covered by what lies beside it, and a twin covered beside the region instead; None
    where there are no two places beside it.

    What covers is the neighbour that is most alike along the region's edge, in one of the better half at random.
    """
    shifts = _shifts(region_THW)
    if len(shifts) < 2:
        return None
    frames, mask = frames_THWC.astype(np.float32), _soft(region_THW)[..., None]
    edge = mask * (1 - mask)
    patches = [_moved(frames, -dy, -dx) for dy, dx in shifts]  # at the region: what lies (dy, dx) from it
    unlike = [float((edge * np.abs(patch - frames)).sum()) for patch in patches]
    better = np.argsort(unlike)[:max(1, len(shifts) // 2)]
    chosen = int(rng.choice(better))
    empty = frames + mask * (patches[chosen] - frames)
    dy, dx = shifts[int(rng.choice([n for n in range(len(shifts)) if n != chosen]))]
    elsewhere = _moved(mask, dy, dx) * (1 - mask)
    from_y, from_x = shifts[chosen]
    twin = frames + elsewhere * (_moved(frames, dy - from_y, dx - from_x) - frames)
    return empty.round().astype(np.uint8), twin.round().astype(np.uint8)


def boxes_beside(
    frames_THWC: np.ndarray, region_THW: np.ndarray, canvas: Canvas, rng: np.random.Generator
) -> np.ndarray | None:
    """The largest cut of the picture's shape that no region of any frame touches, enlarged to the canvas; None if it is
    small."""
    height, width = region_THW.shape[1:]
    top, bottom, left, right = _extent(region_THW.max(axis=0))
    free = [(0, top, 0, width), (bottom, height, 0, width), (0, height, 0, left), (0, height, right, width)]
    cuts = []
    for y0, y1, x0, x1 in free:
        share = min((y1 - y0) / height, (x1 - x0) / width)
        if share >= _SMALLEST:
            h, w = int(share * height), int(share * width)
            cuts.append((share, y0 + int(rng.integers(y1 - y0 - h + 1)), x0 + int(rng.integers(x1 - x0 - w + 1)), h, w))
    if not cuts:
        return None
    _, y, x, h, w = max(cuts)
    return canvas.put(frames_THWC[:, y:y + h, x:x + w])
