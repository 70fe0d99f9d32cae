"""Preference alignment of a noise expert: Direct-Align with a semantic relative preference, on LoRA or all weights.

    x = σ_e·ε + (1 − σ_e)·x0,   v̂ = model(x, σ_e),   x̂0 = ((x + (σ* − σ_e)·v̂) − σ*·ε) / (1 − σ*)
    R = ⟨e(decode(x̂0)), (1 + k)·e_P − e_N⟩,   loss = relu(m − R)   (P and N swapped in the inversion branch)

x0 comes with the batch (a rollout, or a cache) and ε is the very noise it began with (offline: fresh noise). σ_e, σ*,
branch and words are drawn by each sample's own key, so they do not depend on who shares the batch. x, ε, v̂, x* and x̂0
are fp32 (fp64 where the latents are). P and N, "word. caption", go to the reward and nowhere else.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width, N frames judged, D of an embedding.
Source: Semantic Relative Preference Optimization (arXiv 2509.06942), restated in `losses.preference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lapwan import rng
from lapwan.caching.batch import Batch
from lapwan.losses import flow, preference
from lapwan.losses.preference import Preference
from lapwan.names import Band, NoiseExpert
from lapwan.train.metrics import bin_of
from lapwan.train.objective import Draws, Loss, ParameterGroup, Total, alone
from lapwan.wan.backbone import velocity

if TYPE_CHECKING:
    from lapwan.lora.attach import Adapter


class ImageReward(Protocol):
    """What the objective needs of a reward model; see `lapwan.rewards`."""

    def text(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm embeddings [N, D]."""

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit-norm embeddings [B, D] of pixels in [0, 1], differentiable."""


Decode = Callable[[Tensor], Tensor]  # latents [B, C, T, H, W] -> [B, N, 3, H, W] in [-1, 1], with gradient


@dataclass(frozen=True)
class PreferenceRule:
    """The numbers of the method; `interval` by noise expert, `whole` the bounds the discounts run over."""

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
class Judges:
    """Reward models by name with their weights, and how latents become the frames they look at."""

    rewards: Mapping[str, ImageReward]
    weights: Mapping[str, float]
    decode: Decode

    def embed(self, latents_BCTHW: Tensor) -> dict[str, Tensor]:
        """By reward, the mean over the judged frames of their embeddings: [B, D]."""
        pixels_BN3HW = (self.decode(latents_BCTHW) + 1) / 2
        batch, frames = pixels_BN3HW.shape[:2]
        flat = pixels_BN3HW.flatten(0, 1)
        return {name: reward.image(flat).view(batch, frames, -1).mean(dim=1)
                for name, reward in self.rewards.items()}


@dataclass(frozen=True)
class AlignedNoiseExpert:
    """What is trained of a noise expert: its transformer, the tensors by name, and the adapter if it is a LoRA."""

    transformer: Any
    parameters: Mapping[str, torch.nn.Parameter]
    adapter: Adapter | None = None


Save = Callable[[Path, int], list[Path]]


@dataclass(frozen=True)
class _Picked:
    """A batch's own draws: the branch, both sigmas, and the words."""

    denoise_B: Tensor
    sigma_e_B: Tensor
    sigma_star_B: Tensor
    positive: list[str] = field(default_factory=list)
    negative: list[str] = field(default_factory=list)


class SrpoObjective:
    """Preference alignment of one noise expert or of both, each in its own turns."""

    def __init__(
        self, trained: Mapping[NoiseExpert, AlignedNoiseExpert], judges: Judges, rule: PreferenceRule, save: Save
    ) -> None:
        self.trained, self.judges, self.rule, self._save = dict(trained), judges, rule, save
        self.optimised = {
            noise_expert.value: [ParameterGroup({f"{noise_expert.value}.{n}": p for n, p in one.parameters.items()})]
            for noise_expert, one in self.trained.items()
        }

    @property
    def adapters(self) -> dict[NoiseExpert, Adapter]:
        """The LoRAs in training; none in a full fine-tune."""
        return {noise_expert: one.adapter for noise_expert, one in self.trained.items() if one.adapter is not None}

    def stepped_by(self, noise_expert: NoiseExpert) -> tuple[str, ...]:
        return (noise_expert.value,)

    def prepare(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], total: Total = alone, draws: Sequence[Draws] = ()
    ) -> None:
        """Nothing of a sample's loss depends on the others of a step."""

    @contextmanager
    def loss(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> Iterator[Loss]:
        """The one forward with gradient, the estimate of x0, and the rewards' verdict on it."""
        picked = self.pick(noise_expert, batch, draws)
        x0 = batch.latents_BCTHW.to(torch.promote_types(batch.latents_BCTHW.dtype, torch.float32))
        noise = draws.noise_BCTHW.to(x0)
        x = flow.noised(x0, noise, picked.sigma_e_B).detach()
        text = [one.to(x0.device) for one in batch.text]
        v = self.velocity(noise_expert, x, picked.sigma_e_B, text, batch.condition_BCTHW)
        estimate = preference.recover(x, noise, v, picked.sigma_e_B, picked.sigma_star_B)
        seen = self._judge(self.judges.embed(estimate), picked)
        preferred = preference.preference_loss(seen, self.judges.weights, self.rule.margin)
        loss = Loss({"loss/preference": preferred}, sigma_B=picked.sigma_star_B)
        if self.rule.kl_weight:
            with torch.no_grad():
                base = self.base_velocity(noise_expert, x, picked.sigma_e_B, text, batch.condition_BCTHW)
            distance_B = flow.flow_loss(flow.squared_error(v, base))
            loss.terms["loss/kl"] = self.rule.kl_weight * distance_B
            loss.figures["kl_proxy"] = distance_B.detach()
        loss.figures |= self._figures(noise_expert, seen, picked)
        yield loss

    def velocity(
        self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor],
        condition: Tensor | None = None,
    ) -> Tensor:
        """v̂ of what is trained at (x, 1000·σ) for each sample's text features [n, D]."""
        timestep_B = (1000.0 * sigma_B).float().to(x_BCTHW.device)
        return velocity(self.trained[noise_expert].transformer, x_BCTHW, timestep_B, text, condition)

    def base_velocity(
        self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor],
        condition: Tensor | None = None,
    ) -> Tensor:
        """v̂ without the LoRA: its gate at 0."""
        adapter = self.trained[noise_expert].adapter
        if adapter is None:
            raise ValueError("the base's velocity needs a LoRA to leave out")
        gates = torch.zeros(1, len(adapter.group_names), device=x_BCTHW.device)
        with adapter.holder.scope(gates):
            return self.velocity(noise_expert, x_BCTHW, sigma_B, text, condition)

    def pick(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> _Picked:
        """Branch, sigmas and words of every sample, by its key."""
        rule, band, device = self.rule, self.rule.interval[noise_expert], draws.sigma_B.device

        def uniform(key: Sequence[int | str], purpose: str) -> float:
            return float(torch.rand((), dtype=torch.float64, generator=rng.generator(*key, purpose)))

        keys = draws.keys
        # Visits in a row take turns in the branches, so a step of several samples holds as many of each.
        denoise = [int(key[2]) % 2 == 0 if rule.branches == "both" else rule.branches == "denoise" for key in keys]
        denoise_B = torch.tensor(denoise, device=device)
        place_B = (draws.sigma_B.double() - band.low) / (band.high - band.low)
        reach_B = torch.tensor([uniform(key, "reach") for key in keys], dtype=torch.float64, device=device)
        u_B2 = torch.stack([place_B.clamp(0.0, 1.0 - 1e-12), reach_B], dim=1)
        sigma_e_B, sigma_star_B = preference.draw_sigmas(u_B2, denoise_B, band.low, band.high, rule.reach)

        def words(choices: Sequence[str], purpose: str) -> list[str]:
            chosen = [choices[int(uniform(key, purpose) * len(choices))] for key in keys]
            return [worded(word, caption) for word, caption in zip(chosen, batch.captions, strict=True)]

        return _Picked(denoise_B, sigma_e_B, sigma_star_B, words(rule.positive, "positive word"),
                       words(rule.negative, "negative word"))

    def _judge(self, embeddings: Mapping[str, Tensor], picked: _Picked) -> dict[str, Preference]:
        rule, whole = self.rule, self.rule.whole
        k_B = torch.where(
            picked.denoise_B,
            preference.discount(picked.sigma_star_B, whole.low, whole.high, *rule.discount_denoise),
            preference.discount(picked.sigma_star_B, whole.low, whole.high, *rule.discount_inversion),
        )
        found = {}
        for name, image_BD in embeddings.items():
            reward = self.judges.rewards[name]
            positive, negative = (reward.text(texts).detach() for texts in (picked.positive, picked.negative))
            found[name] = preference.relative_preference(
                image_BD, positive, negative, k_B.to(image_BD.device), picked.denoise_B.to(image_BD.device))
        return found

    def _figures(self, noise_expert: NoiseExpert, seen: Mapping[str, Preference], picked: _Picked) -> dict[str, Tensor]:
        """Cosines with P and N and their difference: over all, by reward, by branch, and by branch and sigma."""
        weights = self.judges.weights
        parts = {name: {"positive": one.positive_B.detach(), "negative": one.negative_B.detach(),
                        "margin": one.margin_B.detach()} for name, one in seen.items()}
        figures = {f"reward/{kind}": preference.weighted({n: own[kind] for n, own in parts.items()}, weights)
                   for kind in ("positive", "negative", "margin")}
        if len(parts) > 1:
            figures |= {f"reward/{name}/{kind}": value for name, own in parts.items() for kind, value in own.items()}
        band, bins = self.rule.interval[noise_expert], self.rule.bins
        width = (band.high - band.low) / bins
        branches, sigmas = picked.denoise_B.tolist(), picked.sigma_star_B.tolist()
        for row, (denoise, sigma) in enumerate(zip(branches, sigmas, strict=True)):
            branch = "denoise" if denoise else "inversion"
            low = band.low + bin_of(sigma, band, bins) * width
            place = f"{branch}/{low:.3f}-{low + width:.3f}"
            for name in ("positive", "negative", "margin"):
                value = figures[f"reward/{name}"][row : row + 1]
                for tag in (branch, place):
                    key = f"reward_by_branch/{tag}/{name}"
                    figures[key] = torch.cat([figures[key], value]) if key in figures else value
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none."""

    def save(self, folder: Path, step: int) -> list[Path]:
        return self._save(folder, step)


def worded(word: str, caption: str) -> str:
    """What the reward reads: the control word before the caption."""
    return f"{word}. {caption}" if word else caption
