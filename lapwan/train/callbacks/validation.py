"""Loss on held-out clips at fixed noise: the same clips, sigmas and noise at every look, without dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lapwan import rng
from lapwan.caching.batch import Batch
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.train import TrainSettings
from lapwan.train.callbacks.base import CallbackResult
from lapwan.train.clip_store import ClipStore
from lapwan.train.objective import Draws, Key, Objective, SigmaRule


def held_out(index: CacheIndex, settings: TrainSettings) -> list[CachedItem]:
    """The clips to validate on, spread evenly over the split.

    Raises:
        UserError: the split is empty, or is trained on.
    """
    wanted = settings.validation
    items = [item for item in index.items if item.split == wanted.split]
    if not items:
        splits = ", ".join(sorted({str(item.split) for item in index.items}))
        raise UserError(f"validation.every is set, but {index.folder} has no clips of split '{wanted.split}' (it has: "
                        f"{splits}); hold some out with \"split\": \"{wanted.split}\" in the clips file")
    if settings.data.split in (None, wanted.split):
        raise UserError(f"data.split = {settings.data.split!r} trains on the clips of split '{wanted.split}' that are "
                        "held out for validation; set data.split = \"train\"")
    step = max(1, len(items) // wanted.clips)
    return items[::step][: wanted.clips]


def fixed_draws(rule: SigmaRule, batch: Batch, u: Sequence[float], key: Key, place: int) -> Draws:
    """Sigma at given u in 0..1, noise keyed by (*key, clip, place): the same at every look and for every adapter, in
    whatever batch. No dropout, and no weight on the loss."""
    shape, device = batch.latents_BCTHW.shape[1:], batch.latents_BCTHW.device
    noise = torch.stack([torch.randn(shape, generator=rng.generator(*key, clip, place)) for clip in batch.ids])
    sigma_B = rule.sigmas(torch.tensor(u, dtype=torch.float64), (shape[-2], shape[-1]))
    return Draws(sigma_B.to(device), noise.to(device), torch.zeros(len(u), dtype=torch.bool),
                 torch.ones_like(sigma_B).to(device))


class Validation:
    """A watcher: the mean flow loss of every noise expert over clips and sigmas, and by sigma."""

    def __init__(
        self, objective: Objective, rules: Mapping[NoiseExpert, SigmaRule], store: ClipStore, every: int, sigmas: int,
        seed: int, before_turn: Callable[[NoiseExpert], None] = lambda noise_expert: None,
    ) -> None:
        self.every, self._before_turn = every, before_turn
        self._objective, self._rules, self._store, self._seed = objective, rules, store, seed
        self._u = [(i + 0.5) / sigmas for i in range(sigmas)]

    def look(self, step: int, board: Any) -> CallbackResult:
        figures: dict[str, float] = {}
        for noise_expert in self._rules:
            self._before_turn(noise_expert)
            for name, value in self.losses(noise_expert).items():
                figures[f"validation/{noise_expert.value}/{name}"] = value
        means = [figures[f"validation/{noise_expert.value}/loss"] for noise_expert in self._rules]
        return CallbackResult({**figures, "validation/mean": sum(means) / len(means)})

    @torch.no_grad()
    def losses(self, noise_expert: NoiseExpert) -> dict[str, float]:
        """`loss`, `loss_at_sigma_0.912` and so on, and the means of the objective's own metrics."""
        sums: dict[str, list[Tensor]] = {}
        for index in range(len(self._store.items)):
            batch = self._store.batch([index])
            for place, u in enumerate(self._u):
                draws = fixed_draws(self._rules[noise_expert], batch, [u], (self._seed, "validation"), place)
                with self._objective.loss(noise_expert, batch, draws) as loss:
                    own = {n: values for n, values in loss.figures.items() if n.startswith("metrics/")}
                    flow_B = loss.figures["loss/diffusion"]
                own |= {"loss": flow_B, f"loss_at_sigma_{float(draws.sigma_B[0]):.3f}": flow_B}
                for name, values in own.items():
                    sums.setdefault(name, []).append(values)
        joined = {name: torch.cat(values) for name, values in sums.items()}
        return {name: float(values.mean()) for name, values in joined.items() if values.numel()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none: every look is the same."""


def labelled(items: Sequence[CachedItem]) -> bool:
    """Whether every clip has a label."""
    return all(item.label_weights is not None or item.label is not None for item in items)
