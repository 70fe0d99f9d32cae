"""Images of any size to the square input of a vision encoder, differentiably and deterministically.

Resizing is two small matrix products, so that its gradient is the same in every run: GPU interpolation kernels sum
their gradients in no fixed order.
Shapes: B images, C channels, H, W pixels. Values in [0, 1].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Convention = Literal["pad", "squash", "crop"]
Kernel = Literal["bicubic", "bilinear"]


def _weight(distance: Tensor, kernel: Kernel) -> Tensor:
    """Keys' cubic with a = −1/2 (support 2), or the triangle (support 1)."""
    d = distance.abs()
    if kernel == "bilinear":
        return (1 - d).clamp_min(0)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


@lru_cache(maxsize=64)
def resize_matrix(before: int, after: int, kernel: Kernel) -> Tensor:
    """[after, before]: row i weighs the inputs around (i + 1/2)·s − 1/2, s = before / after, each row summing to 1.

    The kernel is stretched by s where the image shrinks (antialiasing), as in Pillow.
    """
    step = before / after
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * step - 0.5
    distance = (torch.arange(before, dtype=torch.float64) - centre[:, None]) / max(step, 1.0)
    rows = _weight(distance, kernel)
    return (rows / rows.sum(dim=1, keepdim=True)).float()


def resize(pixels_BCHW: Tensor, height: int, width: int, kernel: Kernel = "bicubic") -> Tensor:
    """Resized with antialiasing: rows · x · columnsᵀ. A bicubic result may overshoot [0, 1] a little."""
    rows = resize_matrix(pixels_BCHW.shape[-2], height, kernel).to(pixels_BCHW)
    columns = resize_matrix(pixels_BCHW.shape[-1], width, kernel).to(pixels_BCHW)
    return rows @ pixels_BCHW @ columns.T


def to_square(pixels_BCHW: Tensor, size: int, convention: Convention) -> Tensor:
    """[B, C, size, size] by one of three conventions, which are the same for a square image.

    pad: the longest side to `size`, black around the image; squash: both sides to `size`; crop: the shortest side to
    `size`, the middle of the other.
    """
    height, width = pixels_BCHW.shape[-2:]
    if convention == "squash" or height == width:
        return resize(pixels_BCHW, size, size)
    side = max(height, width) if convention == "pad" else min(height, width)
    new_height, new_width = (max(1, round(n * size / side)) for n in (height, width))
    resized = resize(pixels_BCHW, new_height, new_width)
    top, left = abs(size - new_height) // 2, abs(size - new_width) // 2
    if convention == "crop":
        return resized[..., top:top + size, left:left + size]
    below, right = size - new_height - top, size - new_width - left
    return torch.nn.functional.pad(resized, (left, right, top, below))
