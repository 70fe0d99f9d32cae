"""Loss weights by sigma that make sense for flow matching, each with mean 1 over the draws it is used with.

With v̂ − v the error of the velocity, the error of the clean latents is x̂0 − x0 = −σ·(v̂ − v), and the signal-to-noise
ratio of x_σ is SNR = ((1 − σ)/σ)². The mean of 1 keeps losses and learning rates comparable between weightings.
How to add one: a case in `Weighting.raw`, a member of `WeightingKind`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lapwan.losses.sigmas import SigmaSampler, draw_in_band

WeightingKind = Literal["none", "x0", "min_snr", "cosmap"]
_GRID = 4096  # draws over which the mean is taken


@dataclass(frozen=True)
class Weighting:
    """Which weight; `gamma` is min_snr's cap."""

    kind: WeightingKind = "none"
    gamma: float = 5.0

    def raw(self, sigma_B: Tensor) -> Tensor:
        """The weight of ‖v̂ − v‖² before it is brought to mean 1.

        none: 1. x0: σ², which is the loss of the clean latents. min_snr: σ²·min(SNR, γ), the same with its weight
        capped (Hang et al., arXiv 2303.09556). cosmap: 2 / (π·(1 − 2σ + 2σ²)) (Esser et al., arXiv 2403.03206).
        """
        match self.kind:
            case "none":
                return torch.ones_like(sigma_B)
            case "x0":
                return sigma_B.square()
            case "min_snr":
                return torch.minimum((1 - sigma_B).square(), self.gamma * sigma_B.square())
            case "cosmap":
                return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B.square()))

    def over(self, sampler: SigmaSampler, low: float, high: float) -> float:
        """What brings the mean over the sampler's draws in [low, high] to 1."""
        if self.kind == "none":
            return 1.0
        u = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
        return 1.0 / float(self.raw(draw_in_band(sampler, u, low, high)).mean())
