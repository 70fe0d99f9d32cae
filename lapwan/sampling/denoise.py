"""The denoise loop: from noise to latents through the noise experts, with classifier-free guidance.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, L text tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lapwan.caching.collate import to_device
from lapwan.names import NoiseExpert
from lapwan.sampling.scheduler import Grid, Step
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.image_condition import with_first_frame
from lapwan.wan.transformer.first_block_cache import FirstBlockCache
from lapwan.wan.transformer.forward import TokenTimes, first_frame_times
from lapwan.wan.transformer.prompt import Prompt


@dataclass(frozen=True)
class Conditions:
    """The transformer's inputs besides the latents: features of the prompt and the negative prompt, and the image.

    The image is either I2V-A14B's mask and condition channels (`image_BCTHW`, beside the latents) or TI2V-5B's encoded
    first frame (`first_BC1HW`, in place of the first latent frame, at timestep 0).
    """

    text_BLD: Tensor
    negative_BLD: Tensor | None
    image_BCTHW: Tensor | None = None
    first_BC1HW: Tensor | None = None

    def with_first_frame(self, x_BCTHW: Tensor) -> Tensor:
        """The latents, with the clean first frame instead of theirs if there is one."""
        if self.first_BC1HW is None:
            return x_BCTHW
        return with_first_frame(x_BCTHW, self.first_BC1HW)

    def timesteps(self, x_BCTHW: Tensor, timestep: Tensor, patch: tuple[int, int, int]) -> Tensor | TokenTimes:
        """The transformer's timesteps: one per video; with a clean first frame one per token, 0 for that frame's.

        Args:
            x_BCTHW: latents of the step, for their shape, dtype and device.
            timestep: a scalar; see `WanBackbone.velocity`.
            patch: (frames, height, width) of a token, in latent pixels.

        Returns:
            [B]; with a clean first frame a `TokenTimes` over the video's tokens.
        """
        batch = len(x_BCTHW)
        if self.first_BC1HW is None:
            return to_device(timestep, x_BCTHW.device).expand(batch)
        now_1 = to_device(timestep.to(x_BCTHW.dtype), x_BCTHW.device).reshape(1)
        times = first_frame_times(now_1, torch.ones_like(now_1, dtype=torch.bool), x_BCTHW.shape[2:], patch)
        return replace(times, values_BK=times.values_BK.expand(batch, -1))

    @staticmethod
    def stack(conditions: Sequence[Conditions]) -> Conditions:
        """The conditions of several videos as those of a batch.

        Raises:
            ValueError: some have an image (or a last frame) and some have none.
        """
        joined: dict[str, Any] = {}
        for field in fields(Conditions):
            values = [getattr(item, field.name) for item in conditions]
            present = [value for value in values if value is not None]
            if present and len(present) != len(values):
                raise ValueError("some requests of the batch have an image and some have none")
            joined[field.name] = torch.cat(present) if present else None
        return replace(conditions[0], **joined)

    def to(self, device: torch.device) -> Conditions:
        """The same on a device."""
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in present.items() if value is not None})

    def with_negative(self) -> Conditions:
        """Prompt and negative prompt in one batch: [2B, ...].

        Raises:
            ValueError: there is no negative prompt.
        """
        if self.negative_BLD is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        images = [None if image is None else torch.cat([image, image])
                  for image in (self.image_BCTHW, self.first_BC1HW)]
        return Conditions(torch.cat([self.text_BLD, self.negative_BLD]), None, *images)


@dataclass(frozen=True)
class Guidance:
    """Guidance strength by noise expert (1: none), applied where sigma is in `interval` (low, high)."""

    strength: Mapping[NoiseExpert, float]
    interval: tuple[float, float] = (0.0, 1.0)

    def at(self, step: Step) -> float:
        """The strength of a step: high=1, low=4 guides only the steps of the low noise expert."""
        low, high = self.interval
        return self.strength[step.noise_expert] if low <= step.sigma <= high else 1.0

    def needed(self, grid: Grid) -> bool:
        """Whether any step of the grid evaluates the negative prompt."""
        return any(self.at(step) > 1.0 for step in grid.steps)


def guided_velocity(
    backbone: WanBackbone, x_BCTHW: Tensor, timestep: Tensor, conditions: Conditions, guidance: float,
    batched_guidance: bool = True, prompts: Prompts | None = None, cache: FirstBlockCache | None = None,
) -> Tensor:
    """v = v_neg + g·(v_text − v_neg); for g ≤ 1 v_text, with one evaluation. In fp32.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance (arXiv 2207.12598).

    Args:
        backbone: the step's noise expert.
        x_BCTHW: latents.
        timestep: a scalar; see `WanBackbone.velocity`.
        conditions: text, negative text and image of the batch.
        guidance: g.
        batched_guidance: both evaluations in one batch, which reads the weights once; else one after the other, with
            half the activations.
        prompts: the same text, of which the backbone keeps the keys and values; only without gradients.
        cache: the noise expert's first-block cache, which may skip most of an evaluation, approximately.

    Raises:
        ValueError: g > 1 without a negative prompt.
    """
    patch = backbone.transformer.config.patch_size

    def evaluate(x: Tensor, given: Conditions, text: Tensor | Prompt, branch: str = "text") -> Tensor:
        x = given.with_first_frame(x)
        branch_cache = None if cache is None else cache.branch(branch)
        return backbone.velocity(x, given.timesteps(x, timestep, patch), text, given.image_BCTHW, branch_cache)

    text: Tensor | Prompt = conditions.text_BLD if prompts is None else prompts.text
    if guidance <= 1.0:
        return evaluate(x_BCTHW, conditions, text)
    if batched_guidance:
        both = conditions.with_negative()
        v, negative = evaluate(
            torch.cat([x_BCTHW, x_BCTHW]), both, both.text_BLD if prompts is None else prompts.both(), "both"
        ).chunk(2)
    else:
        if conditions.negative_BLD is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        v = evaluate(x_BCTHW, conditions, text)
        negative_text = conditions.negative_BLD if prompts is None else prompts.negative()
        negative = evaluate(x_BCTHW, conditions, negative_text, "negative")
    return negative + guidance * (v - negative)


class Prompts:
    """The texts of one generation, without most of their padding.

    Args:
        conditions: their text and negative text [B, L, D].
        batched_guidance: prompt and negative prompt are evaluated as a batch.
    """

    def __init__(self, conditions: Conditions, batched_guidance: bool) -> None:
        self._both: Prompt | None = None
        self._negative: Prompt | None = None
        if conditions.negative_BLD is None:
            self.text = Prompt(conditions.text_BLD)
        elif batched_guidance:
            self._both = Prompt(torch.cat([conditions.text_BLD, conditions.negative_BLD]))
            self.text = self._both.first(len(conditions.text_BLD))
        else:
            self.text, self._negative = Prompt(conditions.text_BLD), Prompt(conditions.negative_BLD)

    def both(self) -> Prompt:
        """Prompt and negative prompt as a batch.

        Raises:
            ValueError: there is no negative prompt, or the two are not batched.
        """
        if self._both is None:
            raise ValueError("guidance above 1 needs the negative prompt's text")
        return self._both

    def negative(self) -> Prompt:
        """The negative prompt.

        Raises:
            ValueError: there is no negative prompt, or the two are batched.
        """
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
    backbone: Callable[[NoiseExpert], WanBackbone],
    scope: Scope,
    on_step: Callable[[Step, Tensor], None] = lambda step, x0: None,
    batched_guidance: bool = True,
    caches: Mapping[NoiseExpert, FirstBlockCache] | None = None,
) -> Tensor:
    """Run the grid from x at its first sigma to sigma 0.

    Args:
        grid: sigmas, noise experts and solver.
        x_BCTHW: latents at the first sigma, fp32.
        conditions: text, negative text and image of the batch.
        guidance: strength at each step.
        backbone: returns a noise expert. Called before its first step, so that a noise expert without steps is never
            loaded.
        scope: context that holds the adapters' gates of a step during its evaluations.
        on_step: called after each step with its estimate of the clean latents, x0 = x − σ·v.
        batched_guidance: see `guided_velocity`.
        caches: first-block caches, by noise expert.

    Returns:
        The clean latents, normalised, with the given first frame if there is one.
    """
    prompts = Prompts(conditions, batched_guidance)

    def run(noise_expert: WanBackbone, steps: Iterable[Step], x: Tensor) -> Tensor:
        try:
            for step in steps:
                cache = None if caches is None else caches.get(step.noise_expert)
                with scope(step):
                    v = guided_velocity(
                        noise_expert, x, step.timestep, conditions, guidance.at(step), batched_guidance, prompts, cache)
                on_step(step, x - step.sigma * v)
                x = grid.scheduler.step(v, step.timestep, x, return_dict=False)[0]
        finally:
            noise_expert.forget_prompts()
        return x

    for noise_expert, steps in groupby(grid.steps, key=lambda step: step.noise_expert):
        x_BCTHW = run(backbone(noise_expert), steps, x_BCTHW)  # not held here: it may be released for the next
    return conditions.with_first_frame(x_BCTHW)
