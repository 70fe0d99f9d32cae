"""The image-to-video condition: mask and encoded first image, concatenated to the noisy latents as channels; or, of
TI2V-5B, a clean first latent frame in them (`with_first_frame`).

The condition encodes the video [image, 0, 0, ...]. The encoder works in chunks of four frames with a cache of two input
frames per convolution. After some chunks of zeros a layer's input and cache no longer change, so neither does its
output: `encode_static` computes each layer only until then, with the same bits.

Shapes: B batch, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapwan.wan.vae import causal_conv, encode, normalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_MAX_CONVOLUTIONS = 16  # more than any one layer has
RunLayer = Callable[[Tensor, list[Any]], Tensor]


def condition_video(image_BCHW: Tensor, frames: int) -> Tensor:
    """The pixel video `[image, 0, 0, ...]` of `frames` frames: zero is mid-grey in [-1, 1].

    Args:
        image_BCHW: [B, 3, H, W] in [-1, 1].
        frames: 4N+1.
    """
    video = image_BCHW.new_zeros(*image_BCHW.shape[:2], frames, *image_BCHW.shape[2:])
    video[:, :, 0] = image_BCHW
    return video


def first_frame_mask(latents_BCTHW: Tensor, channels: int = 4) -> Tensor:
    """[B, 4, T, H, W]: 1 on the first latent frame (one channel per pixel frame of a latent frame), 0 after it.

    Args:
        latents_BCTHW: for their shape, dtype and device.
        channels: pixel frames of a latent frame.
    """
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

    Args:
        vae: the VAE.
        image_BCHW: the first frame.
        frames: 4N+1 frames of the video.

    Raises:
        ValueError: the frame count is not 4N+1.
    """
    return with_mask(encode_condition(vae, image_BCHW, frames))


def encode_condition(vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int) -> Tensor:
    """`encode([image, 0, ...])`, normalised: [B, 16, N+1, H/8, W/8] in fp32; through `encode_static` if possible.

    Args:
        vae: the VAE.
        image_BCHW: [B, 3, H, W] in [-1, 1].
        frames: 4N+1 frames of the video.

    Raises:
        ValueError: the frame count is not 4N+1.
    """
    if _has_plain_encoder(vae) and (frames - 1) % 4 == 0:
        image = image_BCHW.to(device=vae.device, dtype=vae.dtype)
        return normalise(vae, encode_static(vae, image, frames)[0].float())
    return encode(vae, condition_video(image_BCHW, frames))


def _has_plain_encoder(vae: AutoencoderKLWan) -> bool:
    """Whether the encoder is a plain sequence of layers without patches, as in the Wan2.1 VAE."""
    return vae.config.patch_size is None and not vae.config.is_residual and not vae.use_tiling


def encode_static(vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int) -> tuple[Tensor, int, int]:
    """The mode of `encode([image, 0, ...])` before normalisation, bit for bit.

    Args:
        vae: the VAE, with diffusers' plain encoder.
        image_BCHW: [B, 3, H, W] in [-1, 1], on the VAE's device and in its dtype.
        frames: 4N+1 frames of the video.

    Returns:
        Latents [B, C, N+1, H/8, W/8], how many layer evaluations were done, and how many `vae.encode` does.
    """
    layers = _encoder_layers(vae)
    first_BCTHW = image_BCHW.unsqueeze(2)
    zeros_BCTHW = torch.zeros_like(first_BCTHW).repeat(1, 1, 4, 1, 1)
    outputs: list[Tensor] = []
    chunks = (frames - 1) // 4 + 1
    for chunk in range(chunks):
        x, unchanged = (first_BCTHW, False) if chunk == 0 else (zeros_BCTHW, chunk > 1)
        for layer in layers:
            x, unchanged = layer(x, unchanged)
        outputs.append(x)
    hidden = vae.quant_conv(torch.cat(outputs, dim=2))
    return hidden.chunk(2, dim=1)[0], sum(layer.evaluations for layer in layers), chunks * len(layers)


class _CachedLayer:
    """One layer of the encoder with its convolutions' cached frames and its last output."""

    def __init__(self, run: RunLayer) -> None:
        self._run = run
        self._cache: list[Any] = [None] * _MAX_CONVOLUTIONS
        self._output: Tensor | None = None
        self._converged = False
        self.evaluations = 0

    def __call__(self, x_BCTHW: Tensor, unchanged: bool) -> tuple[Tensor, bool]:
        """(output, whether it equals the last chunk's); `unchanged`: whether the input equals the last chunk's."""
        if unchanged and self._converged:
            assert self._output is not None
            return self._output, True
        cache, output = list(self._cache), self._output
        self._output = self._run(x_BCTHW, self._cache)
        self.evaluations += 1
        self._converged = unchanged and all(_equal(old, new) for old, new in zip(cache, self._cache, strict=True))
        return self._output, unchanged and _equal(output, self._output)


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _encoder_layers(vae: AutoencoderKLWan) -> list[_CachedLayer]:
    encoder = vae.encoder

    def with_cache(block: Any) -> RunLayer:
        return lambda x, cache: block(x, feat_cache=cache, feat_idx=[0])

    def head(x: Tensor, cache: list[Any]) -> Tensor:
        return causal_conv(encoder.conv_out, encoder.nonlinearity(encoder.norm_out(x)), cache, [0])

    runs: list[RunLayer] = [lambda x, cache: causal_conv(encoder.conv_in, x, cache, [0])]
    runs += [with_cache(block) for block in (*encoder.down_blocks, encoder.mid_block)]
    return [_CachedLayer(run) for run in (*runs, head)]


def with_first_frame(x_BCTHW: Tensor, first_BC1HW: Tensor, given_B: Tensor | None = None) -> Tensor:
    """x with clean first latent frames in place of its own, as TI2V-5B takes an image.

    The VAE is causal: a clip's first latent frame encodes its first pixel frame alone.

    Args:
        x_BCTHW: latents.
        first_BC1HW: clean first latent frames.
        given_B: whose is replaced; None: every sample's.
    """
    first = first_BC1HW.to(x_BCTHW)
    if given_B is not None:
        first = torch.where(given_B.view(-1, 1, 1, 1, 1), first, x_BCTHW[:, :, :1])
    return torch.cat([first, x_BCTHW[:, :, 1:]], dim=2)
