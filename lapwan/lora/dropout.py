"""Dropout inside low-rank layers, by name instead of by order: the same visit of a clip always drops the same parts.

Three kinds, each scaling what it keeps by 1 / (1 − p), so that the mean update stays what it is without dropout:
`neuron` drops values between A and B, token by token; `rank` whole rows of A, `module` whole modules, clip by clip.
Keyed by (visit, module), a recomputed forward drops what the first one did. Shapes: B samples, R trained rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lapwan import rng
from lapwan.lora.layer import GateHolder, StackedLoraLinear

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class DropoutRates:
    """Probabilities in [0, 1)."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        """False if nothing is ever dropped."""
        return max(self.neuron, self.rank, self.module) > 0


class Dropout:
    """The masks of an adapter's layers."""

    def __init__(self, rates: DropoutRates, layers: Mapping[str, StackedLoraLinear]) -> None:
        self.rates = rates
        self._paths = {id(layer): path for path, layer in layers.items()}

    @contextmanager
    def scope(self, holder: GateHolder, keys: Sequence[Key]) -> Iterator[None]:
        """Drop in every forward until the block ends (backward goes inside); without keys nothing is dropped."""
        if not (self.rates.any and keys):
            yield
            return
        holder.mask = lambda layer, hidden: self._masked(layer, hidden, keys)
        try:
            yield
        finally:
            holder.mask = None

    def _masked(self, layer: StackedLoraLinear, hidden: Tensor, keys: Sequence[Key]) -> Tensor:
        frozen, path = layer.frozen_down_RI.shape[0], self._paths[id(layer)]
        trained = hidden[..., frozen:]
        factors = [self._factor(trained[0], (*key, path)) for key in keys]
        kept = trained * torch.stack(factors)
        return torch.cat([hidden[..., :frozen], kept], dim=-1) if frozen else kept

    def _factor(self, like_NR: Tensor, key: Key) -> Tensor:
        """What one sample's values are multiplied by, shaped to broadcast over its tokens."""
        rates, rows = self.rates, like_NR.shape[-1]
        factor = torch.ones(rows)
        if rates.module:
            factor = factor * _kept(torch.rand(1, generator=rng.generator(*key, "module dropout")), rates.module)
        if rates.rank:
            factor = factor * _kept(torch.rand(rows, generator=rng.generator(*key, "rank dropout")), rates.rank)
        factor = factor.view(*[1] * (like_NR.dim() - 1), rows).to(like_NR)
        if rates.neuron:
            # One number a token and row: drawn where it is used, since a CPU would take longer than the step.
            generator = torch.Generator(like_NR.device).manual_seed(rng.seed_of(*key, "neuron dropout"))
            drawn = torch.rand(like_NR.shape, generator=generator, device=like_NR.device)
            factor = factor * _kept(drawn, rates.neuron).to(like_NR)
        return factor.expand(like_NR.shape)


def _kept(drawn: Tensor, rate: float) -> Tensor:
    return (drawn >= rate) / (1 - rate)
