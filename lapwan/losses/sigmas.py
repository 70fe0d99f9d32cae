"""Sigma samplers as inverse distribution functions, truncated to a noise expert's band: no draw is ever wasted.

A sampler maps u ~ U(0, 1) to sigma. Truncation to [a, b] draws u' = F(a) + u·(F(b) − F(a)) and returns F⁻¹(u'): the
distribution itself, conditioned on the band. How to add a sampler: a subclass with `cdf` and `inverse`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class SigmaSampler(Protocol):
    """A distribution over sigma in [0, 1]."""

    def cdf(self, sigma: float) -> float:
        """F(sigma)."""

    def inverse(self, u_B: Tensor) -> Tensor:
        """F⁻¹(u), in fp64."""


@dataclass(frozen=True)
class Uniform:
    """sigma ~ U(0, 1)."""

    def cdf(self, sigma: float) -> float:
        return sigma

    def inverse(self, u_B: Tensor) -> Tensor:
        return u_B


@dataclass(frozen=True)
class LogitNormal:
    """sigma = sigmoid(mean + std·z), z ~ N(0, 1). Source: Esser et al., SD3 (arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, sigma: float) -> float:
        if sigma <= 0.0 or sigma >= 1.0:
            return float(sigma >= 1.0)
        z = (math.log(sigma / (1 - sigma)) - self.mean) / self.std
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    def inverse(self, u_B: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u_B))


@dataclass(frozen=True)
class Shifted:
    """sigma' = s·sigma / (1 + (s − 1)·sigma) of another sampler's sigma: more draws near pure noise for s > 1."""

    inner: SigmaSampler
    shift: float

    def cdf(self, sigma: float) -> float:
        return self.inner.cdf(sigma / (self.shift - (self.shift - 1) * sigma))

    def inverse(self, u_B: Tensor) -> Tensor:
        sigma = self.inner.inverse(u_B)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)


def draw_in_band(sampler: SigmaSampler, u_B: Tensor, low: float, high: float) -> Tensor:
    """Map u ~ U(0, 1) to the sampler's sigma conditioned on [low, high]: [B] fp64.

    Raises:
        ValueError: the sampler gives the band no probability.
    """
    first, last = sampler.cdf(low), sampler.cdf(high)
    if not last > first:
        raise ValueError(f"{sampler} never draws a sigma in [{low:g}, {high:g}]")
    u = first + u_B.double() * (last - first)
    # The clamp takes back rounding only: a sigma a hair outside would belong to the other noise expert.
    return sampler.inverse(u).clamp(low, high)


def share_of_band(sampler: SigmaSampler, low: float, high: float) -> float:
    """The probability the untruncated sampler gives to [low, high]."""
    return sampler.cdf(high) - sampler.cdf(low)
