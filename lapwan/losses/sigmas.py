"""Sigma samplers as inverse distribution functions, restricted to a noise expert's band: no draw is ever wasted.

A sampler maps u ~ U(0, 1) to sigma. Truncation to [a, b] draws u' = F(a) + u·(F(b) − F(a)) and returns F⁻¹(u'): the
distribution itself, conditioned on the band. Squeezing (`Squeezed`) instead maps the whole distribution onto the band:
its shape is kept, its place is not. How to add a sampler: a frozen dataclass with `cdf`, `inverse`, `for_tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, Self

import torch
from torch import Tensor


class SigmaSampler(Protocol):
    """A distribution over sigma in [0, 1]."""

    def cdf(self, sigma: float) -> float:
        """F(sigma)."""

    def inverse(self, u_B: Tensor) -> Tensor:
        """F⁻¹(u), in fp64."""

    def for_tokens(self, tokens: int) -> SigmaSampler:
        """The sampler for clips of `tokens` tokens a frame; itself where the size does not matter."""


class _AnySize:
    """A sampler that does not look at the clip's size."""

    def for_tokens(self, tokens: int) -> Self:
        return self


@dataclass(frozen=True)
class Uniform(_AnySize):
    """sigma ~ U(0, 1)."""

    def cdf(self, sigma: float) -> float:
        return sigma

    def inverse(self, u_B: Tensor) -> Tensor:
        return u_B


@dataclass(frozen=True)
class LogitNormal(_AnySize):
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

    def for_tokens(self, tokens: int) -> SigmaSampler:
        return Shifted(self.inner.for_tokens(tokens), self.shift)


def shift_for_tokens(tokens: int) -> float:
    """s = exp(μ), μ linear in the tokens of a frame: 0.5 at 256 (256 x 256 pixels), 1.15 at 4096.

    Source: Flux's schedule, `calculate_shift` of diffusers.
    """
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


@dataclass(frozen=True)
class ShiftedBySize:
    """`Shifted` with the shift of the clip's own size, so larger clips are trained at more noise."""

    inner: SigmaSampler

    def cdf(self, sigma: float) -> float:
        raise TypeError("a shift by size needs the clip's size: call for_tokens first")

    def inverse(self, u_B: Tensor) -> Tensor:
        raise TypeError("a shift by size needs the clip's size: call for_tokens first")

    def for_tokens(self, tokens: int) -> SigmaSampler:
        return Shifted(self.inner.for_tokens(tokens), shift_for_tokens(tokens))


@dataclass(frozen=True)
class Squeezed:
    """sigma' = low + (high − low)·sigma of another sampler's sigma: the whole distribution, squeezed into the band."""

    inner: SigmaSampler
    low: float
    high: float

    def cdf(self, sigma: float) -> float:
        return self.inner.cdf(min(1.0, max(0.0, (sigma - self.low) / (self.high - self.low))))

    def inverse(self, u_B: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.inner.inverse(u_B)

    def for_tokens(self, tokens: int) -> SigmaSampler:
        return Squeezed(self.inner.for_tokens(tokens), self.low, self.high)


def stratified_u(u: float, number: int, strata: int, order: Sequence[int]) -> float:
    """u moved into the stratum of visit `number`: (order[number mod K] + u) / K. Any K visits in a row cover [0, 1]."""
    return (order[number % strata] + u) / strata


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


def band_probability(sampler: SigmaSampler, low: float, high: float) -> float:
    """The probability the untruncated sampler gives to [low, high]."""
    return sampler.cdf(high) - sampler.cdf(low)


def bin_probabilities(sampler: SigmaSampler, low: float, high: float, bins: int) -> list[float]:
    """The share of the draws in [low, high] that falls into each of `bins` equal parts of it; they sum to 1."""
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    whole = band_probability(sampler, low, high)
    return [band_probability(sampler, a, b) / whole for a, b in pairwise(edges)]

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

    def normalizer(self, sampler: SigmaSampler, low: float, high: float) -> float:
        """What brings the mean over the sampler's draws in [low, high] to 1."""
        if self.kind == "none":
            return 1.0
        u = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
        return 1.0 / float(self.raw(draw_in_band(sampler, u, low, high)).mean())
