"""Looking at held-out prompts: sampled from the same noise again and again, judged, shown; and when to end early.

    margin = ⟨e, ē_P⟩ − ⟨e, ē_N⟩,   ē_P the mean embedding of "word. caption" over the positive words, ē_N the negative
    KL proxy = mean ‖v̂ − v̂_base‖² / 2 at fixed points x_σ of the base's own samples: the divergence from the base of a
    Gaussian step of unit variance, 0 only where nothing has changed

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
from lapwan.caching.batch import Batch
from lapwan.losses import flow
from lapwan.losses.preference import weighted
from lapwan.names import NoiseExpert
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.generator import to_frames
from lapwan.sampling.result import Video
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.callbacks.base import CallbackResult
from lapwan.train.checkpoint import checkpoints
from lapwan.train.metrics import Metrics
from lapwan.train.parallel import whole
from lapwan.train.srpo.objective import SrpoObjective, worded
from lapwan.train.srpo.rollout import Rollout
from lapwan.train.trainer import Trainer
from lapwan.wan.vae import decode

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_COLUMNS = 6  # frames shown in TensorBoard
_COMPARED = 4  # prompts whose velocities are compared with the base's
_KINDS = ("positive", "negative", "margin", "caption")


@dataclass(frozen=True)
class HeldOutRule:
    """Steps between looks, how many prompts are shown, when to end (None: never), the latents' shape, frames a second.
    """

    every: int
    shown: int
    patience: int | None
    shape: tuple[int, int, int, int]
    fps: int
    at_once: int = 1


class HeldOut:
    """A watcher: held-out reward, distance from the base, pictures in `previews/` and TensorBoard, an early end."""

    def __init__(
        self, objective: SrpoObjective, rollout: Rollout, batches: Sequence[Batch], vae: AutoencoderKLWan,
        rule: HeldOutRule, folder: Path, seed: int, fetch: Callable[[NoiseExpert], None],
    ) -> None:
        self.every = rule.every
        self._objective, self._rollout, self._batches, self._vae = objective, rollout, list(batches), vae
        self._rule, self._folder, self._seed, self._fetch = rule, folder, seed, fetch
        self._base: dict[str, list[float]] = {}
        self._points: dict[str, dict[str, Tensor]] = {}  # by noise expert: x, sigma, and the base's velocity there
        self._best: tuple[float, int] | None = None
        self._worse_in_a_row = 0

    @torch.no_grad()
    def begin(self, board: Any) -> None:
        """Before the first step: what the base makes of the prompts, and its velocities to compare with."""
        console.log(f"sampling {len(self._batches)} held-out prompts from the base")
        latents = self._sample()
        self._base = self._scores(latents)
        self._show(latents, 0, board)
        for noise_expert in self._objective.trained:
            self._fetch(noise_expert)
            x0, noise = torch.cat(latents[:_COMPARED]), torch.cat([self._noise(b) for b in self._batches[:_COMPARED]])
            band = self._objective.rule.interval[noise_expert]
            sigma_B = torch.full((len(x0),), (band.low + band.high) / 2, dtype=torch.float64, device=x0.device)
            x = flow.noised(x0, noise, sigma_B)
            self._points[noise_expert.value] = {"x": x, "sigma": sigma_B, "v": self._velocity(noise_expert, x, sigma_B)}

    @torch.no_grad()
    def look(self, step: int, board: Any) -> CallbackResult:
        latents = self._sample()
        scores = self._scores(latents)
        self._show(latents, step, board)
        figures = {f"held_out/{kind}": float(np.mean(scores[kind])) for kind in scores}
        if self._base:
            rise = np.subtract(scores["margin"], self._base["margin"])
            figures["held_out/margin_over_base"] = float(rise.mean())
        for noise_expert in self._objective.trained:
            if point := self._points.get(noise_expert.value):
                self._fetch(noise_expert)
                v = self._velocity(noise_expert, point["x"], point["sigma"])
                figures[f"held_out/{noise_expert.value}/kl_proxy"] = float((v - point["v"]).square().mean() / 2)
        margin = figures["held_out/margin"]
        return CallbackResult(figures, finished=self._judge(margin, step), score=-margin)

    @torch.no_grad()
    def scores(self) -> dict[str, list[float]]:
        """Every held-out prompt's figures with the weights as they are, in the prompts' order."""
        return self._scores(self._sample())

    @property
    def base_scores(self) -> dict[str, list[float]]:
        """The same of the base, once `begin` has looked."""
        return self._base

    def _judge(self, margin: float, step: int) -> str | None:
        """Why to end now, if the margin has not risen often enough."""
        if self._best is None or margin > self._best[0]:
            self._best, self._worse_in_a_row = (margin, step), 0
            return None
        self._worse_in_a_row += 1
        patience = self._rule.patience
        if patience is None or self._worse_in_a_row < patience:
            return None
        return (f"the held-out margin has not risen for {self._worse_in_a_row} looks: {margin:.4f} now, best "
                f"{self._best[0]:.4f} at step {self._best[1]}")

    def _noise(self, batch: Batch) -> Tensor:
        draws = [torch.randn(self._rule.shape, generator=rng.generator(self._seed, "held out noise", own))
                 for own in batch.ids]
        return torch.stack(draws).to(batch.latents_BCTHW.device)

    def _sample(self) -> list[Tensor]:
        """x0 of every prompt, a few at a time."""
        groups = [self._batches[i : i + self._rule.at_once] for i in range(0, len(self._batches), self._rule.at_once)]
        noise = [torch.cat([self._noise(batch) for batch in group]) for group in groups]
        conditions = []
        for group in groups:
            images = [batch.condition_BCTHW for batch in group if batch.condition_BCTHW is not None]
            text = [one for batch in group for one in batch.text]
            conditions.append(self._rollout.conditions(text, torch.cat(images) if images else None))
        with console.progress("held-out prompts", len(groups), "batch"):
            found = self._rollout.sample(noise, conditions)
        return [x.unsqueeze(0) for batch in found for x in batch]

    def _velocity(self, noise_expert: NoiseExpert, x_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        batches = self._batches[: len(x_BCTHW)]
        rows = []
        for row, batch in enumerate(batches):
            one = slice(row, row + 1)
            rows.append(self._objective.velocity(
                noise_expert, x_BCTHW[one], sigma_B[one], batch.text, batch.condition_BCTHW))
        return torch.cat(rows)

    def _scores(self, latents: Sequence[Tensor]) -> dict[str, list[float]]:
        """Each prompt's cosines, over rewards by weight: with P, with N, their difference, and with the caption alone.
        """
        found: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        for x0, batch in zip(latents, self._batches, strict=True):
            for kind, value in self._score(x0, batch.captions[0]).items():
                found[kind].append(float(value))
        return found

    def _score(self, x0_BCTHW: Tensor, caption: str) -> Mapping[str, Tensor]:
        judges, rule = self._objective.judges, self._objective.rule
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in _KINDS}
        for name, image_BD in judges.embed(x0_BCTHW).items():
            reward = judges.rewards[name]

            def cosine(words: Sequence[str], image_BD: Tensor = image_BD, reward: Any = reward) -> Tensor:
                texts = torch.cat([reward.text([worded(word, caption)]) for word in words]).to(image_BD)
                return image_BD @ texts.mean(dim=0)

            parts["positive"][name], parts["negative"][name] = cosine(rule.positive), cosine(rule.negative)
            parts["margin"][name] = parts["positive"][name] - parts["negative"][name]
            parts["caption"][name] = cosine(("",))
        return {kind: weighted(values, judges.weights) for kind, values in parts.items()}

    def _show(self, latents: Sequence[Tensor], step: int, board: Any) -> None:
        """Pictures of the first prompts; in processes that have no board nothing is written."""
        for index, x0 in enumerate(latents[: self._rule.shown]):
            frames = to_frames(decode(self._vae, x0))
            if board is None:
                continue
            suffix = "png" if len(frames) == 1 else "mp4"
            video = Video(frames, self._rule.fps, x0.cpu())
            video.save(self._folder / f"step_{step:06d}_{index}.{suffix}", overwrite=True)
            strip = np.asarray(contact_sheet([frames], _COLUMNS))
            board.add_image(f"held_out/{index}", strip, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        points = {noise_expert: {name: value.cpu() for name, value in own.items()} for noise_expert, own in self._points.items()}
        return {"base": self._base, "points": points, "best": self._best, "worse": self._worse_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self._batches[0].latents_BCTHW.device
        self._base, self._best, self._worse_in_a_row = dict(state["base"]), state["best"], state["worse"]
        self._points = {
            noise_expert: {name: value.to(device) for name, value in own.items()} for noise_expert, own in state["points"].items()
        }


class FullWeightFigures:
    """A watcher of a full fine-tune: how far the weights have gone, ‖W − W_0‖ and its share of ‖W_0‖."""

    def __init__(self, objective: SrpoObjective, load_base: Callable[[NoiseExpert], Any], every: int) -> None:
        self.every = every
        self._objective, self._load_base = objective, load_base

    @torch.no_grad()
    def look(self, step: int, board: Any) -> CallbackResult:
        figures: dict[str, float] = {}
        for noise_expert, one in self._objective.trained.items():
            base = dict(self._load_base(noise_expert).named_parameters())
            moved, size = 0.0, 0.0
            for name, parameter in one.parameters.items():
                start = base[name].double()
                moved += float((whole(parameter).detach().to("cpu").double() - start).square().sum())
                size += float(start.square().sum())
            figures[f"weights/{noise_expert.value}/delta_norm"] = moved**0.5
            figures[f"weights/{noise_expert.value}/delta_share"] = (moved / max(size, 1e-30)) ** 0.5
        return CallbackResult(figures)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none."""


def begin(trainer: Trainer, settings: SrpoSettings) -> None:
    """A new run first looks at what the base makes of the held-out prompts; a resumed one has it in its state."""
    callback = trainer.callbacks.get("held_out")
    if not isinstance(callback, HeldOut) or (settings.resume and checkpoints(settings.output)):
        return
    if not trainer.plan.distributed.first:
        callback.begin(None)
        return
    metrics = Metrics(settings.output, 0)
    try:
        callback.begin(metrics.board)
    finally:
        metrics.close()
