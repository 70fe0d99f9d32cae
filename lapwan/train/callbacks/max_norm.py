"""Keep a low-rank update's norm within bounds while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lapwan.lora.attach import Adapter
from lapwan.names import NoiseExpert
from lapwan.train.callbacks.base import StepResult


@torch.no_grad()
def limit_norms(adapter: Adapter, limit: float) -> tuple[Tensor, Tensor]:
    """Scale A and B of every trained module with ‖ΔW‖_F > limit by √(limit / ‖ΔW‖_F) each, so that its norm is `limit`.

    ‖(α/r)·BA‖²_F = (α/r)²·Σ (A Aᵀ) ∘ (Bᵀ B), in fp64. Nothing waits for the device.

    Returns:
        How many modules were scaled, and the largest norm before.
    """
    norms = []
    for layer in adapter.layers.values():
        for group in layer.groups:
            if not group.trainable:
                continue
            down_RI, up_OR = layer.rows(group.column)
            a, b = down_RI.double(), up_OR.double()
            square = ((a @ a.T) * (b.T @ b)).sum().clamp_min(0)
            norm = square.sqrt() * (group.alpha / down_RI.shape[0])
            norms.append(norm)
            factor = (limit / norm.clamp_min(1e-30)).clamp_max(1.0).sqrt()
            down_RI.mul_(factor.to(down_RI.dtype))
            up_OR.mul_(factor.to(up_OR.dtype))
    joined = torch.stack(norms)
    return (joined > limit).sum(), joined.max()

class NormLimit:
    """A rule: after every step of a noise expert, its modules are scaled back to the bound."""

    needs_losses = False

    def __init__(self, adapters: Mapping[NoiseExpert, Adapter], limits: Mapping[NoiseExpert, float]) -> None:
        self._adapters, self._limits = adapters, limits

    def after_update(self, seen: StepResult) -> dict[str, Tensor | float]:
        if (limit := self._limits.get(seen.noise_expert)) is None:
            return {}
        scaled, largest = limit_norms(self._adapters[seen.noise_expert], limit)
        return {"max_norm/scaled_modules": scaled, "max_norm/largest": largest}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none: what it did is in the weights."""
