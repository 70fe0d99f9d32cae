"""The image-to-video condition: mask and encoded first image, concatenated to the noisy latents as channels; or, of
TI2V-5B, a clean first latent frame in them (`with_first_frame`).

The condition encodes the video [image, 0, 0, ...], or [image, 0, ..., 0, last image]. The encoder works in chunks of
four frames with a cache of two input frames per convolution. After some chunks of zeros a layer's input and cache no
longer change, so neither does its output: `encode_static` computes each layer only until then, and again for a last
image, with the same bits.

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


def condition_video(image_BCHW: Tensor, frames: int, last_BCHW: Tensor | None = None) -> Tensor:
    """The pixel video `[image, 0, 0, ...]` or `[image, 0, ..., 0, last]` of `frames` frames: zero is mid-grey in
    [-1, 1].

    Args:
        image_BCHW: [B, 3, H, W] in [-1, 1]; `last_BCHW` too.
        frames: 4N+1.
    """
    video = image_BCHW.new_zeros(*image_BCHW.shape[:2], frames, *image_BCHW.shape[2:])
    video[:, :, 0] = image_BCHW
    if last_BCHW is not None:
        video[:, :, -1] = last_BCHW
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


def with_mask(condition_BCTHW: Tensor, last: bool = False) -> Tensor:
    """`mask | condition` of an encoded condition: [B, 16, T, H, W] -> [B, 20, T, H, W].

    Args:
        last: the last frame is given too: the mask's last channel is 1 on the last latent frame.
    """
    mask = first_frame_mask(condition_BCTHW)
    if last:
        mask[:, -1, -1] = 1
    return torch.cat([mask, condition_BCTHW], dim=1)


def image_condition(
    vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int, last_BCHW: Tensor | None = None
) -> Tensor:
    """`mask | encode([image, 0, ...])`: image [B, 3, H, W] in [-1, 1] -> [B, 20, N+1, H/8, W/8] in fp32.

    Source: diffusers' WanImageToVideoPipeline.prepare_latents.

    Args:
        vae: the VAE.
        image_BCHW: the first frame.
        frames: 4N+1 frames of the video.
        last_BCHW: the last frame of more than one, if it is given too.

    Raises:
        ValueError: the frame count is not 4N+1.
    """
    return with_mask(encode_condition(vae, image_BCHW, frames, last_BCHW), last_BCHW is not None)


def encode_condition(
    vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int, last_BCHW: Tensor | None = None
) -> Tensor:
    """`encode([image, 0, ...])`, normalised: [B, 16, N+1, H/8, W/8] in fp32; through `encode_static` if possible.

    Args:
        vae: the VAE.
        image_BCHW: [B, 3, H, W] in [-1, 1].
        frames: 4N+1 frames of the video.
        last_BCHW: see `image_condition`.

    Raises:
        ValueError: the frame count is not 4N+1.
    """
    if _has_plain_encoder(vae) and (frames - 1) % 4 == 0:
        image = image_BCHW.to(device=vae.device, dtype=vae.dtype)
        last = None if last_BCHW is None else last_BCHW.to(image)
        return normalise(vae, encode_static(vae, image, frames, last)[0].float())
    return encode(vae, condition_video(image_BCHW, frames, last_BCHW))


def _has_plain_encoder(vae: AutoencoderKLWan) -> bool:
    """Whether the encoder is a plain sequence of layers without patches, as in the Wan2.1 VAE."""
    return vae.config.patch_size is None and not vae.config.is_residual and not vae.use_tiling


def encode_static(
    vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int, last_BCHW: Tensor | None = None
) -> tuple[Tensor, int, int]:
    """The mode of `encode([image, 0, ...])` before normalisation, bit for bit.

    Args:
        vae: the VAE, with diffusers' plain encoder.
        image_BCHW: [B, 3, H, W] in [-1, 1], on the VAE's device and in its dtype.
        frames: 4N+1 frames of the video.
        last_BCHW: the last of them, if it is not zero.

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
        if last_BCHW is not None and chunk == chunks - 1:
            x, unchanged = condition_video(zeros_BCTHW[:, :, 0], 4, last_BCHW), False
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
