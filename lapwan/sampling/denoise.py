"""From noise to latents through the noise experts, with classifier-free guidance for each.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, L text tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan.names import NoiseExpert
from lapwan.sampling.grid import Grid, Step
from lapwan.wan.backbone import velocity

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class Conditions:
    """What the transformer sees besides the latents: text, the negative prompt's text, and the image.

    The image is either I2V-A14B's mask and condition channels (`image_BCTHW`, beside the latents) or TI2V-5B's encoded
    first frame (`first_BC1HW`, in place of the first latent frame, at timestep 0).
    """

    text_BLD: Tensor
    negative_BLD: Tensor | None
    image_BCTHW: Tensor | None = None
    first_BC1HW: Tensor | None = None

    def placed(self, x_BCTHW: Tensor) -> Tensor:
        """The latents with the clean first frame in its place."""
        if self.first_BC1HW is None:
            return x_BCTHW
        return torch.cat([self.first_BC1HW.to(x_BCTHW), x_BCTHW[:, :, 1:]], dim=2)

    def timesteps(self, x_BCTHW: Tensor, timestep: Tensor, patch: tuple[int, int, int]) -> Tensor:
        """[B]; with a clean first frame one a token [B, N], 0 on the first frame's."""
        batch, _, frames, height, width = x_BCTHW.shape
        if self.first_BC1HW is None:
            return timestep.to(x_BCTHW.device).expand(batch)
        per_frame = timestep.to(x_BCTHW).expand(frames).clone()
        per_frame[0] = 0.0
        tokens = (height // patch[1]) * (width // patch[2])
        return per_frame[:: patch[0]].repeat_interleave(tokens).expand(batch, -1)


@dataclass(frozen=True)
class Guidance:
    """Strength by noise expert (1: none), acting where sigma lies in `interval` (low, high)."""

    strength: Mapping[NoiseExpert, float]
    interval: tuple[float, float] = (0.0, 1.0)

    def at(self, step: Step) -> float:
        """The strength of a step. Each noise expert decides for itself: high=1, low=4 guides the low one only."""
        low, high = self.interval
        return self.strength[step.expert] if low <= step.sigma <= high else 1.0

    def needed(self, grid: Grid) -> bool:
        """Whether any step of the grid evaluates the negative prompt."""
        return any(self.at(step) > 1.0 for step in grid.steps)


def guided_velocity(
    transformer: WanTransformer3DModel, x_BCTHW: Tensor, timestep: Tensor, conditions: Conditions, guidance: float
) -> Tensor:
    """v = v_neg + g·(v_text − v_neg); for g ≤ 1 just v_text, with one evaluation. In fp32.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598).
    """
    x_BCTHW = conditions.placed(x_BCTHW)
    timesteps = conditions.timesteps(x_BCTHW, timestep, transformer.config.patch_size)
    v = velocity(transformer, x_BCTHW, timesteps, conditions.text_BLD, conditions.image_BCTHW)
    if guidance <= 1.0:
        return v
    if conditions.negative_BLD is None:
        raise ValueError("guidance above 1 needs the negative prompt's text")
    negative = velocity(transformer, x_BCTHW, timesteps, conditions.negative_BLD, conditions.image_BCTHW)
    return negative + guidance * (v - negative)


Scope = Callable[[Step], AbstractContextManager[object]]


@torch.no_grad()
def denoise(
    grid: Grid,
    x_BCTHW: Tensor,
    conditions: Conditions,
    guidance: Guidance,
    transformer: Callable[[NoiseExpert], WanTransformer3DModel],
    scope: Scope,
    on_step: Callable[[Step, Tensor], None] = lambda step, x0: None,
) -> Tensor:
    """Run the grid from x at its first sigma to sigma 0.

    Args:
        transformer: gives a noise expert's transformer; asked for at its first step, so that one without steps is
            never loaded.
        scope: holds the adapters' gates of a step around its evaluations.
        on_step: called after each step with its estimate of the clean latents, x0 = x − σ·v.
    """
    def evaluate(step: Step, x_BCTHW: Tensor) -> Tensor:
        model = transformer(step.expert)  # not held between steps: it may have to make room for the next
        with scope(step):
            return guided_velocity(model, x_BCTHW, step.timestep, conditions, guidance.at(step))

    for step in grid.steps:
        v = evaluate(step, x_BCTHW)
        on_step(step, x_BCTHW - step.sigma * v)
        x_BCTHW = grid.scheduler.step(v, step.timestep, x_BCTHW, return_dict=False)[0]
    return conditions.placed(x_BCTHW)
