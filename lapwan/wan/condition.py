"""The image-to-video condition: mask and encoded first image, concatenated to the noisy latents as channels.

Shapes: B batch, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan.wan.still import encode_still, supports
from lapwan.wan.vae import encode, normalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def condition_video(image_BCHW: Tensor, frames: int) -> Tensor:
    """The pixel video `[image, 0, 0, ...]` of `frames` frames: zero is mid-grey in [-1, 1]."""
    video = image_BCHW.new_zeros(*image_BCHW.shape[:2], frames, *image_BCHW.shape[2:])
    video[:, :, 0] = image_BCHW
    return video


def first_frame_mask(latents_BCTHW: Tensor, channels: int = 4) -> Tensor:
    """[B, 4, T, H, W]: 1 on the first latent frame (one channel per pixel frame of a latent frame), 0 after."""
    batch, _, frames, height, width = latents_BCTHW.shape
    mask = latents_BCTHW.new_zeros(batch, channels, frames, height, width)
    mask[:, :, 0] = 1
    return mask


def with_mask(condition_BCTHW: Tensor) -> Tensor:
    """`mask | condition` of an encoded condition: [B, 16, T, H, W] -> [B, 20, T, H, W]."""
    return torch.cat([first_frame_mask(condition_BCTHW), condition_BCTHW], dim=1)


def image_condition(vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int) -> Tensor:
    """`mask | encode([image, 0, ...])`: image [B, 3, H, W] in [-1, 1] -> [B, 20, N+1, H/8, W/8] in fp32.

    Source: diffusers' WanImageToVideoPipeline.prepare_latents.
    """
    return with_mask(encode_condition(vae, image_BCHW, frames))


def encode_condition(vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int) -> Tensor:
    """`encode([image, 0, ...])`, normalised, [B, 16, N+1, H/8, W/8] in fp32; see `still` for what is spared."""
    if supports(vae) and (frames - 1) % 4 == 0:
        image = image_BCHW.to(device=vae.device, dtype=vae.dtype)
        return normalise(vae, encode_still(vae, image, frames)[0].float())
    return encode(vae, condition_video(image_BCHW, frames))
