"""A clean first frame in x: the first latent frame is the given one at timestep 0, the others are at the step's.

The VAE is causal: the first latent frame of a clip encodes its first pixel frame alone, so the latents of a clip hold
those of its first frame.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, N tokens.
Source: diffusers' WanImageToVideoPipeline with `expand_timesteps`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lapwan.wan.transformer.forward import TokenTimes


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


def row_of_token(x_BCTHW: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[N]: 0 for the tokens of the first latent frame, 1 for the others.

    Args:
        x_BCTHW: latents, for their shape and device.
        patch: (frames, height, width) of a token, in latent pixels.
    """
    frames, height, width = (size // side for size, side in zip(x_BCTHW.shape[2:], patch, strict=True))
    tokens = torch.arange(frames * height * width, device=x_BCTHW.device)
    return (tokens >= height * width).long()


def token_times(x_BCTHW: Tensor, timestep_B: Tensor, given_B: Tensor, patch: tuple[int, int, int]) -> TokenTimes:
    """The timesteps of a batch in which some samples have a clean first frame: 0 for its tokens.

    Args:
        x_BCTHW: latents, for their shape and device.
        timestep_B: of each sample.
        given_B: whose first frame is clean, on the latents' device.
        patch: as for `row_of_token`.
    """
    first_B = torch.where(given_B, torch.zeros_like(timestep_B), timestep_B)
    return TokenTimes(torch.stack([first_B, timestep_B], dim=1), row_of_token(x_BCTHW, patch))
