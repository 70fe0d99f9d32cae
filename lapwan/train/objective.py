"""What a trainer needs of an algorithm, and the draws a loss is made from.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width.
How to add an objective: one file with a class that has these members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lapwan import rng
from lapwan.caching.batch import Batch, send
from lapwan.lora.attach import Adapter
from lapwan.losses import flow
from lapwan.losses.sigmas import SigmaSampler, Uniform, Weighting, draw_in_band, stratum_u
from lapwan.names import Band, NoiseExpert
from lapwan.wan.backbone import velocity

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: sigma (fp64), noise like the latents (fp32), whose caption is dropped (bool).

    `weight_B` is the flow loss's weight at each sigma; `keys` names each sample's draws, () where nothing else may be
    drawn (validation: no dropout).
    """

    sigma_B: Tensor
    noise_BCTHW: Tensor
    dropped_B: Tensor
    weight_B: Tensor
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class SigmaRule:
    """How a noise expert's sigmas are drawn and its flow loss is weighted."""

    sampler: SigmaSampler = field(default_factory=Uniform)
    band: Band = field(default_factory=lambda: Band(0.0, 1.0))
    strata: int = 1
    weighting: Weighting = field(default_factory=Weighting)

    def sigmas(self, u_B: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Sigma in the band for u ~ U(0, 1) and latents of (height, width): [B] fp64."""
        return draw_in_band(self.sampler.for_tokens(_tokens(latent_size)), u_B, self.band.low, self.band.high)

    def weights(self, sigma_B: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """The flow loss's weights, of mean 1 over this rule's draws: [B] fp64."""
        return self.weighting.raw(sigma_B) * self._scale(_tokens(latent_size))

    def _scale(self, tokens: int) -> float:
        return _scale(self, tokens)


@lru_cache(maxsize=64)
def _scale(rule: SigmaRule, tokens: int) -> float:
    return rule.weighting.over(rule.sampler.for_tokens(tokens), rule.band.low, rule.band.high)


def _tokens(latent_size: tuple[int, int]) -> int:
    return latent_size[0] * latent_size[1] // 4  # patches of 2 x 2


@lru_cache(maxsize=8)
def _strata_order(seed: int | str, stream: int | str, block: int, strata: int) -> list[int]:
    order: list[int] = torch.randperm(strata, generator=rng.generator(seed, stream, block, "strata")).tolist()
    return order


def make_draws(
    batch: Batch, keys: Sequence[Key], rule: SigmaRule, caption_dropout: float = 0.0
) -> Draws:
    """Each sample's numbers by its own key, so they do not depend on who shares the batch; sigma inside the band.

    Args:
        keys: (seed, stream, number of the visit, clip) of each sample.
    """

    def uniform(key: Key, purpose: str) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=rng.generator(*key, purpose)))

    def stratified(key: Key) -> float:
        seed, stream, number = key[0], key[1], int(key[2])
        order = _strata_order(seed, stream, number // rule.strata, rule.strata)
        return stratum_u(uniform(key, "sigma"), number, rule.strata, order)

    shape = batch.latents_BCTHW.shape[1:]
    u_B = torch.tensor([stratified(key) for key in keys], dtype=torch.float64)
    noise = torch.stack([torch.randn(shape, generator=rng.generator(*key, "noise")) for key in keys])
    dropped_B = torch.tensor([uniform(key, "caption dropout") < caption_dropout for key in keys])
    device, size = batch.latents_BCTHW.device, (shape[-2], shape[-1])
    sigma_B = rule.sigmas(u_B, size)
    weight_B = rule.weights(sigma_B, size)
    return Draws(send(sigma_B, device), send(noise, device), dropped_B, send(weight_B, device), tuple(keys))


@dataclass
class Loss:
    """Per-sample terms already weighted, whose mean over the step's samples is what is minimised.

    `figures` are per-sample tensors to be averaged and logged under their tag, without gradient; `sigma_B` where the
    noise level to log is not the draw itself.
    """

    terms: dict[str, Tensor]
    figures: dict[str, Tensor] = field(default_factory=dict)
    sigma_B: Tensor | None = None

    @property
    def total_B(self) -> Tensor:
        """Sum of the terms, per sample."""
        return torch.stack(list(self.terms.values())).sum(dim=0)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters one optimizer steps together, by name; `lr_scale` multiplies the optimizer's lr."""

    parameters: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0


Total = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The sum over the processes of a run in one."""
    return tensor


class Objective(Protocol):
    """One algorithm: what is trained, the loss of a batch, what is saved."""

    @property
    def adapters(self) -> Mapping[NoiseExpert, Adapter]:
        """The low-rank adapters by noise expert."""

    @property
    def optimised(self) -> Mapping[str, list[ParameterGroup]]:
        """Parameter groups by the name of the optimizer that steps them."""

    def stepped_by(self, noise_expert: NoiseExpert) -> tuple[str, ...]:
        """Names of the optimizers that step in a turn of `noise_expert`."""

    def prepare(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], total: Total = alone, draws: Sequence[Draws] = ()
    ) -> None:
        """Look at all batches of an optimizer step before the first loss: statistics of the whole step. No gradient.

        `draws` are the batches' own; `total` adds a tensor up over the processes, which each hold a part of the step's
        batches.
        """

    def loss(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> AbstractContextManager[Loss]:
        """The loss as a scope: forward on entering, and backward belongs inside, where the gates still hold."""

    def state_dict(self) -> dict[str, Any]:
        """What besides parameters must survive a restart: tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def save(self, folder: Path, step: int) -> list[Path]:
        """Write the adapter files into `folder`; returns their paths."""


def flow_terms(
    transformer: WanTransformer3DModel, batch: Batch, draws: Draws, roi_weight: float, empty_text: Tensor | None
) -> Loss:
    """w(σ)·(L_flow + λ·L_roi) per sample, from one velocity at (x_σ, 1000·σ); the figures carry no weight.

    Args:
        roi_weight: λ; 0 leaves the region out. A sample without a region adds nothing to it.
        empty_text: [n, D], put in place of the caption where `draws.dropped_B` says so, which keeps the model's
            unconditional branch alive for guidance.
    """
    x0, noise = batch.latents_BCTHW.float(), draws.noise_BCTHW
    text = list(batch.text)
    for index in draws.dropped_B.nonzero().flatten().tolist():
        if empty_text is None:
            raise ValueError("caption dropout needs the empty prompt's features")
        text[index] = empty_text
    # Asked before the forward, when the device is idle: after it, the answer would wait for all of it.
    present = [] if batch.roi_BTHW is None else (batch.roi_BTHW.flatten(1).sum(dim=1) > 0).tolist()
    v = velocity(
        transformer, flow.noised(x0, noise, draws.sigma_B), 1000.0 * draws.sigma_B.float(),
        [one.to(x0.device) for one in text], batch.condition_BCTHW,
    )
    error = flow.squared_error(v, flow.velocity_target(x0, noise))
    plain = flow.flow_loss(error)
    weight_B = draws.weight_B.to(plain.dtype)
    loss = Loss({"loss/diffusion": weight_B * plain}, {"loss/diffusion": plain.detach()})
    if roi_weight and batch.roi_BTHW is not None:
        region, _ = flow.roi_loss(error, batch.roi_BTHW)
        loss.terms["loss/roi"] = roi_weight * weight_B * region
        seen = [one for one, there in zip(region.detach(), present, strict=True) if there]
        loss.figures["loss/roi"] = torch.stack(seen) if seen else region.detach()[:0]
    return loss
