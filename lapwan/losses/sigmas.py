"""Sigma samplers (timestep sampling) by inverse CDF, restricted to a noise expert's band; loss weighting by sigma.

A sampler maps u ~ U(0, 1) to sigma. Truncation to [a, b] draws u' = F(a) + u·(F(b) − F(a)) and returns F⁻¹(u'): the
distribution conditioned on the band, without rejected draws. `Squeezed` instead maps the whole distribution linearly
onto the band.

How to add a sampler: a frozen dataclass with `cdf`, `inverse`, `for_tokens`; its name in `SigmaSettings.sampler`
(settings/sigma.py), and a case in `sigma_rule` (train/recipe.py).
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
        """F⁻¹(u), in fp64.

        Args:
            u_B: [B] uniform in [0, 1], fp64.
        """

    def for_tokens(self, tokens: int) -> SigmaSampler:
        """The sampler for clips of `tokens` tokens per frame; itself if it does not depend on the size."""


class _SizeIndependent:
    """A sampler that does not depend on the clip's size."""

    def for_tokens(self, tokens: int) -> Self:
        return self


@dataclass(frozen=True)
class Uniform(_SizeIndependent):
    """sigma ~ U(0, 1)."""

    def cdf(self, sigma: float) -> float:
        return sigma

    def inverse(self, u_B: Tensor) -> Tensor:
        return u_B


@dataclass(frozen=True)
class LogitNormal(_SizeIndependent):
    """sigma = sigmoid(mean + std·z), z ~ N(0, 1). Source: Esser et al., SD3 (arXiv 2403.03206).

    Args:
        mean: of the normal; above 0: more noise.
        std: of the normal, above 0.
    """

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
    """sigma' = s·sigma / (1 + (s − 1)·sigma) of the inner sampler's sigma: more draws near pure noise for s > 1.

    Source: Esser et al., SD3 (arXiv 2403.03206).

    Args:
        inner: the distribution before the shift.
        shift: s, above 0.
    """

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

    Source: Flux's schedule, `calculate_shift` in diffusers.
    """
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


@dataclass(frozen=True)
class ShiftedBySize:
    """`Shifted` with a shift by the clip's size: larger clips are trained at more noise."""

    inner: SigmaSampler

    def cdf(self, sigma: float) -> float:
        raise TypeError("a shift by size needs the clip's size: call for_tokens first")

    def inverse(self, u_B: Tensor) -> Tensor:
        raise TypeError("a shift by size needs the clip's size: call for_tokens first")

    def for_tokens(self, tokens: int) -> SigmaSampler:
        return Shifted(self.inner.for_tokens(tokens), shift_for_tokens(tokens))


@dataclass(frozen=True)
class Squeezed:
    """sigma' = low + (high − low)·sigma of the inner sampler's sigma: the whole distribution squeezed into the band.

    Args:
        inner: the distribution over [0, 1].
        low: lower end of the band.
        high: upper end of the band.
    """

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
    """u moved into the stratum of visit `number`: (order[number mod K] + u) / K. K successive visits cover [0, 1].

    Args:
        u: uniform in [0, 1).
        number: number of this visit, counted from 0.
        strata: K, at least 1.
        order: a permutation of 0 … K − 1.
    """
    return (order[number % strata] + u) / strata


def draw_in_band(sampler: SigmaSampler, u_B: Tensor, low: float, high: float) -> Tensor:
    """Map u ~ U(0, 1) to the sampler's sigma conditioned on [low, high]: [B] fp64.

    Args:
        sampler: the untruncated distribution.
        u_B: uniform in [0, 1).
        low, high: the band.

    Raises:
        ValueError: the sampler gives the band no probability.
    """
    first, last = sampler.cdf(low), sampler.cdf(high)
    if not last > first:
        raise ValueError(f"{sampler} never draws a sigma in [{low:g}, {high:g}]")
    u = first + u_B.double() * (last - first)
    # The clamp removes rounding only: a sigma just outside the band belongs to the other noise expert.
    return sampler.inverse(u).clamp(low, high)


def band_probability(sampler: SigmaSampler, low: float, high: float) -> float:
    """Probability of [low, high] under the untruncated sampler.

    Args:
        sampler: the untruncated distribution.
        low, high: ends of the interval, in [0, 1].
    """
    return sampler.cdf(high) - sampler.cdf(low)


def bin_probabilities(sampler: SigmaSampler, low: float, high: float, bins: int) -> list[float]:
    """Probability of each of `bins` equal parts of [low, high], conditioned on the band; they sum to 1.

    Args:
        sampler: the untruncated distribution.
        low, high: the band.
        bins: number of equal parts.
    """
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    total = band_probability(sampler, low, high)
    return [band_probability(sampler, a, b) / total for a, b in pairwise(edges)]


WeightingKind = Literal["none", "x0", "min_snr", "cosmap"]
_GRID = 4096  # draws in the mean of `Weighting.normalizer`


@dataclass(frozen=True)
class Weighting:
    """A loss weighting by sigma; `gamma` is the cap of min_snr."""

    kind: WeightingKind = "none"
    gamma: float = 5.0

    def raw(self, sigma_B: Tensor) -> Tensor:
        """The weight of ‖v̂ − v‖² before it is normalised to mean 1.

        none: 1. x0: σ², the loss on x0. min_snr: σ²·min(SNR, γ) (Hang et al., arXiv 2303.09556). cosmap:
        2 / (π·(1 − 2σ + 2σ²)) (Esser et al., arXiv 2403.03206).
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
        """1 / mean of the raw weight over the sampler's draws in [low, high].

        Args:
            sampler: the untruncated distribution.
            low, high: the band.
        """
        if self.kind == "none":
            return 1.0
        u = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
        return 1.0 / float(self.raw(draw_in_band(sampler, u, low, high)).mean())
