"""Preference alignment of a noise expert: Direct-Align with a semantic relative preference, on LoRA or all weights.

    x = σ_e·ε + (1 − σ_e)·x0,   v̂ = model(x, σ_e),   x̂0 = ((x + (σ* − σ_e)·v̂) − σ*·ε) / (1 − σ*)
    R = ⟨e(decode(x̂0)), (1 + k)·e_P − e_N⟩,   loss = relu(m − R)   (P and N swapped in the inversion branch)

x0 comes with the batch (from a rollout or a cache); ε is the noise that the rollout began with (offline: fresh noise).
σ_e, σ*, branch and control words are drawn from each sample's key, so they do not depend on the rest of the batch.
x, ε, v̂, x* and x̂0 are fp32 (fp64 where the latents are). The augmented prompts P and N, "word. caption", are given to
the reward only, never to the transformer.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, N scored frames, D of an embedding.
Source: Semantic Relative Preference Optimization (arXiv 2509.06942), restated in `losses.preference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan import rng
from lapwan.caching.collate import Batch
from lapwan.losses import flow, preference
from lapwan.losses.preference import Preference
from lapwan.models.device import widened
from lapwan.names import Band, NoiseExpert
from lapwan.rewards.base import Reward
from lapwan.train.metrics import bin_of
from lapwan.train.objective import AllReduce, Draws, Loss, Objective, ParameterGroup, local_sum
from lapwan.train.srpo.rollout import Rollout
from lapwan.wan.backbone import WanBackbone

if TYPE_CHECKING:
    from lapwan.lora.attach import Adapter


Decode = Callable[[Tensor], Tensor]  # latents [B, C, T, H, W] -> [B, N, 3, H, W] in [-1, 1], with gradient


@dataclass(frozen=True)
class PreferenceRule:
    """The constants of the method.

    Args:
        interval: range of sigma to train on, by noise expert.
        whole: range of sigma over which the discounts are interpolated.
        reach: largest |σ_e − σ*| of Direct-Align.
        positive, negative: control words.
        discount_denoise, discount_inversion: k at the low and the high end of `whole`, by branch.
        margin: m of the hinge.
        bins: sigma bins of the logged figures.
    """

    interval: Mapping[NoiseExpert, Band]
    whole: Band
    reach: float = 0.0215
    branches: str = "both"
    positive: tuple[str, ...] = ("Realistic photo",)
    negative: tuple[str, ...] = ("Painting",)
    discount_denoise: tuple[float, float] = (0.1, 0.25)
    discount_inversion: tuple[float, float] = (0.3, 0.01)
    margin: float = 0.7
    kl_weight: float = 0.0
    bins: int = 4


@dataclass(frozen=True)
class RewardModels:
    """Reward models by name with their weights, and the decoder of the frames they score."""

    models: Mapping[str, Reward]
    weights: Mapping[str, float]
    decode: Decode

    def embed(self, latents_BCTHW: Tensor) -> dict[str, Tensor]:
        """Mean embedding over the scored frames, [B, D], by reward."""
        pixels_BN3HW = (self.decode(latents_BCTHW) + 1) / 2
        batch, frames = pixels_BN3HW.shape[:2]
        flat = pixels_BN3HW.flatten(0, 1)
        return {name: reward.image(flat).view(batch, frames, -1).mean(dim=1)
                for name, reward in self.models.items()}


@dataclass(frozen=True)
class AlignedNoiseExpert:
    """A trained noise expert: its backbone, the trained tensors by name, and the adapter if it is a LoRA."""

    backbone: WanBackbone
    parameters: Mapping[str, torch.nn.Parameter]
    adapter: Adapter | None = None


Save = Callable[[Path, int], list[Path]]


@dataclass(frozen=True)
class PreferenceDraws:
    """Random choices of a batch: branch, both sigmas, and the augmented prompts."""

    denoise_B: Tensor
    sigma_e_B: Tensor
    sigma_star_B: Tensor
    positive: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)


class SrpoObjective(Objective):
    """Preference alignment of one or both noise experts, which take turns.

    Args:
        save: writes the aligned weights into a folder, at a step.
        rollout: makes the latents of a step's batches; None: they are the cache's.
    """

    def __init__(
        self, trained: Mapping[NoiseExpert, AlignedNoiseExpert], reward_models: RewardModels, rule: PreferenceRule,
        save: Save, rollout: Rollout | None = None,
    ) -> None:
        self.trained, self.reward_models, self.rule, self._save = dict(trained), reward_models, rule, save
        self.rollout = rollout
        self.backbones = {e: part.backbone for e, part in self.trained.items()}
        # The LoRAs in training; none in a full fine-tune.
        self.adapters = {e: part.adapter for e, part in self.trained.items() if part.adapter is not None}
        self.parameter_groups = {
            e.value: [ParameterGroup({f"{e.value}.{name}": p for name, p in trained.parameters.items()})]
            for e, trained in self.trained.items()
        }

    def prepare(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], all_reduce: AllReduce = local_sum,
        draws: Sequence[Draws] = (),
    ) -> Sequence[Batch]:
        """The batches with clean latents sampled from their draws' noise, or as they were read."""
        return batches if self.rollout is None else self.rollout(noise_expert, batches, draws)

    @contextmanager
    def loss(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> Iterator[Loss]:
        """One forward with gradient, the Direct-Align estimate of x0, and its relative preference."""
        drawn = self.preference_draws(noise_expert, batch, draws)
        x0 = widened(batch.latents_BCTHW)
        noise = draws.noise_BCTHW.to(x0)
        x = flow.add_noise(x0, noise, drawn.sigma_e_B).detach()
        text = [features.to(x0.device) for features in batch.text]
        v = self.velocity(noise_expert, x, drawn.sigma_e_B, text, batch.condition_BCTHW)
        estimate = preference.predict_x0(x, noise, v, drawn.sigma_e_B, drawn.sigma_star_B)
        preferences = self._preferences(self.reward_models.embed(estimate), drawn)
        loss_B = preference.preference_loss(preferences, self.reward_models.weights, self.rule.margin)
        loss = Loss({"loss/preference": loss_B}, sigma_B=drawn.sigma_star_B)
        if self.rule.kl_weight:
            with torch.no_grad():
                base = self.base_velocity(noise_expert, x, drawn.sigma_e_B, text, batch.condition_BCTHW)
            distance_B = flow.flow_loss(flow.squared_error(v, base))
            loss.terms["loss/kl"] = self.rule.kl_weight * distance_B
            loss.figures["kl_proxy"] = distance_B.detach()
        loss.figures |= self._figures(noise_expert, preferences, drawn)
        yield loss

    def velocity(
        self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor],
        condition: Tensor | None = None,
    ) -> Tensor:
        """v̂ of the trained noise expert at (x, 1000·σ), for each sample's text features [n, D]."""
        timestep_B = (1000.0 * sigma_B).float().to(x_BCTHW.device)
        return self.trained[noise_expert].backbone.velocity(x_BCTHW, timestep_B, text, condition)

    def base_velocity(
        self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor],
        condition: Tensor | None = None,
    ) -> Tensor:
        """v̂ of the base: the LoRA's gate is 0."""
        adapter = self.trained[noise_expert].adapter
        if adapter is None:
            raise ValueError("the base's velocity is available for a LoRA only, not for a full fine-tune")
        gates = torch.zeros(1, len(adapter.group_names), device=x_BCTHW.device)
        with adapter.holder.scope(gates):
            return self.velocity(noise_expert, x_BCTHW, sigma_B, text, condition)

    def preference_draws(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> PreferenceDraws:
        """Draw branch, sigmas and control words of every sample from its key."""
        rule, band, device = self.rule, self.rule.interval[noise_expert], draws.sigma_B.device

        keys = draws.keys
        # Successive draws alternate between the branches, so a step of several samples has equally many of each.
        denoise = [int(key[2]) % 2 == 0 if rule.branches == "both" else rule.branches == "denoise" for key in keys]
        denoise_B = torch.tensor(denoise, device=device)
        position_B = (draws.sigma_B.double() - band.low) / (band.high - band.low)
        reach_B = torch.tensor([rng.uniform(*key, "reach") for key in keys], dtype=torch.float64, device=device)
        u_B2 = torch.stack([position_B.clamp(0.0, 1.0 - 1e-12), reach_B], dim=1)
        sigma_e_B, sigma_star_B = preference.draw_sigmas(u_B2, denoise_B, band.low, band.high, rule.reach)

        def augmented(choices: Sequence[str], purpose: str) -> list[str]:
            chosen = [choices[int(rng.uniform(*key, purpose) * len(choices))] for key in keys]
            return [augment_prompt(word, caption) for word, caption in zip(chosen, batch.captions, strict=True)]

        return PreferenceDraws(denoise_B, sigma_e_B, sigma_star_B, augmented(rule.positive, "positive word"),
                               augmented(rule.negative, "negative word"))

    def _preferences(self, embeddings: Mapping[str, Tensor], drawn: PreferenceDraws) -> dict[str, Preference]:
        rule, whole = self.rule, self.rule.whole
        k_B = torch.where(
            drawn.denoise_B,
            preference.discount(drawn.sigma_star_B, whole.low, whole.high, *rule.discount_denoise),
            preference.discount(drawn.sigma_star_B, whole.low, whole.high, *rule.discount_inversion),
        )
        preferences = {}
        for name, image_BD in embeddings.items():
            reward = self.reward_models.models[name]
            positive, negative = (reward.text(texts).detach() for texts in (drawn.positive, drawn.negative))
            preferences[name] = preference.relative_preference(
                image_BD, positive, negative, k_B.to(image_BD.device), drawn.denoise_B.to(image_BD.device))
        return preferences

    def _figures(
        self, noise_expert: NoiseExpert, preferences: Mapping[str, Preference], drawn: PreferenceDraws
    ) -> dict[str, Tensor]:
        """Cosines with P and N and their difference: over all, by reward, by branch, and by branch and sigma."""
        weights = self.reward_models.weights
        cosines = {reward: {"positive": p.positive_B.detach(), "negative": p.negative_B.detach(),
                            "margin": p.margin_B.detach()} for reward, p in preferences.items()}
        figures = {f"reward/{kind}": preference.weighted_mean({r: by[kind] for r, by in cosines.items()}, weights)
                   for kind in ("positive", "negative", "margin")}
        if len(cosines) > 1:
            figures |= {f"reward/{r}/{kind}": value for r, by in cosines.items() for kind, value in by.items()}
        band, bins = self.rule.interval[noise_expert], self.rule.bins
        width = (band.high - band.low) / bins
        branches, sigmas = drawn.denoise_B.tolist(), drawn.sigma_star_B.tolist()
        for row, (denoise, sigma) in enumerate(zip(branches, sigmas, strict=True)):
            branch = "denoise" if denoise else "inversion"
            low = band.low + bin_of(sigma, band, bins) * width
            sigma_bin = f"{branch}/{low:.3f}-{low + width:.3f}"
            for name in ("positive", "negative", "margin"):
                value = figures[f"reward/{name}"][row : row + 1]
                for tag in (branch, sigma_bin):
                    key = f"reward_by_branch/{tag}/{name}"
                    figures[key] = torch.cat([figures[key], value]) if key in figures else value
        return figures

    def save(self, folder: Path, step: int) -> list[Path]:
        return self._save(folder, step)


def augment_prompt(word: str, caption: str) -> str:
    """The prompt given to the reward: the control word before the caption."""
    return f"{word}. {caption}" if word else caption
