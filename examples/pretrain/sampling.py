"""Many videos at once from models under training, with Euler steps, for sheets and figures."""

from __future__ import annotations

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
from lapwan.wan.vae import normalise


@torch.no_grad()
def sample_videos(
    models: Models, vae: Any, captions: list[str], images_BCHW: Tensor | None, steps: int, shift: float,
    guidance: float, seed: int, boundary: float = 0.9, negative: str = "",
) -> np.ndarray:
    """uint8 [B, T, H, W, 3]; `images_BCHW` in [-1, 1] are the first frames, None for text-to-video."""
    device = next(models.text.parameters()).device
    tokens = TokenTable()
    both = []
    for texts in (captions, [negative] * len(captions)):
        ids, mask = (x.to(device) for x in tokens(texts))
        both.append(text_rows(models.text(ids, mask).last_hidden_state.float(), mask))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(captions), *LATENT), generator=generator).to(device)
    extra = torch.zeros((len(captions), 20, *LATENT[1:]), device=device)
    if images_BCHW is not None:
        frames = 4 * (LATENT[1] - 1) + 1
        extra = with_mask(normalise(vae, moments(vae, condition_video(images_BCHW.to(device), frames))[0]))
    sigmas = [*shifted(np.linspace(1, 1 / 1000, steps + 1)[:-1], shift).tolist(), 0.0]
    for here, then in pairwise(sigmas):
        backbone = models.noise_experts[noise_expert_for(here, boundary)]
        time = torch.full((len(captions),), 1000 * here, device=device)
        v, plain = (backbone.velocity(x, time, text, extra) for text in both)
        x = x + (then - here) * (plain + guidance * (v - plain))
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
