"""What a trainer needs of an algorithm, and the draws a loss is made from.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width.
How to add an objective: one file with a class that has these members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lapwan import keyed
from lapwan.data.batch import Batch
from lapwan.losses import flow
from lapwan.losses.sigmas import SigmaSampler, draw_in_band
from lapwan.names import Band, NoiseExpert
from lapwan.wan.backbone import velocity
from lapwan.wan.text import pad_text

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch: sigma (fp64), noise like the latents (fp32), whose caption is dropped (bool)."""

    sigma_B: Tensor
    noise_BCTHW: Tensor
    dropped_B: Tensor


def make_draws(
    batch: Batch, keys: Sequence[tuple[int | str, ...]], sampler: SigmaSampler, band: Band, caption_dropout: float = 0.0
) -> Draws:
    """Each sample's numbers by its own key, so they do not depend on who shares the batch; sigma inside the band."""

    def uniform(key: tuple[int | str, ...], purpose: str) -> Tensor:
        return torch.rand((), dtype=torch.float64, generator=keyed.generator(*key, purpose))

    shape = batch.latents_BCTHW.shape[1:]
    u_B = torch.stack([uniform(key, "sigma") for key in keys])
    noise = torch.stack([torch.randn(shape, generator=keyed.generator(*key, "noise")) for key in keys])
    dropped_B = torch.stack([uniform(key, "caption dropout") for key in keys]) < caption_dropout
    device = batch.latents_BCTHW.device
    return Draws(draw_in_band(sampler, u_B, band.low, band.high).to(device), noise.to(device), dropped_B)


@dataclass
class Loss:
    """Per-sample terms already weighted, whose mean over the step's samples is what is minimised.

    `figures` are per-sample tensors to be averaged and logged under their tag, without gradient.
    """

    terms: dict[str, Tensor]
    figures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total_B(self) -> Tensor:
        """Sum of the terms, per sample."""
        return torch.stack(list(self.terms.values())).sum(dim=0)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters one optimiser steps together, by name; `lr_scale` multiplies the optimiser's lr."""

    parameters: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0


class Objective(Protocol):
    """One algorithm: what is trained, the loss of a batch, what is saved."""

    @property
    def optimised(self) -> Mapping[str, list[ParameterGroup]]:
        """Parameter groups by the name of the optimiser that steps them."""

    def stepped_by(self, expert: NoiseExpert) -> tuple[str, ...]:
        """Names of the optimisers that step in a turn of `expert`."""

    def prepare(self, expert: NoiseExpert, batches: Sequence[Batch]) -> None:
        """Look at all batches of an optimiser step before the first loss: statistics of the whole step. No gradient."""

    def loss(self, expert: NoiseExpert, batch: Batch, draws: Draws) -> AbstractContextManager[Loss]:
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
    """L_flow + λ·L_roi per sample, from one velocity at (x_σ, 1000·σ).

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
    v = velocity(
        transformer, flow.noised(x0, noise, draws.sigma_B), 1000.0 * draws.sigma_B.float(),
        pad_text(text).to(x0.device), batch.condition_BCTHW,
    )
    error = flow.squared_error(v, flow.velocity_target(x0, noise))
    plain = flow.flow_loss(error)
    loss = Loss({"loss/diffusion": plain}, {"loss/diffusion": plain.detach()})
    if roi_weight and batch.roi_BTHW is not None:
        region, present = flow.roi_loss(error, batch.roi_BTHW)
        loss.terms["loss/roi"] = roi_weight * region
        loss.figures["loss/roi"] = region.detach()[present]
    return loss
