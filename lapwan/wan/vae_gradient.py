"""Decode latents with a gradient, one latent frame at a time, each recomputed in the backward pass.

The decoder is causal: a latent frame's pixels depend on it and on what each convolution kept of the frames before. Here
what is kept goes in and comes out of every frame's decoding as plain tensors, so that a frame may be checkpointed: its
activations live only while it is decoded or differentiated, and the result is that of `decode`, gradient included. The
first frame keeps nothing and needs nothing, so a still picture is decoded without state.

Shapes: B batch, C channels, T latent frames, H, W latent height and width; pixels [B, 3, frames, 8H, 8W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lapwan.wan.vae import denormalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def decode_stills(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """The first latent frame alone, as a picture: [B, 3, H, W] in [-1, 1], fp32, with gradient, without state."""
    raw = vae.post_quant_conv(denormalise(vae, _wide(latents_BCTHW[:, :, :1])).to(vae.dtype))
    pixels: Tensor = _run(lambda x: vae.decoder(x, first_chunk=True), raw)
    return _pixels(vae, pixels)[:, :, 0]


def decode_frames(vae: AutoencoderKLWan, latents_BCTHW: Tensor, wanted: Sequence[int]) -> Tensor:
    """Chosen frames of a video: [B, n, 3, H, W] in [-1, 1], fp32, with gradient; frames after the last are not decoded.

    Args:
        wanted: pixel frames, ascending; latent frame 0 is pixel frame 0, latent frame t > 0 the four from 4t − 3 on.
    """
    if list(wanted) == [0]:
        return decode_stills(vae, latents_BCTHW).unsqueeze(1)
    stride = vae.config.scale_factor_temporal
    last = -(-wanted[-1] // stride)  # the latent frame of the last wanted pixel frame
    raw = vae.post_quant_conv(denormalise(vae, _wide(latents_BCTHW[:, :, : last + 1])).to(vae.dtype))
    kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    chosen = set(wanted)
    found: list[Tensor] = []
    for t in range(last + 1):
        pixels, kept = _decode_one(vae, raw[:, :, t : t + 1], kept, first=t == 0)
        start = 0 if t == 0 else stride * (t - 1) + 1
        found += [pixels[:, :, i] for i in range(pixels.shape[2]) if start + i in chosen]
    return torch.stack(found, dim=1)


def _decode_one(
    vae: AutoencoderKLWan, frame_BC1HW: Tensor, kept: list[Any], first: bool
) -> tuple[Tensor, list[Any]]:
    """One latent frame's pixels, and what the convolutions keep for the next one."""
    places = [i for i, one in enumerate(kept) if isinstance(one, Tensor)]
    rest = [None if isinstance(one, Tensor) else one for one in kept]  # None, or diffusers' mark of a first repetition
    after: list[Any] = []

    def decode(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        cache = list(rest)
        for place, tensor in zip(places, tensors, strict=True):
            cache[place] = tensor
        out = vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=first)
        after[:] = [None if isinstance(one, Tensor) else one for one in cache]
        after_places[:] = [i for i, one in enumerate(cache) if isinstance(one, Tensor)]
        return (out, *(cache[i] for i in after_places))

    after_places: list[int] = []
    pixels, *tensors = _run(decode, frame_BC1HW, *(kept[i] for i in places))
    for place, tensor in zip(after_places, tensors, strict=True):
        after[place] = tensor
    return _pixels(vae, pixels), after


def _run(function: Any, *inputs: Tensor) -> Any:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def _pixels(vae: AutoencoderKLWan, raw: Tensor) -> Tensor:
    """Clamped to [-1, 1] as `decode` does, in fp32: outside of it no gradient passes."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    if vae.config.patch_size is not None:
        raw = unpatchify(raw, patch_size=vae.config.patch_size)
    return _wide(raw).clamp(-1.0, 1.0)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def frame_choice(num_frames: int, rule: str | int) -> list[int]:
    """Which frames of a video are judged: `all`, `first`, or k evenly spread from the first to the last."""
    if rule == "first" or num_frames == 1:
        return [0]
    if rule == "all":
        return list(range(num_frames))
    count = min(int(rule), num_frames)
    if count == 1:
        return [0]
    return sorted({round(i * (num_frames - 1) / (count - 1)) for i in range(count)})
