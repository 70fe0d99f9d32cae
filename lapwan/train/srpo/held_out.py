"""Held-out prompts: sampled from fixed noise every few steps, scored by the rewards, shown; early stopping.

    margin = ⟨e, ē_P⟩ − ⟨e, ē_N⟩,   ē_P the mean embedding of "word. caption" over the positive words, ē_N the negative
    KL proxy = mean ‖v̂ − v̂_base‖² / 2 at fixed points x_σ of the base's own samples: the divergence from the base of a
    Gaussian step of unit variance; 0 only if nothing has changed

Shapes: B prompts, D of an embedding, C latent channels, T latent frames, H, W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lapwan import console, rng
from lapwan.caching.collate import Batch
from lapwan.losses import flow
from lapwan.losses.preference import weighted_mean
from lapwan.names import NoiseExpert
from lapwan.sampling.result import Video
from lapwan.train.callbacks.base import Callback, Evaluation
from lapwan.train.callbacks.previews import save_sample
from lapwan.train.parallel import full_tensors
from lapwan.train.run_state import SavedState, Steps
from lapwan.train.srpo.objective import SrpoObjective, augment_prompt
from lapwan.train.srpo.rollout import Rollout
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.vae import decode, to_frames

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_BELOW_BASE = 3  # evaluations in a row below the base, from which it is named
_KL_PROMPTS = 4  # prompts whose velocities are compared with the base's
_SCORES = ("positive", "negative", "margin", "caption")


@dataclass(frozen=True)
class HeldOutRule:
    """How held-out prompts are evaluated.

    Args:
        every: steps between evaluations.
        shown: prompts whose samples are saved as pictures.
        patience: evaluations without a better margin before the run ends; None: it never ends early.
        shape: of a sample's latents, [C, T, H, W].
        batch_size: prompts sampled together.
    """

    every: int
    shown: int
    patience: int | None
    shape: tuple[int, int, int, int]
    fps: int
    batch_size: int = 1


class _HeldOutState(SavedState):
    base: dict[str, list[float]]
    points: dict[str, dict[str, Tensor]]
    best: tuple[float, Steps] | None
    worse: Steps


class HeldOut(Callback):
    """Held-out reward, distance from the base, samples in `previews/` and TensorBoard; it may end the run early."""

    name = "held_out"
    state_type = _HeldOutState

    def __init__(
        self, objective: SrpoObjective, rollout: Rollout, batches: Sequence[Batch], vae: AutoencoderKLWan,
        rule: HeldOutRule, folder: Path, seed: int, onload: Callable[[NoiseExpert], None],
        on_all_processes: bool = False,
    ) -> None:
        self.every, self.on_all_processes = rule.every, on_all_processes
        self._objective, self._rollout, self._batches, self._vae = objective, rollout, list(batches), vae
        self._rule, self._folder, self._seed, self._onload = rule, folder, seed, onload
        self._base: dict[str, list[float]] = {}
        self._points: dict[str, dict[str, Tensor]] = {}  # by noise expert: x, sigma, and the base's velocity there
        self._best: tuple[float, int] | None = None
        self._evaluations_since_best = 0
        self._below_base = 0

    @torch.no_grad()
    def on_start(self, board: Any) -> None:
        """Sample and score the base, and store its velocities for the KL proxy; a resumed run has them in its state."""
        if self._base:
            return
        console.log(f"sampling {len(self._batches)} held-out prompts from the base")
        latents = self._sample()
        self._base = self._scores(latents)
        self._show(latents, 0, board)
        for noise_expert in self._objective.trained:
            self._onload(noise_expert)
            x0 = torch.cat(latents[:_KL_PROMPTS])
            noise = torch.cat([self._noise(batch) for batch in self._batches[:_KL_PROMPTS]])
            band = self._objective.rule.interval[noise_expert]
            sigma_B = torch.full((len(x0),), (band.low + band.high) / 2, dtype=torch.float64, device=x0.device)
            x = flow.add_noise(x0, noise, sigma_B)
            self._points[noise_expert.value] = {"x": x, "sigma": sigma_B, "v": self._velocity(noise_expert, x, sigma_B)}

    @torch.no_grad()
    def on_step(self, step: int, board: Any) -> Evaluation:
        latents = self._sample()
        scores = self._scores(latents)
        self._show(latents, step, board)
        figures = {f"held_out/{kind}": float(np.mean(scores[kind])) for kind in scores}
        if self._base:
            gain = np.subtract(scores["margin"], self._base["margin"])
            figures["held_out/margin_over_base"] = float(gain.mean())
            self._count_below_base(float(gain.mean()), step)
        for noise_expert in self._objective.trained:
            if point := self._points.get(noise_expert.value):
                self._onload(noise_expert)
                v = self._velocity(noise_expert, point["x"], point["sigma"])
                figures[f"held_out/{noise_expert.value}/kl_proxy"] = float((v - point["v"]).square().mean() / 2)
        margin = figures["held_out/margin"]
        return Evaluation(figures, finished=self._early_stop(margin, step), score=-margin)

    def _count_below_base(self, gain: float, step: int) -> None:
        """Warn of a margin that stays below the base's: the reward has collapsed, or was never won."""
        self._below_base = 0 if gain >= 0 else self._below_base + 1  # not finite counts as below
        if self._below_base and not self._below_base % _BELOW_BASE:
            console.warn(f"step {step}: {self.lasting()}")

    def lasting(self) -> str | None:
        if self._below_base < _BELOW_BASE:
            return None
        return (f"the held-out margin has been below the base's for {self._below_base} evaluations in a row; lower the "
                "lr, or take an earlier checkpoint (keep_best)")

    @torch.no_grad()
    def scores(self) -> dict[str, list[float]]:
        """Scores of the current weights by kind, one per held-out prompt, in their order."""
        return self._scores(self._sample())

    def _early_stop(self, margin: float, step: int) -> str | None:
        """The reason to end the run, once the margin has not improved for `patience` evaluations."""
        if self._best is None or margin > self._best[0]:
            self._best, self._evaluations_since_best = (margin, step), 0
            return None
        self._evaluations_since_best += 1
        patience = self._rule.patience
        if patience is None or self._evaluations_since_best < patience:
            return None
        return (f"the held-out margin has not risen for {self._evaluations_since_best} evaluations: {margin:.4f} now, "
                f"best {self._best[0]:.4f} at step {self._best[1]}")

    def _noise(self, batch: Batch) -> Tensor:
        draws = [torch.randn(self._rule.shape, generator=rng.generator(self._seed, "held out noise", id_))
                 for id_ in batch.ids]
        return torch.stack(draws).to(batch.latents_BCTHW.device)

    def _sample(self) -> list[Tensor]:
        """x0 of every prompt, sampled in groups of `batch_size`."""
        size = self._rule.batch_size
        groups = [self._batches[i : i + size] for i in range(0, len(self._batches), size)]
        noise = [torch.cat([self._noise(batch) for batch in group]) for group in groups]
        conditions = []
        for group in groups:
            images = [batch.condition_BCTHW for batch in group if batch.condition_BCTHW is not None]
            text = [features for batch in group for features in batch.text]
            conditions.append(self._rollout.conditions(text, torch.cat(images) if images else None))
        with console.progress("held-out prompts", len(groups), "batch"):
            samples = self._rollout.sample(noise, conditions)
        return [x.unsqueeze(0) for batch in samples for x in batch]

    def _velocity(self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        batches = self._batches[: len(x_BCTHW)]
        rows = []
        for i, batch in enumerate(batches):
            row = slice(i, i + 1)
            rows.append(self._objective.velocity(
                noise_expert, x_BCTHW[row], sigma_B[row], batch.text, batch.condition_BCTHW))
        return torch.cat(rows)

    def _scores(self, latents: Sequence[Tensor]) -> dict[str, list[float]]:
        """Cosines of each prompt, averaged over rewards: with P, with N, P − N, and with the plain caption."""
        scores: dict[str, list[float]] = {kind: [] for kind in _SCORES}
        for x0, batch in zip(latents, self._batches, strict=True):
            for kind, value in self._score(x0, batch.captions[0]).items():
                scores[kind].append(float(value))
        return scores

    def _score(self, x0_BCTHW: Tensor, caption: str) -> Mapping[str, Tensor]:
        models, rule = self._objective.reward_models, self._objective.rule
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in _SCORES}
        for name, image_BD in models.embed(x0_BCTHW).items():
            reward = models.models[name]

            def cosine(words: Sequence[str], image_BD: Tensor = image_BD, reward: Any = reward) -> Tensor:
                texts = torch.cat([reward.text([augment_prompt(word, caption)]) for word in words]).to(image_BD)
                return image_BD @ texts.mean(dim=0)

            parts["positive"][name], parts["negative"][name] = cosine(rule.positive), cosine(rule.negative)
            parts["margin"][name] = parts["positive"][name] - parts["negative"][name]
            parts["caption"][name] = cosine(("",))
        return {kind: weighted_mean(values, models.weights) for kind, values in parts.items()}

    def _show(self, latents: Sequence[Tensor], step: int, board: Any) -> None:
        """Write the samples of the first prompts; processes without a board decode and write nothing."""
        for index, x0 in enumerate(latents[: self._rule.shown]):
            frames = to_frames(decode(self._vae, x0))
            if board is not None:
                video = Video(frames, self._rule.fps, x0.cpu())
                save_sample(video, self._folder, step, f"{index}", board, "held_out")

    def state_dict(self) -> dict[str, Any]:
        points = {e: {name: value.cpu() for name, value in tensors.items()} for e, tensors in self._points.items()}
        return {"base": self._base, "points": points, "best": self._best, "worse": self._evaluations_since_best}

    def load_state_dict(self, state: _HeldOutState) -> None:
        device = self._batches[0].latents_BCTHW.device
        if state.base and len(state.base.get("margin", ())) != len(self._batches):
            raise ValueError(f"margins of other than {len(self._batches)} held-out prompts")
        self._base, self._best, self._evaluations_since_best = state.base, state.best, state.worse
        self._points = {e: {name: value.to(device) for name, value in tensors.items()}
                        for e, tensors in state.points.items()}


class FullWeightFigures(Callback):
    """‖W − W_0‖, and ‖W − W_0‖ / ‖W_0‖, of a full fine-tune, by noise expert."""

    name = "weights"

    def __init__(
        self, objective: SrpoObjective, load_base: Callable[[NoiseExpert], WanBackbone], every: int,
        on_all_processes: bool,
    ) -> None:
        self.every, self.on_all_processes = every, on_all_processes
        self._objective, self._load_base = objective, load_base

    @torch.no_grad()
    def on_step(self, step: int, board: Any) -> Evaluation:
        figures: dict[str, float] = {}
        for noise_expert, trained in self._objective.trained.items():
            base = dict(self._load_base(noise_expert).transformer.named_parameters())
            delta, norm = 0.0, 0.0  # squared
            for name, parameter in trained.parameters.items():
                start = base[name].double()
                delta += float((full_tensors(parameter).detach().to("cpu").double() - start).square().sum())
                norm += float(start.square().sum())
            figures[f"weights/{noise_expert.value}/delta_norm"] = delta**0.5
            figures[f"weights/{noise_expert.value}/delta_share"] = (delta / max(norm, 1e-30)) ** 0.5
        return Evaluation(figures)
