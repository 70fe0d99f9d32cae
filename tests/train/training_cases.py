"""What several training tests do to a trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lapwan.caching.collate import Batch
from lapwan.caching.index import CachedItem, write_index
from lapwan.caching.read import load_index
from lapwan.losses.sigmas import Uniform
from lapwan.names import NoiseExpert
from lapwan.train.objective import Draws, SigmaRule, make_draws
from lapwan.train.trainer import Trainer


def randomise(trainer: Trainer, scale: float = 0.05) -> None:
    """Give every up matrix random values: at B = 0 the gradients of A, router and timestep gate are exactly zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            if name.endswith(".up"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def draws_for(trainer: Trainer, noise_expert: NoiseExpert, batch: Batch) -> Draws:
    """Draws keyed by the clips' own ids."""
    keys = [(0, noise_expert.value, 0, clip) for clip in batch.ids]
    return make_draws(batch, keys, SigmaRule(Uniform(), trainer.data.streams[noise_expert].sigma_rule.band))


def backward(
    trainer: Trainer, noise_expert: NoiseExpert, indices: list[int], only: str | None = None
) -> dict[str, Tensor]:
    """Gradients by name after one loss on these clips; `only` keeps a single term of the loss."""
    for parameter in trainer.parameters.values():
        parameter.grad = None
    batch = trainer.data.load_batch(indices)
    draws = draws_for(trainer, noise_expert, batch)
    trainer.objective.prepare(noise_expert, [batch], draws=[draws])
    with trainer.objective.loss(noise_expert, batch, draws) as loss:
        total_B = loss.terms[only] if only else loss.total_B
        total_B.mean().backward()
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def edited_cache(source: Path, target: Path, edit: Callable[[list[CachedItem]], list[CachedItem]]) -> Path:
    """A copy of a cache with other items in its index."""
    shutil.copytree(source, target)
    index = load_index(target)
    write_index(replace(index, items=tuple(edit(list(index.items)))))
    return target
