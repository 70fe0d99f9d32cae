"""The Wan VAE over all frames at once, equal to diffusers' frame-by-frame loop and many times faster to train.

diffusers feeds the causal network one latent frame at a time and carries features over. The same function in one go:
    causal convolutions   the whole clip, zeros before its start
    temporal halving      y[0] = x[0], y[k] = conv(x[2k-2], x[2k-1], x[2k])
    temporal doubling     y[0] = x[0], the rest: the causal convolution over x[1:], two frames out for each
    shortcuts (Wan2.2)    averaging puts a zero frame before the first; doubling drops the first of its two
Shapes: B clips, C channels, T frames, H, W.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor


def _down(block: Any, x: Tensor) -> Tensor:
    y = x
    for resnet in block.resnets:
        y = resnet(y)
    if block.downsampler is not None:
        y = _resample(block.downsampler, y)
    return y + block.avg_shortcut(x)  # type: ignore[no-any-return]


def _up(block: Any, x: Tensor) -> Tensor:
    y = x
    for resnet in block.resnets:
        y = resnet(y)
    upsampler = getattr(block, "upsampler", None)  # of Wan2.2's; Wan2.1's has a list
    if upsampler is None and getattr(block, "upsamplers", None) is not None:
        upsampler = block.upsamplers[0]
    if upsampler is not None:
        y = _resample(upsampler, y)
    if getattr(block, "avg_shortcut", None) is not None:
        y = y + block.avg_shortcut(x, first_chunk=True)
    return y


def _each_frame(layer: Any, x: Tensor) -> Tensor:
    batch, _, frames = x.shape[:3]
    y: Tensor = layer(x.transpose(1, 2).flatten(0, 1))
    return torch.unflatten(y, 0, (batch, frames)).transpose(1, 2)


def _resample(layer: Any, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        later = layer.time_conv(x[:, :, 1:])
        batch, channels, frames, height, width = later.shape
        later = later.reshape(batch, 2, channels // 2, frames, height, width).permute(0, 2, 3, 1, 4, 5)
        x = torch.cat([x[:, :, :1], later.reshape(batch, channels // 2, 2 * frames, height, width)], dim=2)
    x = _each_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def moments(vae: Any, pixels_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents, not normalised."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(pixels_BCTHW, vae.config.patch_size or 1))
    for layer in encoder.down_blocks:
        step = {"WanResample": _resample, "WanResidualDownBlock": _down}.get(type(layer).__name__)
        x = layer(x) if step is None else step(layer, x)
    x = encoder.mid_block(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x)))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def reconstruct(vae: Any, raw_BCTHW: Tensor) -> Tensor:
    """Pixels of latents that are not normalised, not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(raw_BCTHW)))
    for block in decoder.up_blocks:
        x = _up(block, x)
    pixels: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(pixels, vae.config.patch_size or 1)  # type: ignore[no-any-return]
