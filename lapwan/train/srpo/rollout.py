"""Rollouts: from a sample's noise to clean latents, through the noise experts with their current weights.

    x ← x + (σ' − σ)·v̂(x, σ) over a shifted grid of N sigmas down to 0, the noise expert chosen by sigma     (Euler)

All batches of an optimizer step pass through one noise expert before the next one is fetched: if only one is on the
device at a time, a step costs two transfers, however many batches it has. Latents are fp32 between evaluations.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, L text tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from lapwan.caching.collate import Batch
from lapwan.models.device import widened
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.denoise import Conditions, guided_velocity
from lapwan.sampling.scheduler import Step, make_grid
from lapwan.train.objective import Draws
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.text import pad_text


@dataclass(frozen=True)
class RolloutRule:
    """Euler steps, guidance scale (1: no guidance), flow shift (None: the model's)."""

    steps: int
    guidance: float = 1.0
    flow_shift: float | None = None


def rollout_steps(spec: ModelSpec, rule: RolloutRule) -> tuple[tuple[Step, ...], list[float]]:
    """The steps in order, and the sigma that each one ends at."""
    grid = make_grid(spec, "euler", rule.steps, rule.flow_shift)
    sigmas = [step.sigma for step in grid.steps]
    return grid.steps, [*sigmas[1:], 0.0]


class Rollout:
    """Clean latents of batches, sampled from the noise of their draws.

    Args:
        backbones: by noise expert, in training or frozen.
        fetch: brings a noise expert to the device.
        negative: text features [n, D] of the negative prompt; required with guidance.
    """

    def __init__(
        self, spec: ModelSpec, rule: RolloutRule, backbones: Mapping[NoiseExpert, WanBackbone],
        fetch: Callable[[NoiseExpert], None], negative: Tensor | None = None,
    ) -> None:
        self._steps, self._next = rollout_steps(spec, rule)
        self._backbones, self._fetch, self._negative = backbones, fetch, negative
        self._guidance = rule.guidance

    def __call__(self, noise_expert: NoiseExpert, batches: Sequence[Batch], draws: Sequence[Draws]) -> list[Batch]:
        """The batches with x0 as their latents; afterwards `noise_expert` is on the device."""
        latents = self.sample([draw.noise_BCTHW for draw in draws], [self._conditions(batch) for batch in batches])
        self._fetch(noise_expert)
        return [replace(batch, latents_BCTHW=x0) for batch, x0 in zip(batches, latents, strict=True)]

    def _conditions(self, batch: Batch) -> Conditions:
        return self.conditions(batch.text, batch.condition_BCTHW)

    def conditions(self, text: Sequence[Tensor], image_BCTHW: Tensor | None = None) -> Conditions:
        """The transformer's inputs for a batch, apart from its latents."""
        negative = None
        if self._guidance > 1:
            assert self._negative is not None
            negative = pad_text([self._negative.to(text[0])] * len(text))
        return Conditions(pad_text(text), negative, image_BCTHW)

    @torch.no_grad()
    def sample(self, noise: Sequence[Tensor], conditions: Sequence[Conditions]) -> list[Tensor]:
        """x0 from each batch's noise."""
        latents = [widened(x) for x in noise]
        pairs = list(zip(self._steps, self._next, strict=True))
        for noise_expert, group in groupby(pairs, key=lambda pair: pair[0].noise_expert):
            self._fetch(noise_expert)
            backbone, steps = self._backbones[noise_expert], list(group)
            for i, condition in enumerate(conditions):
                x = latents[i]
                for step, sigma_next in steps:
                    v = guided_velocity(backbone, x, step.timestep, condition, self._guidance)
                    x = x + (sigma_next - step.sigma) * v
                latents[i] = x
        return latents
