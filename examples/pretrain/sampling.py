"""Many videos at once from models under training, with Euler steps, for sheets and figures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.pretrain.corpus import FRAMES
from examples.pretrain.diffusion import Models, TokenTable, latent_shape, text_rows
from examples.pretrain.vae_forward import moments, reconstruct
from lapwan.names import NoiseExpert, noise_expert_for
from lapwan.sampling.scheduler import shifted
from lapwan.wan.image_condition import condition_video
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
    """v₀ + g·(v − v₀) of a pair of noise experts, or of one transformer.

    Args:
        text: the captions.
        plain: what v₀ is given instead of them.
        guidance: g; at 1 only v is computed.
        boundary: the sigma from which the high noise expert of two is used.
        image: latents of the first frame, as `Models.velocity` takes them; None for text-to-video.
    """

    models: Models
    text: TextRows
    plain: TextRows
    guidance: float
    boundary: float = 0.9
    image: Tensor | None = None

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity at `x`, which has the noise of `sigma`."""
        one = len(self.models.noise_experts) == 1
        noise_expert = NoiseExpert.HIGH if one else noise_expert_for(sigma, self.boundary)
        sigma_B = torch.full((len(x),), sigma, device=x.device)
        v = self.models.velocity(noise_expert, x, sigma_B, self.text, self.image)
        if self.guidance == 1:
            return v
        without = self.models.velocity(noise_expert, x, sigma_B, self.plain, self.image)
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
    x = torch.randn((len(captions), *latent_shape(models.recipe)), generator=generator).to(device)
    image = None
    if images_BCHW is not None:
        clean = models.recipe.clean_first_frame
        video = images_BCHW[:, :, None] if clean else condition_video(images_BCHW, FRAMES)
        parts = torch.split(video, 32)
        image = torch.cat([normalise(vae, moments(vae, part.to(device))[0]) for part in parts])
    x = euler(Guided(models, text, plain, guidance, boundary, image), x, sigma_grid(steps, shift))
    if image is not None and models.recipe.clean_first_frame:
        x = torch.cat([image, x[:, :, 1:]], dim=2)
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
