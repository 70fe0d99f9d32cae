"""Max-norm regularisation: the norm of each low-rank update is kept at or below a limit while it is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lapwan.lora.attach import Adapter
from lapwan.names import NoiseExpert
from lapwan.train.callbacks.base import Callback, StepResult


@torch.no_grad()
def apply_max_norm(adapter: Adapter, limit: float) -> tuple[Tensor, Tensor]:
    """A, B ← √(limit / ‖ΔW‖_F)·(A, B) for every trained module with ‖ΔW‖_F > limit, after which ‖ΔW‖_F = limit.

    ‖(α/r)·BA‖²_F = (α/r)²·Σ (A Aᵀ) ∘ (Bᵀ B), in fp64. Nothing waits for the device.

    Returns:
        The number of modules that were scaled, and the largest norm before.
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
    norms_M = torch.stack(norms)
    return (norms_M > limit).sum(), norms_M.max()


class MaxNorm(Callback):
    """After every step of a noise expert, its modules are scaled back to the limit."""

    name = "max_norm"

    def __init__(self, adapters: Mapping[NoiseExpert, Adapter], limits: Mapping[NoiseExpert, float]) -> None:
        self._adapters, self._limits = adapters, limits

    def after_update(self, result: StepResult) -> dict[str, Tensor | float]:
        if (limit := self._limits.get(result.noise_expert)) is None:
            return {}
        scaled, largest = apply_max_norm(self._adapters[result.noise_expert], limit)
        return {"max_norm/scaled_modules": scaled, "max_norm/largest": largest}
