"""A region of interest from motion alone, for clips that carry neither boxes nor a mask.

Shapes: C latent channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
