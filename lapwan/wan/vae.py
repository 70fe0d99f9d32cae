"""The VAE: pixels in [-1, 1] to normalised latents and back, also with gradient.

`decode_frames` decodes latent frame by latent frame and stage by stage, each recomputed in the backward. The decoder is
causal: a latent frame's pixels depend on it and on the input frames that each convolution caches of the frames before.
Here the cache goes in and comes out of every stage as plain tensors, so that a stage can be checkpointed: its
activations live only while it is computed or differentiated, and the result is that of `decode`, gradient included. The
first frame has an empty cache, so it is decoded without one.

Shapes: B batch, C channels, T frames (pixels: 4N+1, latents: N+1), H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lapwan.faults import library_reads
from lapwan.models.configs import component_config
from lapwan.models.device import widened
from lapwan.models.original_layout import check_filled, load_vae_file, loads_by_name
from lapwan.models.spec import component_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from lapwan.models.spec import ModelSpec

_CACHED_FRAMES = 2  # input frames that a causal convolution of width 3 keeps
ConvCache = list[Any] | None  # a tensor per convolution, None before its first frame; None: no cache at all
Stage = Callable[[Tensor, ConvCache, list[int], bool], Tensor]


def load_vae(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLWan:
    """The model's VAE, frozen and in eval mode (from_pretrained leaves its parameters trainable). fp32 is safest.

    Args:
        spec: the model.
        dtype: of the weights.
        device: of the weights.
    """
    from diffusers import AutoencoderKLWan

    folder = spec.path / "vae"
    files = component_files(folder)
    config = component_config(folder)
    with library_reads("the VAE", folder):
        if len(files) == 1 and loads_by_name(files):
            vae = load_vae_file(config, files[0], dtype)
        else:
            vae = AutoencoderKLWan.from_pretrained(folder, dtype=dtype, local_files_only=True)
    check_filled(vae, folder)
    vae.requires_grad_(False)
    use_fast_norms(vae)
    return vae.eval().to(device)


def use_fast_norms(vae: nn.Module) -> None:
    """Compute the VAE's norms over channels with a plain sum on a CPU; the same up to rounding.

    On a CPU, torch's vector norm over a strided dimension takes ten times as long as the sum of x²: 40 % of decoding
    with the embedded model.
    """
    for module in vae.modules():
        if type(module).__name__ == "WanRMS_norm" and module.channel_first:
            module.forward = partial(_channel_norm, module, module.forward)


def _channel_norm(module: Any, original: Callable[[Tensor], Tensor], x_BC: Tensor) -> Tensor:
    """x / max(‖x‖, 1e-12) · √C · γ + bias over dimension 1."""
    if x_BC.device.type != "cpu" or x_BC.dtype.itemsize < 4:  # squares in bf16 are too coarse
        return original(x_BC)
    inverse = torch.rsqrt(x_BC.square().sum(dim=1, keepdim=True).clamp_min(1e-24))
    normed: Tensor = x_BC * inverse * module.scale * module.gamma + module.bias
    return normed


def channels_last(vae: AutoencoderKLWan) -> None:
    """Convert the convolutions' weights to channels-last in place: a tenth faster on a GPU, the same up to rounding."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)


def normalise(vae: AutoencoderKLWan, raw_BCTHW: Tensor) -> Tensor:
    """`(z - mean) / std` per channel, in z's dtype, on z's device.

    Args:
        vae: its config has `latents_mean` and `latents_std`.
        raw_BCTHW: z as the encoder returns it.
    """
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return (raw_BCTHW - _per_channel(mean, raw_BCTHW)) / _per_channel(std, raw_BCTHW)


def denormalise(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """`z * std + mean` per channel, in z's dtype, on z's device.

    Args:
        vae: its config has `latents_mean` and `latents_std`.
        latents_BCTHW: normalised latents.
    """
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return latents_BCTHW * _per_channel(std, latents_BCTHW) + _per_channel(mean, latents_BCTHW)


def encode(vae: AutoencoderKLWan, pixels_BCTHW: Tensor) -> Tensor:
    """`(mode(encode(x)) - mean) / std`: pixels [B, 3, 4N+1, H, W] in [-1, 1] -> latents [B, C, N+1, H/8, W/8] in fp32.

    Args:
        vae: the VAE; pixels are moved to its device and dtype.
        pixels_BCTHW: [B, 3, 4N+1, H, W] in [-1, 1]; Wan2.2's VAE gives latents of H/16, W/16.

    Raises:
        ValueError: the frame count is not 4N+1; the VAE itself would silently drop the rest.
    """
    frames = pixels_BCTHW.shape[2]
    if (frames - 1) % 4:
        raise ValueError(f"{frames} frames; the VAE takes 4N+1")
    pixels = pixels_BCTHW.to(device=vae.device, dtype=vae.dtype)
    return normalise(vae, vae.encode(pixels).latent_dist.mode().float())


def decode(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """`decode(z * std + mean)`: latents -> pixels [B, 3, T, H, W] clamped to [-1, 1], in fp32.

    Args:
        vae: the VAE; latents are moved to its device.
        latents_BCTHW: normalised latents of N+1 frames, which give 4N+1 frames of pixels.
    """
    raw = denormalise(vae, latents_BCTHW.to(device=vae.device, dtype=torch.float32))
    pixels: Tensor = vae.decode(raw.to(vae.dtype)).sample.float()
    return pixels


def to_frames(pixels_BCTHW: Tensor) -> np.ndarray:
    """[-1, 1] pixels [1, 3, T, H, W] -> uint8 frames [T, H, W, 3]: round(127.5·(x + 1)), clamped."""
    scaled = ((pixels_BCTHW[0].float().clamp(-1, 1) + 1.0) * 127.5).round()
    return scaled.permute(1, 2, 3, 0).to("cpu", torch.uint8).numpy()


def decode_first_frame(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """The first frame: [B, 3, H, W] in [-1, 1], fp32, with gradient, without a cache.

    Args:
        vae: the VAE.
        latents_BCTHW: normalised latents; only the first frame is read.
    """
    x = _decoder_input(vae, latents_BCTHW[:, :, :1])
    for stage in _decoder_stages(vae.decoder):
        x = _checkpointed(lambda y, stage=stage: stage(y, None, [0], True), x)
    return _to_pixels(vae, x)[:, :, 0]


def decode_frames(vae: AutoencoderKLWan, latents_BCTHW: Tensor, wanted: Sequence[int]) -> Tensor:
    """Chosen frames of a video: [B, n, 3, H, W] in [-1, 1], fp32, with gradient; later frames are not decoded.

    Args:
        vae: the VAE.
        latents_BCTHW: normalised latents.
        wanted: pixel frames, ascending; latent frame 0 is pixel frame 0, latent frame t > 0 the four from 4t − 3 on.
    """
    if list(wanted) == [0]:
        return decode_first_frame(vae, latents_BCTHW).unsqueeze(1)
    stride = vae.config.scale_factor_temporal
    last = -(-wanted[-1] // stride)  # the latent frame of the last wanted pixel frame
    inputs = _decoder_input(vae, latents_BCTHW[:, :, : last + 1])
    cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    chosen = set(wanted)
    frames: list[Tensor] = []
    for t in range(last + 1):
        x, conv = inputs[:, :, t : t + 1], 0
        for stage in _decoder_stages(vae.decoder):
            x, conv = _run_stage(stage, x, cache, conv, first=t == 0)
        pixels = _to_pixels(vae, x)
        start = 0 if t == 0 else stride * (t - 1) + 1
        frames += [pixels[:, :, i] for i in range(pixels.shape[2]) if start + i in chosen]
    return torch.stack(frames, dim=1)


def _decoder_input(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    hidden: Tensor = vae.post_quant_conv(denormalise(vae, widened(latents_BCTHW)).to(vae.dtype))
    return hidden


def _decoder_stages(decoder: Any) -> Iterator[Stage]:
    """First convolution, middle, one stage per resolution, head. `index` is the next convolution's, as in diffusers."""
    yield lambda x, cache, index, first: causal_conv(decoder.conv_in, x, cache, index)
    yield lambda x, cache, index, first: decoder.mid_block(x, feat_cache=cache, feat_idx=index)
    for block in decoder.up_blocks:
        yield _up_stage(block)
    yield lambda x, cache, index, first: causal_conv(
        decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), cache, index)


def _up_stage(block: Any) -> Stage:
    def run(x_BCTHW: Tensor, cache: ConvCache, index: list[int], first: bool) -> Tensor:
        out: Tensor = block(x_BCTHW, feat_cache=cache, feat_idx=index, first_chunk=first)
        return out

    return run


def causal_conv(convolution: Any, x_BCTHW: Tensor, cache: ConvCache, index: list[int]) -> Tensor:
    """A causal convolution over its cached frames and the new ones; caches the last two.

    Args:
        convolution: diffusers' WanCausalConv3d.
        x_BCTHW: the new frames.
        cache: frames by convolution; None: no cache.
        index: a list of one number, this convolution's position in `cache`; raised by one.
    """
    if cache is None:
        uncached: Tensor = convolution(x_BCTHW)
        return uncached
    before = cache[index[0]]
    after = x_BCTHW[:, :, -_CACHED_FRAMES:].clone()
    if after.shape[2] < _CACHED_FRAMES and before is not None:
        after = torch.cat([before[:, :, -1:], after], dim=2)
    out: Tensor = convolution(x_BCTHW, before)
    cache[index[0]] = after
    index[0] += 1
    return out


def _run_stage(stage: Stage, x_BCTHW: Tensor, cache: list[Any], start: int, first: bool) -> tuple[Tensor, int]:
    """One stage of one frame, its convolutions counted from `start`; updates `cache`. Returns (output, next index)."""
    before = list(cache)
    tensor_indices = [i for i in range(start, len(cache)) if isinstance(cache[i], Tensor)]
    # What the stage caches besides tensors; the tensors themselves must not be referenced here, to be freed in time.
    markers: list[Any] = []
    end = [start]

    def run(x: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
        local_cache, index = list(before), [start]
        for i, tensor in zip(tensor_indices, cached, strict=True):
            local_cache[i] = tensor
        out = stage(x, local_cache, index, first)
        markers[:] = [None if isinstance(entry, Tensor) else (entry,) for entry in local_cache]
        end[0] = index[0]
        return (out, *(local_cache[i] for i in range(start, index[0]) if isinstance(local_cache[i], Tensor)))

    out, *new_tensors = _checkpointed(run, x_BCTHW, *(cache[i] for i in tensor_indices))
    tensors = iter(new_tensors)
    for i in range(start, end[0]):
        # Some convolutions cache diffusers' mark of a first repetition instead of a frame.
        marker = markers[i]
        cache[i] = next(tensors) if marker is None else marker[0]
    return out, end[0]


def _checkpointed(function: Any, *inputs: Tensor) -> Any:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def _to_pixels(vae: AutoencoderKLWan, raw: Tensor) -> Tensor:
    """Clamped to [-1, 1] as `decode` does, in fp32: no gradient passes outside of it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    if vae.config.patch_size is not None:
        raw = unpatchify(raw, patch_size=vae.config.patch_size)
    return widened(raw).clamp(-1.0, 1.0)
