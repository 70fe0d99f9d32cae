"""The VAE: pixels in [-1, 1] to normalised latents and back.

Shapes: B batch, C channels, T frames (pixels: 4N+1, latents: N+1), H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapwan.models.original_layout import load_vae_file
from lapwan.models.spec import original_file

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from lapwan.models.spec import ModelSpec


def load_vae(
    spec: ModelSpec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AutoencoderKLWan:
    """The model's VAE, frozen and in eval mode (from_pretrained leaves its parameters trainable). fp32 is safest."""
    from diffusers import AutoencoderKLWan

    folder = spec.path / "vae"
    if (original := original_file(folder)) is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vae = load_vae_file(config, original, dtype)
    else:
        vae = AutoencoderKLWan.from_pretrained(folder, dtype=dtype, local_files_only=True)
    vae.requires_grad_(False)
    quick_norms(vae)
    return vae.eval().to(device)


def quick_norms(vae: nn.Module) -> None:
    """Let the VAE's norms reduce over channels as a plain sum on a CPU, up to rounding the same numbers.

    torch's vector norm over a dimension that does not lie together takes a CPU ten times as long as x²'s sum, 40 % of
    decoding on the embedded model.
    """
    for module in vae.modules():
        if type(module).__name__ == "WanRMS_norm" and module.channel_first:
            module.forward = partial(_channel_norm, module, module.forward)


def _channel_norm(module: Any, plain: Callable[[Tensor], Tensor], x_BC: Tensor) -> Tensor:
    """x / max(‖x‖, 1e-12) · √C · γ + bias over dimension 1."""
    if x_BC.device.type != "cpu" or x_BC.dtype.itemsize < 4:  # narrow dtypes would square in few digits
        return plain(x_BC)
    inverse = torch.rsqrt(x_BC.square().sum(dim=1, keepdim=True).clamp_min(1e-24))
    normed: Tensor = x_BC * inverse * module.scale * module.gamma + module.bias
    return normed


def channels_last(vae: AutoencoderKLWan) -> None:
    """Lay the convolutions' weights out channels-last, in place: a tenth faster on a GPU, the same up to rounding."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)


def normalise(vae: AutoencoderKLWan, raw_BCTHW: Tensor) -> Tensor:
    """`(z - mean) / std` per channel, in z's dtype, on z's device."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return (raw_BCTHW - _per_channel(mean, raw_BCTHW)) / _per_channel(std, raw_BCTHW)


def denormalise(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """`z * std + mean` per channel, in z's dtype, on z's device."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return latents_BCTHW * _per_channel(std, latents_BCTHW) + _per_channel(mean, latents_BCTHW)


def encode(vae: AutoencoderKLWan, pixels_BCTHW: Tensor) -> Tensor:
    """`(mode(encode(x)) - mean) / std`: pixels [B, 3, 4N+1, H, W] in [-1, 1] -> latents [B, C, N+1, H/8, W/8] in fp32.

    Raises:
        ValueError: a frame count that is not 4N+1; the VAE itself would drop the rest without a word.
    """
    frames = pixels_BCTHW.shape[2]
    if (frames - 1) % 4:
        raise ValueError(f"{frames} frames; the VAE takes 4N+1")
    pixels = pixels_BCTHW.to(device=vae.device, dtype=vae.dtype)
    return normalise(vae, vae.encode(pixels).latent_dist.mode().float())


def decode(vae: AutoencoderKLWan, latents_BCTHW: Tensor) -> Tensor:
    """`decode(z * std + mean)`: latents -> pixels [B, 3, T, H, W] clamped to [-1, 1], in fp32."""
    raw = denormalise(vae, latents_BCTHW.to(device=vae.device, dtype=torch.float32))
    pixels: Tensor = vae.decode(raw.to(vae.dtype)).sample.float()
    return pixels
