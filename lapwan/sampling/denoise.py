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

from lapwan.caching.batch import send
from lapwan.names import NoiseExpert
from lapwan.sampling.sigma_grid import Grid, Step
from lapwan.wan.backbone import velocity
from lapwan.wan.transformer.first_block_cache import FirstBlockCache
from lapwan.wan.transformer.forward import TokenTimes
from lapwan.wan.transformer.options import Prompt

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

    def timesteps(self, x_BCTHW: Tensor, timestep: Tensor, patch: tuple[int, int, int]) -> Tensor | TokenTimes:
        """[B]; with a clean first frame 0 for the first frame's tokens, the timestep for all others."""
        batch, _, frames, height, width = x_BCTHW.shape
        if self.first_BC1HW is None:
            return send(timestep, x_BCTHW.device).expand(batch)
        now = send(timestep.to(x_BCTHW.dtype), x_BCTHW.device).reshape(())
        values = torch.stack([torch.zeros((), device=x_BCTHW.device), now])
        a_frame = (height // patch[1]) * (width // patch[2])
        tokens = torch.arange((frames // patch[0]) * a_frame, device=x_BCTHW.device)
        return TokenTimes(values.expand(batch, 2), (tokens >= a_frame).long())

    def twice(self) -> Conditions:
        """The text's and the negative prompt's side as a batch of two."""
        if self.negative_BLD is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        pair = [None if part is None else torch.cat([part, part]) for part in (self.image_BCTHW, self.first_BC1HW)]
        return Conditions(torch.cat([self.text_BLD, self.negative_BLD]), None, *pair)


@dataclass(frozen=True)
class Guidance:
    """Strength by noise expert (1: none), acting where sigma lies in `interval` (low, high)."""

    strength: Mapping[NoiseExpert, float]
    interval: tuple[float, float] = (0.0, 1.0)

    def at(self, step: Step) -> float:
        """The strength of a step. Each noise expert decides for itself: high=1, low=4 guides the low one only."""
        low, high = self.interval
        return self.strength[step.noise_expert] if low <= step.sigma <= high else 1.0

    def needed(self, grid: Grid) -> bool:
        """Whether any step of the grid evaluates the negative prompt."""
        return any(self.at(step) > 1.0 for step in grid.steps)


def guided_velocity(
    transformer: WanTransformer3DModel, x_BCTHW: Tensor, timestep: Tensor, conditions: Conditions, guidance: float,
    together: bool = True, prompts: Prompts | None = None, reuse: FirstBlockCache | None = None,
) -> Tensor:
    """v = v_neg + g·(v_text − v_neg); for g ≤ 1 just v_text, with one evaluation. In fp32.

    Args:
        together: both sides in one batch, which reads the weights once; else one after the other, with half the memory.
        prompts: the same text in a form that remembers (see `Prompts`); only without gradients.
        reuse: the noise expert's, which may spare most of an evaluation, approximately.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598).
    """
    patch = transformer.config.patch_size

    def evaluate(x: Tensor, given: Conditions, text: Tensor | Prompt, side: str = "text") -> Tensor:
        x = given.placed(x)
        kept = None if reuse is None else reuse.side(side)
        return velocity(transformer, x, given.timesteps(x, timestep, patch), text, given.image_BCTHW, kept)

    text: Tensor | Prompt = conditions.text_BLD if prompts is None else prompts.text
    if guidance <= 1.0:
        return evaluate(x_BCTHW, conditions, text)
    if together:
        both = conditions.twice()
        v, negative = evaluate(
            torch.cat([x_BCTHW, x_BCTHW]), both, both.text_BLD if prompts is None else prompts.both(), "both"
        ).chunk(2)
    else:
        if conditions.negative_BLD is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        v = evaluate(x_BCTHW, conditions, text)
        against = conditions.negative_BLD if prompts is None else prompts.negative()
        negative = evaluate(x_BCTHW, conditions, against, "negative")
    return negative + guidance * (v - negative)


class Prompts:
    """The texts of one generation, each remembering its cross-attention keys and values where they stay the same."""

    def __init__(self, conditions: Conditions, together: bool) -> None:
        self._both: Prompt | None = None
        self._negative: Prompt | None = None
        if conditions.negative_BLD is None:
            self.text = Prompt(conditions.text_BLD)
        elif together:
            self._both = Prompt(torch.cat([conditions.text_BLD, conditions.negative_BLD]))
            self.text = self._both.first(len(conditions.text_BLD))
        else:
            self.text, self._negative = Prompt(conditions.text_BLD), Prompt(conditions.negative_BLD)

    def both(self) -> Prompt:
        """Text and negative prompt as a batch."""
        if self._both is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        return self._both

    def negative(self) -> Prompt:
        """The negative prompt."""
        if self._negative is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        return self._negative


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
    together: bool = True,
    reuse: Mapping[NoiseExpert, FirstBlockCache] | None = None,
) -> Tensor:
    """Run the grid from x at its first sigma to sigma 0.

    Args:
        transformer: gives a noise expert's transformer; asked for at its first step, so that one without steps is
            never loaded.
        scope: holds the adapters' gates of a step around its evaluations.
        on_step: called after each step with its estimate of the clean latents, x0 = x − σ·v.
        together: guidance's two sides as one batch (see `guided_velocity`).
        reuse: of each noise expert whose steps may keep what earlier ones computed.
    """
    prompts = Prompts(conditions, together)

    def evaluate(step: Step, x_BCTHW: Tensor) -> Tensor:
        model = transformer(step.noise_expert)  # not held between steps: it may have to make room for the next
        with scope(step):
            return guided_velocity(
                model, x_BCTHW, step.timestep, conditions, guidance.at(step), together, prompts,
                None if reuse is None else reuse.get(step.noise_expert),
            )

    for step in grid.steps:
        v = evaluate(step, x_BCTHW)
        on_step(step, x_BCTHW - step.sigma * v)
        x_BCTHW = grid.scheduler.step(v, step.timestep, x_BCTHW, return_dict=False)[0]
    return conditions.placed(x_BCTHW)
