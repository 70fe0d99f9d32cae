"""A clean first frame in x: the first latent frame is the given one at timestep 0, the others are at the step's.

The VAE is causal: the first latent frame of a clip encodes its first pixel frame alone, so the latents of a clip hold
those of its first frame.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, N tokens.
Source: diffusers' WanImageToVideoPipeline with `expand_timesteps`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_first_frame(x_BCTHW: Tensor, first_BC1HW: Tensor, given_B: Tensor | None = None) -> Tensor:
    """x with the given first latent frames instead of its own.

    Args:
        x_BCTHW: latents.
        first_BC1HW: clean first latent frames.
        given_B: whose is replaced; None: every sample's.
    """
    first = first_BC1HW.to(x_BCTHW)
    if given_B is not None:
        first = torch.where(given_B.view(-1, 1, 1, 1, 1), first, x_BCTHW[:, :, :1])
    return torch.cat([first, x_BCTHW[:, :, 1:]], dim=2)
