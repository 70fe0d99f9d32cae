"""Decode latents with a gradient: latent frame by latent frame, stage by stage, each recomputed in the backward pass.

The decoder is causal: a latent frame's pixels depend on it and on what each convolution kept of the frames before. Here
what is kept goes in and comes out of every stage as plain tensors, so that a stage may be checkpointed: its activations
live only while it is computed or differentiated, and the result is that of `decode`, gradient included. The first frame
keeps nothing and needs nothing, so a still picture is decoded without state.

Shapes: B batch, C channels, T latent frames, H, W latent height and width; pixels [B, 3, frames, 8H, 8W] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lapwan.wan.vae import denormalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


_KEPT = 2  # input frames a causal convolution of width 3 keeps
Kept = list[Any] | None  # a tensor a convolution, None before its first frame; or no state at all
Stage = Callable[[Tensor, Kept, list[int], bool], Tensor]


def decode_stills(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """The first latent frame alone, as a picture: [B, 3, H, W] in [-1, 1], fp32, with gradient, without state."""
    x = _entered(vae, latents_BCTHW[:, :, :1])
    for stage in _stages(vae.decoder):
        x = _run(lambda y, stage=stage: stage(y, None, [0], True), x)
    return _pixels(vae, x)[:, :, 0]


def decode_frames(vae: AutoencoderKLWan, latents_BCTHW: Tensor, wanted: Sequence[int]) -> Tensor:
    """Chosen frames of a video: [B, n, 3, H, W] in [-1, 1], fp32, with gradient; frames after the last are not decoded.

    Args:
        wanted: pixel frames, ascending; latent frame 0 is pixel frame 0, latent frame t > 0 the four from 4t − 3 on.
    """
    if list(wanted) == [0]:
        return decode_stills(vae, latents_BCTHW).unsqueeze(1)
    stride = vae.config.scale_factor_temporal
    last = -(-wanted[-1] // stride)  # the latent frame of the last wanted pixel frame
    entered = _entered(vae, latents_BCTHW[:, :, : last + 1])
    kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    chosen = set(wanted)
    found: list[Tensor] = []
    for t in range(last + 1):
        x, place = entered[:, :, t : t + 1], 0
        for stage in _stages(vae.decoder):
            x, place = _with_state(stage, x, kept, place, first=t == 0)
        pixels = _pixels(vae, x)
        start = 0 if t == 0 else stride * (t - 1) + 1
        found += [pixels[:, :, i] for i in range(pixels.shape[2]) if start + i in chosen]
    return torch.stack(found, dim=1)


def _entered(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    entered: Tensor = vae.post_quant_conv(denormalise(vae, _wide(latents_BCTHW)).to(vae.dtype))
    return entered


def _stages(decoder: Any) -> Iterator[Stage]:
    """The decoder as it is built: first convolution, middle, one stage a resolution, head."""
    yield lambda x, kept, place, first: _causal(decoder.conv_in, x, kept, place)
    yield lambda x, kept, place, first: decoder.mid_block(x, feat_cache=kept, feat_idx=place)
    for block in decoder.up_blocks:
        yield _upward(block)
    yield lambda x, kept, place, first: _causal(
        decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), kept, place)


def _upward(block: Any) -> Stage:
    def run(x_BCTHW: Tensor, kept: Kept, place: list[int], first: bool) -> Tensor:
        out: Tensor = block(x_BCTHW, feat_cache=kept, feat_idx=place, first_chunk=first)
        return out

    return run


def _causal(convolution: Any, x_BCTHW: Tensor, kept: Kept, place: list[int]) -> Tensor:
    """A causal convolution over what it kept and the new frame; keeps the last two."""
    if kept is None:
        alone: Tensor = convolution(x_BCTHW)
        return alone
    before = kept[place[0]]
    after = x_BCTHW[:, :, -_KEPT:].clone()
    if after.shape[2] < _KEPT and before is not None:
        after = torch.cat([before[:, :, -1:], after], dim=2)
    out: Tensor = convolution(x_BCTHW, before)
    kept[place[0]] = after
    place[0] += 1
    return out


def _with_state(stage: Stage, x_BCTHW: Tensor, kept: list[Any], place: int, first: bool) -> tuple[Tensor, int]:
    """One stage of one frame from convolution `place` on; `kept` is updated. Returns its output and where it ends."""
    before = list(kept)
    tensors = [i for i in range(place, len(kept)) if isinstance(kept[i], Tensor)]
    marks: list[Any] = []  # what is kept besides tensors; the tensors themselves must not outlive their use here
    end = [place]

    def run(x: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
        cache, counter = list(before), [place]
        for index, tensor in zip(tensors, own, strict=True):
            cache[index] = tensor
        out = stage(x, cache, counter, first)
        marks[:], end[0] = [None if isinstance(one, Tensor) else (one,) for one in cache], counter[0]
        return (out, *(cache[i] for i in range(place, counter[0]) if isinstance(cache[i], Tensor)))

    out, *fresh = _run(run, x_BCTHW, *(kept[i] for i in tensors))
    of_tensor = iter(fresh)
    for index in range(place, end[0]):
        # Some convolutions keep diffusers' mark of a first repetition instead of a frame.
        kept[index] = next(of_tensor) if marks[index] is None else marks[index][0]
    return out, end[0]


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
