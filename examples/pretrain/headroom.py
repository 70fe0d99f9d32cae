"""How much fine-tuning can gain: few clips, few steps, a plain LoRA against one LoRA an instrument chosen by name.

The second is what a mixture reaches with a perfect router. Both start from the pretrained pair and see the same clips.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.pretrain.diffusion import Models, TokenTable, head_cells, text_rows
from examples.pretrain.reports import measure_identity, typical_scenes
from examples.pretrain.sampling import sample_videos
from examples.pretrain.settings import SEED
from examples.pretrain.vae import to_pixels
from examples.pretrain.vae_forward import moments
from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.distributed import worker_pool
from lapwan.lora.attach import Adapter, Group, attach, initial_state
from lapwan.lora.targets import TargetRule, resolve_targets
from lapwan.losses.flow import add_noise, velocity_target
from lapwan.losses.sigmas import Shifted, Uniform, draw_in_band
from lapwan.names import NoiseExpert, bands
from lapwan.tiny.captions import caption_for
from lapwan.tiny.evaluators import InstrumentNet
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import Scene, SceneSpec, render
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.vae import normalise

BOUNDARY = 0.875


class FineTuningClips:
    """Latents, captions and instruments of a small fine-tuning set; `scenes` where they are rendered already."""

    def __init__(
        self, count: int, vae: Any, models: Models, device: torch.device, scenes: list[Scene] | None = None
    ) -> None:
        self.specs = typical_scenes(count, SEED, models.recipe.size, models.recipe.fps)
        if scenes is None:
            with worker_pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
                scenes = list(pool.map(render, self.specs, chunksize=4))
        tokens = TokenTable()
        ids, mask = (x.to(device) for x in tokens([scene.caption for scene in scenes]))
        with torch.no_grad():
            self.text = text_rows(models.text(ids, mask).last_hidden_state.float(), mask)
            frames = torch.from_numpy(np.stack([scene.frames_THWC for scene in scenes]))
            latents = [normalise(vae, moments(vae, to_pixels(part.to(device)))[0]) for part in torch.split(frames, 32)]
        self.x0 = torch.cat(latents)
        boxes = torch.from_numpy(np.stack([scene.boxes for scene in scenes])).float()
        self.head = head_cells(boxes, *self.x0.shape[3:]).to(device)
        self.named = torch.tensor([INSTRUMENTS.index(s.instrument) for s in self.specs], device=device)


def _gates(named: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return torch.ones(len(named), 1, device=named.device)
    return torch.eye(groups, device=named.device)[named]


def _adapted(models: Models, rank: int, groups: int) -> tuple[Models, dict[NoiseExpert, Adapter]]:
    backbones = {e: WanBackbone(deepcopy(b.transformer)) for e, b in models.noise_experts.items()}
    copied = Models(models.recipe, backbones, models.text)
    adapters = {}
    for noise_expert, backbone in copied.noise_experts.items():
        model = backbone.transformer
        ranks = resolve_targets([TargetRule(None, dict.fromkeys(PROJECTIONS, rank))], len(model.blocks))
        states = [initial_state(model, ranks, None, SEED, noise_expert.value, group) for group in range(groups)]
        lora_groups = [Group(str(i), state, True) for i, state in enumerate(states)]
        adapters[noise_expert] = attach(model, lora_groups, gates_required=True)
        model.to(next(models.text.parameters()).device)
    return copied, adapters


def try_fine_tuning(
    models: Models, vae: Any, clips: FineTuningClips, net: InstrumentNet, groups: int, rank: int, lr: float, batch: int,
    at: tuple[int, ...], prompts: list[SceneSpec], sampling: dict[str, Any],
) -> tuple[dict[int, float], np.ndarray]:
    """Identity on held-out prompts after each number of steps in `at`, and the last videos."""
    device = clips.x0.device
    adapted, adapters = _adapted(models, rank, groups)
    parameters = [p for adapter in adapters.values() for p in adapter.parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(SEED)
    captions = [caption_for(spec, np.random.default_rng(10_000 + i)) for i, spec in enumerate(prompts)]
    named = torch.tensor([INSTRUMENTS.index(s.instrument) for s in prompts], device=device)
    sigma_bands = bands(BOUNDARY if len(models.noise_experts) > 1 else None)
    identity: dict[int, float] = {}
    videos = np.empty(0)
    for step in range(1, max(at) + 1):
        chosen = torch.randint(len(clips.x0), (batch,), device=device, generator=generator)
        x0 = clips.x0[chosen]
        text = clips.text.take(chosen)
        for noise_expert in adapted.noise_experts:
            u = torch.rand(batch, device=device, generator=generator)
            band = sigma_bands[noise_expert]
            sampler = Shifted(Uniform(), models.recipe.diffusion.shifts[noise_expert.value])
            sigma = draw_in_band(sampler, u, band.low, band.high).float()
            noise = torch.randn(x0.shape, device=device, generator=generator)
            with adapters[noise_expert].holder.scope(_gates(clips.named[chosen], groups)):
                v = adapted.velocity(noise_expert, add_noise(x0, noise, sigma), sigma, text, None)
                torch.autograd.backward((v - velocity_target(x0, noise)).square().mean())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in at:
            with ExitStack() as scopes:
                for adapter in adapters.values():
                    scopes.enter_context(adapter.holder.scope(_gates(named, groups)))
                videos = sample_videos(adapted, vae, captions, None, seed=7, **sampling)
            identity[step] = measure_identity(videos, prompts, net)[0]
    return identity, videos
