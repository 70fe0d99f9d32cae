"""What a trainer needs of an algorithm (`Objective`), the draws of a batch, and the flow-matching loss.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width.
How to add an objective: a subclass of `Objective`, and a recipe that passes it to `make_trainer` of
`lapwan/train/recipe.py`; see `lapwan/train/lora/objective.py` and `lapwan/train/lora/recipe.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lapwan import rng
from lapwan.caching.collate import Batch, to_device
from lapwan.lora.attach import Adapter
from lapwan.losses import flow
from lapwan.losses.sigmas import SigmaSampler, Uniform, Weighting, draw_in_band, stratified_u
from lapwan.names import Band, NoiseExpert
from lapwan.rng import RandomKey
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.image_condition import with_first_frame
from lapwan.wan.transformer.forward import TokenTimes, first_frame_times


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch.

    Args:
        sigma_B: fp64, in [0, 1].
        noise_BCTHW: fp32, shaped like the latents.
        dropped_B: bool, whose caption is dropped.
        weight_B: weight of the flow loss at each sigma.
        keys: key of each sample's further draws; () where there are none (validation: no dropout).
        clean_B: bool, in host memory: whose first latent frame is given clean; None: nobody's.
    """

    sigma_B: Tensor
    noise_BCTHW: Tensor
    dropped_B: Tensor
    weight_B: Tensor
    keys: tuple[RandomKey, ...] = ()
    clean_B: Tensor | None = None


@dataclass(frozen=True)
class SigmaRule:
    """How a noise expert's sigmas are drawn and its flow loss is weighted; `patch`: latent pixels along a token's
    side."""

    sampler: SigmaSampler = field(default_factory=Uniform)
    band: Band = field(default_factory=lambda: Band(0.0, 1.0))
    strata: int = 1
    weighting: Weighting = field(default_factory=Weighting)
    patch: int = 2

    def sigmas(self, u_B: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Sigma in the band for u ~ U(0, 1) and latents of (height, width): [B] fp64."""
        return draw_in_band(self.sampler.for_tokens(self._tokens(latent_size)), u_B, self.band.low, self.band.high)

    def weights(self, sigma_B: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """The flow loss's weights, of mean 1 over this rule's draws: [B] fp64."""
        return self.weighting.raw(sigma_B) * self._scale(self._tokens(latent_size))

    def _tokens(self, latent_size: tuple[int, int]) -> int:
        return latent_size[0] * latent_size[1] // self.patch**2

    def _scale(self, tokens: int) -> float:
        return _scale(self, tokens)


@lru_cache(maxsize=64)
def _scale(rule: SigmaRule, tokens: int) -> float:
    return rule.weighting.normalizer(rule.sampler.for_tokens(tokens), rule.band.low, rule.band.high)


@lru_cache(maxsize=8)
def _strata_order(seed: int | str, stream: int | str, block: int, strata: int) -> list[int]:
    order: list[int] = torch.randperm(strata, generator=rng.generator(seed, stream, block, "strata")).tolist()
    return order


def make_draws(
    batch: Batch, keys: Sequence[RandomKey], rule: SigmaRule, caption_dropout: float = 0.0, first_frame: float = 0.0
) -> Draws:
    """The draws of each sample by its own key, so that they do not depend on the rest of the batch; sigma in the band.

    Args:
        keys: (seed, stream, number of the visit, clip) of each sample.
        first_frame: probability that a sample's first latent frame is given clean.
    """

    def stratified(key: RandomKey) -> float:
        seed, stream, number = key[0], key[1], int(key[2])
        order = _strata_order(seed, stream, number // rule.strata, rule.strata)
        return stratified_u(rng.uniform(*key, "sigma"), number, rule.strata, order)

    shape = batch.latents_BCTHW.shape[1:]
    u_B = torch.tensor([stratified(key) for key in keys], dtype=torch.float64)
    noise = torch.stack([torch.randn(shape, generator=rng.generator(*key, "noise")) for key in keys])
    dropped_B = torch.tensor([rng.uniform(*key, "caption dropout") < caption_dropout for key in keys])
    device, size = batch.latents_BCTHW.device, (shape[-2], shape[-1])
    sigma_B = rule.sigmas(u_B, size)
    weight_B = rule.weights(sigma_B, size)
    return Draws(
        to_device(sigma_B, device), to_device(noise, device), dropped_B, to_device(weight_B, device), tuple(keys),
        draw_clean(batch, keys, first_frame))


def draw_clean(batch: Batch, keys: Sequence[RandomKey], first_frame: float) -> Tensor | None:
    """Whose first latent frame is given clean: of a share `first_frame` of the samples, and never an image's only one.

    Returns:
        [B] bool in host memory; None if nobody's is.
    """
    if not first_frame or batch.latents_BCTHW.shape[2] < 2:
        return None
    clean_B = torch.tensor([rng.uniform(*key, "first frame") < first_frame for key in keys])
    return clean_B if bool(clean_B.any()) else None


@dataclass
class Loss:
    """The loss of a batch by sample; the mean over the samples of the step is minimised.

    Args:
        terms: weighted terms by tag, [B] each; their sum is the loss.
        figures: values to average and log by tag, without gradient; [n <= B] each.
        sigma_B: the sigma to log, where it is not the drawn one.
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
    """Parameters by name that an optimizer steps at `lr_scale` times its lr."""

    parameters: Mapping[str, nn.Parameter]
    lr_scale: float = 1.0


AllReduce = Callable[[Tensor], Tensor]


def local_sum(tensor: Tensor) -> Tensor:
    """The sum over processes where there is only one."""
    return tensor


class Objective(ABC):
    """An algorithm: what is trained, the loss of a batch, what is saved.

    Attributes:
        backbones: the noise experts in training.
        adapters: the low-rank adapters in training, by noise expert.
        parameter_groups: by the name of the optimizer that steps them; a noise expert's own are named by its value.
    """

    backbones: Mapping[NoiseExpert, WanBackbone]
    adapters: Mapping[NoiseExpert, Adapter]
    parameter_groups: Mapping[str, Sequence[ParameterGroup]]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by name."""
        return {name: parameter for groups in self.parameter_groups.values() for group in groups
                for name, parameter in group.parameters.items()}

    def optimizers_for(self, noise_expert: NoiseExpert) -> tuple[str, ...]:
        """Names of the optimizers that step in the turns of a noise expert."""
        return (noise_expert.value,)

    def prepare(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], all_reduce: AllReduce = local_sum,
        draws: Sequence[Draws] = (),
    ) -> Sequence[Batch]:
        """The batches that an optimizer step's losses are of, before the first of them; no gradient.

        An objective that generates its latents (a rollout from the draws' noise) completes the batches here; one whose
        loss needs statistics over the whole step computes them.

        Args:
            all_reduce: sums a tensor over the processes, each of which has a part of the batches.
            draws: of each batch.
        """
        return batches

    @abstractmethod
    def loss(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> AbstractContextManager[Loss]:
        """The loss as a scope: entering runs the forward; the backward belongs inside, where gates and dropout hold."""

    state_type: Any = dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart besides the parameters: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Any) -> None:  # noqa: B027 - most have no state
        """The inverse of `state_dict`, for a `state_type`.

        Raises:
            ValueError: a state of another run.
        """

    @abstractmethod
    def save(self, folder: Path, step: int) -> list[Path]:
        """Write the adapter files into `folder` and return their paths."""


def counted_frames(x_BCTHW: Tensor, clean_B: Tensor) -> Tensor:
    """[B, T] fp32: 0 for a first latent frame that is given clean, else 1."""
    counted_BT = torch.ones(x_BCTHW.shape[0], x_BCTHW.shape[2], device=x_BCTHW.device)
    counted_BT[:, 0] = (~clean_B).float()
    return counted_BT


def flow_terms(
    backbone: WanBackbone, batch: Batch, draws: Draws, roi_weight: float, empty_text: Tensor | None
) -> Loss:
    """w(σ)·(L_flow + λ·L_roi) per sample, from one velocity at (x_σ, 1000·σ); the figures are unweighted.

    A first latent frame that is given clean is x0 at timestep 0, and carries no loss.

    Args:
        roi_weight: λ; 0 leaves the region out. A sample without a region adds nothing to it.
        empty_text: [n, D], replaces the caption where `draws.dropped_B` is set, so that the model keeps its
            unconditional branch for guidance.
    """
    x0, noise = batch.latents_BCTHW.float(), draws.noise_BCTHW
    text = list(batch.text)
    for index in draws.dropped_B.nonzero().flatten().tolist():
        if empty_text is None:
            raise ValueError("caption dropout needs the empty prompt's features")
        text[index] = empty_text
    x, timestep_B = flow.add_noise(x0, noise, draws.sigma_B), 1000.0 * draws.sigma_B.float()
    timestep: Tensor | TokenTimes = timestep_B
    counted_BT = None
    if draws.clean_B is not None:
        clean_B, patch = to_device(draws.clean_B, x0.device), backbone.transformer.config.patch_size
        x = with_first_frame(x, x0[:, :, :1], clean_B)
        timestep = first_frame_times(timestep_B, clean_B, x.shape[2:], patch)
        counted_BT = counted_frames(x, clean_B)
    roi = batch.roi_BTHW if batch.roi_BTHW is None or counted_BT is None else (
        batch.roi_BTHW * counted_BT[:, :, None, None])
    # Read back before the forward, when the device is idle; afterwards this would wait for all of it.
    has_region = [] if roi is None else (roi.flatten(1).sum(dim=1) > 0).tolist()
    v = backbone.velocity(x, timestep, [features.to(x0.device) for features in text], batch.condition_BCTHW)
    error = flow.squared_error(v, flow.velocity_target(x0, noise))
    plain = flow.flow_loss(error, counted_BT)
    weight_B = draws.weight_B.to(plain.dtype)
    loss = Loss({"loss/diffusion": weight_B * plain}, {"loss/diffusion": plain.detach()})
    if roi_weight and roi is not None:
        region = flow.roi_loss(error, roi)
        loss.terms["loss/roi"] = roi_weight * weight_B * region
        values = [value for value, has in zip(region.detach(), has_region, strict=True) if has]
        loss.figures["loss/roi"] = torch.stack(values) if values else region.detach()[:0]
    return loss
