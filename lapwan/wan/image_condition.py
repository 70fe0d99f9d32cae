"""The image-to-video condition: mask and encoded first image, concatenated to the noisy latents as channels.

Shapes: B batch, C channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapwan.wan.vae import encode, normalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
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

_KEPT = 2  # input frames a causal convolution of width 3 keeps
_SLOTS = 16  # more convolutions than any one layer has
Run = Callable[[Tensor, list[Any]], Tensor]


class _Layer:
    """One layer of the encoder with the frames its convolutions keep and its last input and output."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._kept: list[Any] = [None] * _SLOTS
        self._output: Tensor | None = None
        self._settled = False
        self.computed = 0

    def __call__(self, x_BCTHW: Tensor, same_input: bool) -> tuple[Tensor, bool]:
        """(output, whether it equals the last chunk's)."""
        if same_input and self._settled:
            assert self._output is not None
            return self._output, True
        before, last = list(self._kept), self._output
        self._output = self._run(x_BCTHW, self._kept)
        self.computed += 1
        self._settled = same_input and all(_equal(old, new) for old, new in zip(before, self._kept, strict=True))
        return self._output, same_input and _equal(last, self._output)


def _equal(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _layers(vae: AutoencoderKLWan) -> list[_Layer]:
    encoder = vae.encoder

    def with_cache(module: Any) -> Run:
        return lambda x, kept: module(x, feat_cache=kept, feat_idx=[0])

    def head(x: Tensor, kept: list[Any]) -> Tensor:
        return _causal(encoder.conv_out, encoder.nonlinearity(encoder.norm_out(x)), kept)

    runs: list[Run] = [lambda x, kept: _causal(encoder.conv_in, x, kept)]
    runs += [with_cache(block) for block in (*encoder.down_blocks, encoder.mid_block)]
    return [_Layer(run) for run in (*runs, head)]


def _causal(convolution: Any, x_BCTHW: Tensor, kept: list[Any]) -> Tensor:
    """A causal convolution over what it kept and the new frames; keeps the last two."""
    before = kept[0]
    out: Tensor = convolution(x_BCTHW, before)
    last = x_BCTHW if before is None or x_BCTHW.shape[2] >= _KEPT else torch.cat([before, x_BCTHW], dim=2)
    kept[0] = last[:, :, -_KEPT:].clone()
    return out


def supports(vae: AutoencoderKLWan) -> bool:
    """The Wan2.1 VAE's encoder: a plain sequence of layers, without patches."""
    return vae.config.patch_size is None and not vae.config.is_residual and not vae.use_tiling


def encode_still(vae: AutoencoderKLWan, image_BCHW: Tensor, frames: int) -> tuple[Tensor, int, int]:
    """The mode of `encode([image, 0, ...])`, before normalisation, bit for bit.

    Returns:
        [B, C, N+1, H/8, W/8], layer evaluations done, layer evaluations a plain encoding does.
    """
    layers = _layers(vae)
    first_BCTHW = image_BCHW.unsqueeze(2)
    zeros_BCTHW = torch.zeros_like(first_BCTHW).repeat(1, 1, 4, 1, 1)
    outputs: list[Tensor] = []
    chunks = (frames - 1) // 4 + 1
    for chunk in range(chunks):
        x, same = (first_BCTHW, False) if chunk == 0 else (zeros_BCTHW, chunk > 1)
        for layer in layers:
            x, same = layer(x, same)
        outputs.append(x)
    hidden = vae.quant_conv(torch.cat(outputs, dim=2))
    return hidden.chunk(2, dim=1)[0], sum(layer.computed for layer in layers), chunks * len(layers)
