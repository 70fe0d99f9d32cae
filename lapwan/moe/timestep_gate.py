"""The timestep gate w(σ): the learned strength of the experts at each noise level, one curve per noise expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TimestepGate(nn.Module):
    """w(σ) = Σ_k φ_k(σ)·softplus(v_k), with φ the hat functions over evenly spaced knots on the band [low, high].

    Piecewise linear, positive, constant beyond the ends. Starts at `at_low` at the low end of sigma and at `at_high`
    at the high end: stronger late in sampling, where detail such as an instrument's head is formed.

    Args:
        low: lower end of the band, a sigma.
        high: upper end.
        knots: their number, at least 2.
        at_low: initial strength at `low`, above 0.
        at_high: initial strength at `high`, above 0.

    Raises:
        ValueError: arguments out of these ranges.
    """

    def __init__(
        self, low: float, high: float, knots: int = 8, at_low: float = 1.0, at_high: float = 0.5
    ) -> None:
        super().__init__()
        if not (low < high and knots >= 2 and at_low > 0 and at_high > 0):
            raise ValueError("a timestep gate needs low < high, at least 2 knots and positive strengths")
        self.low, self.high, self.knots = low, high, knots
        start = torch.linspace(at_low, at_high, knots)
        self.values_K = nn.Parameter(start.expm1().log())  # softplus⁻¹

    def forward(self, sigma_B: Tensor) -> Tensor:
        """[B] sigmas -> [B] strengths."""
        strength_K = F.softplus(self.values_K)
        position_B = (sigma_B.to(strength_K) - self.low) / (self.high - self.low) * (self.knots - 1)
        position_B = position_B.clamp(0, self.knots - 1)
        left_B = position_B.floor().clamp_max(self.knots - 2).long()
        return torch.lerp(strength_K[left_B], strength_K[left_B + 1], position_B - left_B)
