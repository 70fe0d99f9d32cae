"""Validation loss on held-out clips, with the same clips, sigmas and noise at each evaluation and without dropout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lapwan import console, rng
from lapwan.caching.collate import Batch
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.data.clips import empty_split
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.rng import RandomKey
from lapwan.settings.train import TrainSettings
from lapwan.train.callbacks.base import REPEAT_EVERY, Callback, Evaluation
from lapwan.train.clip_store import ClipStore
from lapwan.train.objective import Draws, Objective, SigmaRule, draw_clean


def held_out(index: CacheIndex, settings: TrainSettings) -> list[CachedItem]:
    """The clips to validate on, at even distances in the split.

    Raises:
        UserError: the split is empty, or is trained on.
    """
    validation = settings.validation
    items = [item for item in index.items if item.split == validation.split]
    if not items:
        raise empty_split(f"validation.every is set, but {index.folder}", validation.split,
                          {item.split for item in index.items},
                          f"hold some out with \"split\": \"{validation.split}\" in the clips file")
    if settings.data.split in (None, validation.split):
        raise UserError(f"data.split = {settings.data.split!r} trains on the clips of split '{validation.split}' that "
                        "are held out for validation; set data.split = \"train\"")
    step = max(1, len(items) // validation.clips)
    return items[::step][: validation.clips]


def fixed_draws(
    rule: SigmaRule, batch: Batch, u: Sequence[float], key: RandomKey, index: int, first_frame: float = 0.0
) -> Draws:
    """Sigma at given u in 0..1, and noise keyed by (*key, clip, index); no dropout, and no weight on the loss.

    The same at each evaluation, for every adapter and in any batch.

    Args:
        first_frame: probability that a sample's first latent frame is given clean.
    """
    shape, device = batch.latents_BCTHW.shape[1:], batch.latents_BCTHW.device
    noise = torch.stack([torch.randn(shape, generator=rng.generator(*key, clip, index)) for clip in batch.ids])
    sigma_B = rule.sigmas(torch.tensor(u, dtype=torch.float64), (shape[-2], shape[-1]))
    return Draws(sigma_B.to(device), noise.to(device), torch.zeros(len(u), dtype=torch.bool),
                 torch.ones_like(sigma_B).to(device),
                 clean_B=draw_clean(batch, [(*key, clip, index) for clip in batch.ids], first_frame))


class Validation(Callback):
    """The mean flow loss of each noise expert over clips and sigmas, and by sigma.

    Args:
        onload: brings a noise expert to the device.
        first_frame: see `fixed_draws`.
    """

    name = "validation"

    def __init__(
        self, objective: Objective, sigma_rules: Mapping[NoiseExpert, SigmaRule], store: ClipStore, every: int,
        sigmas: int, seed: int, onload: Callable[[NoiseExpert], None] = lambda noise_expert: None,
        first_frame: float = 0.0,
    ) -> None:
        self.every, self._onload, self._first_frame = every, onload, first_frame
        self._objective, self._sigma_rules, self._store, self._seed = objective, sigma_rules, store, seed
        self._non_finite_in_a_row = 0
        self._u = [(i + 0.5) / sigmas for i in range(sigmas)]

    def on_step(self, step: int, board: Any) -> Evaluation:
        figures: dict[str, float] = {}
        for noise_expert in self._sigma_rules:
            self._onload(noise_expert)
            for name, value in self.losses(noise_expert).items():
                figures[f"validation/{noise_expert.value}/{name}"] = value
        means = [figures[f"validation/{noise_expert.value}/loss"] for noise_expert in self._sigma_rules]
        mean = sum(means) / len(means)
        self._non_finite_in_a_row = 0 if math.isfinite(mean) else self._non_finite_in_a_row + 1
        if not (self._non_finite_in_a_row - 1) % REPEAT_EVERY:
            console.warn(f"step {step}: the validation loss is not finite")
        return Evaluation({**figures, "validation/mean": mean}, score=mean)

    def lasting(self) -> str | None:
        count = self._non_finite_in_a_row
        return f"the validation loss was not finite, {count} times in a row" if count > 1 else None

    @torch.no_grad()
    def losses(self, noise_expert: NoiseExpert) -> dict[str, float]:
        """`loss`, `loss_at_sigma_0.912` and so on, and the means of the objective's own metrics."""
        values: dict[str, list[Tensor]] = {}
        for item in range(len(self._store.items)):
            batch = self._store.batch([item])
            for index, u in enumerate(self._u):
                draws = fixed_draws(self._sigma_rules[noise_expert], batch, [u], (self._seed, "validation"), index,
                                    self._first_frame)
                with self._objective.loss(noise_expert, batch, draws) as loss:
                    figures = {name: v_B for name, v_B in loss.figures.items() if name.startswith("metrics/")}
                    flow_B = loss.figures["loss/diffusion"]
                figures |= {"loss": flow_B, f"loss_at_sigma_{float(draws.sigma_B[0]):.3f}": flow_B}
                for name, values_B in figures.items():
                    values.setdefault(name, []).append(values_B)
        joined = {name: torch.cat(parts) for name, parts in values.items()}
        return {name: float(all_values.mean()) for name, all_values in joined.items() if all_values.numel()}


def labelled(items: Sequence[CachedItem]) -> bool:
    """Whether every clip has a label."""
    return all(item.label_weights is not None or item.label is not None for item in items)
