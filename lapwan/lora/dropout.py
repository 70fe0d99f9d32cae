"""LoRA dropout with keyed masks: the mask depends on the sample's key and the module, not on the order of draws.

Three kinds; kept values are scaled by 1 / (1 − p), so that the mean update is that without dropout. `neuron` drops
single values between A and B, per token; `rank` whole rows of A and `module` whole modules, per sample. A recomputed
forward (activation checkpointing) has the masks of the first. Shapes: B samples, N tokens, R trainable rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lapwan import rng
from lapwan.lora.layer import GateHolder, StackedLoraLinear
from lapwan.rng import RandomKey


@dataclass(frozen=True)
class DropoutRates:
    """Probabilities in [0, 1)."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    @property
    def any(self) -> bool:
        """True if any rate is above 0."""
        return max(self.neuron, self.rank, self.module) > 0


class Dropout:
    """Dropout masks of an adapter's layers.

    Args:
        rates: shares of neurons, ranks and modules to drop.
        layers: the adapter's layers by path; a mask depends on the path.
    """

    def __init__(self, rates: DropoutRates, layers: Mapping[str, StackedLoraLinear]) -> None:
        self.rates = rates
        self._paths = {id(layer): path for path, layer in layers.items()}

    @contextmanager
    def scope(self, holder: GateHolder, keys: Sequence[RandomKey]) -> Iterator[None]:
        """Apply dropout in every forward until the block ends; run backward inside. Without keys nothing is dropped.

        Args:
            holder: of the adapter's layers.
            keys: one per sample.
        """
        if not (self.rates.any and keys):
            yield
            return
        holder.mask = lambda layer, hidden: self._masked(layer, hidden, keys)
        try:
            yield
        finally:
            holder.mask = None

    def _masked(self, layer: StackedLoraLinear, hidden: Tensor, keys: Sequence[RandomKey]) -> Tensor:
        frozen, path = layer.frozen_down_RI.shape[0], self._paths[id(layer)]
        trainable = hidden[..., frozen:]
        factors = [self._factor(trainable[0], (*key, path)) for key in keys]
        masked = trainable * torch.stack(factors)
        return torch.cat([hidden[..., :frozen], masked], dim=-1) if frozen else masked

    def _factor(self, like_NR: Tensor, key: RandomKey) -> Tensor:
        """The factor on one sample's values, 0 or 1 / (1 − p): in the shape of `like_NR`."""
        rates, rows = self.rates, like_NR.shape[-1]
        factor = torch.ones(rows)
        if rates.module:
            factor = factor * _mask(torch.rand(1, generator=rng.generator(*key, "module dropout")), rates.module)
        if rates.rank:
            factor = factor * _mask(torch.rand(rows, generator=rng.generator(*key, "rank dropout")), rates.rank)
        factor = factor.view(*[1] * (like_NR.dim() - 1), rows).to(like_NR)
        if rates.neuron:
            # One number per token and row: drawn on the device, since a CPU would take longer than the step.
            generator = torch.Generator(like_NR.device).manual_seed(rng.seed_of(*key, "neuron dropout"))
            uniform = torch.rand(like_NR.shape, generator=generator, device=like_NR.device)
            factor = factor * _mask(uniform, rates.neuron).to(like_NR)
        return factor.expand(like_NR.shape)


def _mask(uniform: Tensor, rate: float) -> Tensor:
    return (uniform >= rate) / (1 - rate)
