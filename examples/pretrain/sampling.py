"""Many videos at once from models under training, with Euler steps, for sheets and figures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.pretrain.diffusion import LATENT, Models, TokenTable, text_rows
from examples.pretrain.vae_forward import moments, reconstruct
from lapwan.names import noise_expert_for
from lapwan.sampling.scheduler import shifted
from lapwan.wan.image_condition import condition_video, with_mask
from lapwan.wan.transformer.prompt import TextRows
from lapwan.wan.vae import normalise


@torch.no_grad()
def encode_captions(models: Models, captions: list[str]) -> TextRows:
    """The text encoder's features of captions."""
    device = next(models.text.parameters()).device
    ids, mask = (x.to(device) for x in TokenTable()(captions))
    return text_rows(models.text(ids, mask).last_hidden_state.float(), mask)


def sigma_grid(steps: int, shift: float) -> list[float]:
    """The falling sigmas of `steps` Euler steps, with 0 at the end."""
    return [*shifted(np.linspace(1, 1 / 1000, steps + 1)[:-1], shift).tolist(), 0.0]


@dataclass(frozen=True)
class Guided:
    """v₀ + g·(v − v₀) of a pair of noise experts.

    Args:
        text: the captions.
        plain: what v₀ is given instead of them.
        extra: mask and image channels [B, 20, T, H, W]; zeros for text-to-video.
        guidance: g; at 1 only v is computed.
        boundary: the sigma from which the high noise expert is used.
    """

    models: Models
    text: TextRows
    plain: TextRows
    extra: Tensor
    guidance: float
    boundary: float = 0.9

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity at `x`, which has the noise of `sigma`."""
        backbone = self.models.noise_experts[noise_expert_for(sigma, self.boundary)]
        time = torch.full((len(x),), 1000 * sigma, device=x.device)
        v = backbone.velocity(x, time, self.text, self.extra)
        if self.guidance == 1:
            return v
        without = backbone.velocity(x, time, self.plain, self.extra)
        return without + self.guidance * (v - without)


@torch.no_grad()
def euler(guided: Guided, x: Tensor, sigmas: list[float]) -> Tensor:
    """Euler steps from `x` at the first sigma to the last: x <- x + (σ' − σ)·v."""
    for here, then in pairwise(sigmas):
        x = x + (then - here) * guided.velocity(x, here)
    return x


@torch.no_grad()
def unipc(guided: Guided, x: Tensor, steps: int, shift: float) -> Tensor:
    """The solver that the embedded model is shipped with, from pure noise."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        v = guided.velocity(x, float(timestep) / 1000)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


@torch.no_grad()
def sample_videos(
    models: Models, vae: Any, captions: list[str], images_BCHW: Tensor | None, steps: int, shift: float,
    guidance: float, seed: int, boundary: float = 0.9, negative: str = "",
) -> np.ndarray:
    """uint8 [B, T, H, W, 3]; `images_BCHW` in [-1, 1] are the first frames, None for text-to-video."""
    device = next(models.text.parameters()).device
    text, plain = (encode_captions(models, texts) for texts in (captions, [negative] * len(captions)))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(captions), *LATENT), generator=generator).to(device)
    extra = torch.zeros((len(captions), 20, *LATENT[1:]), device=device)
    if images_BCHW is not None:
        frames = 4 * (LATENT[1] - 1) + 1
        extra = with_mask(normalise(vae, moments(vae, condition_video(images_BCHW.to(device), frames))[0]))
    x = euler(Guided(models, text, plain, extra, guidance, boundary), x, sigma_grid(steps, shift))
    return decode_frames(vae, x)


@torch.no_grad()
def decode_frames(vae: Any, x_BCTHW: Tensor) -> np.ndarray:
    """Normalised latents to uint8 frames [B, T, H, W, 3]."""
    config = vae.config
    mean, std = (torch.tensor(v, device=x_BCTHW.device).view(1, -1, 1, 1, 1)
                 for v in (config.latents_mean, config.latents_std))
    made = [reconstruct(vae, part * std + mean).clamp(-1, 1) for part in torch.split(x_BCTHW, 16)]
    pixels = ((torch.cat(made) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
