"""Bootstrap intervals of means, and of paired differences between adapters on the same prompts and seeds.

    mean = Σ_ps m_ps·x_ps / Σ_ps m_ps,    resampled with weights u_p (and v_s): Σ u_p·v_s·m_ps·x_ps / Σ u_p·v_s·m_ps

u and v count how often a prompt (a seed) is drawn with replacement. Videos of one prompt are correlated, so whole
prompts are drawn, never single videos. `crossed` draws seeds as well: for training seeds, which all prompts share.
Shapes: P prompts, S seeds, R resamples. NaN marks a missing value.
Sources: Efron & Tibshirani, An Introduction to the Bootstrap, ch. 13 (percentile); Owen, The pigeonhole bootstrap
(arXiv 0712.1111) for two crossed factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES, LEVEL = 10_000, 0.95
_CHUNK = 1_000  # resamples at a time, to bound memory with many prompts


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` prompts with the ends of its interval, which are NaN for a single prompt."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, Any]:
        """`{"mean", "ci95", "n"}`; `ci95` is null without an interval."""
        interval = None if np.isnan(self.low) or np.isnan(self.high) else [self.low, self.high]
        return {"mean": None if np.isnan(self.mean) else self.mean, "ci95": interval, "n": self.n}


def bootstrap(
    values_PS: np.ndarray, crossed: bool = False, samples: int = SAMPLES, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """Mean and percentile interval.

    Args:
        values_PS: [P, S], or [P] for one seed.
        crossed: seeds are shared by all prompts (training seeds) and are resampled too; otherwise a prompt's seeds are
            repetitions that stay with it.

    Raises:
        ValueError: an array of neither one nor two dimensions.
    """
    values_PS = np.asarray(values_PS, dtype=np.float64)
    if values_PS.ndim == 1:
        values_PS = values_PS[:, None]
    if values_PS.ndim != 2:
        raise ValueError(f"values of {values_PS.ndim} dimensions; expected [prompts] or [prompts, seeds]")
    values_PS = values_PS[~np.isnan(values_PS).all(axis=1)]
    mask_PS = ~np.isnan(values_PS)
    prompts, seeds = values_PS.shape
    if not mask_PS.any():
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    filled_PS = np.where(mask_PS, values_PS, 0.0)
    mean = float(filled_PS.sum() / mask_PS.sum())
    if prompts < 2:
        return Estimate(mean, float("nan"), float("nan"), prompts)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, samples, _CHUNK):
        count = min(_CHUNK, samples - start)
        u_RP = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=count).astype(np.float64)
        v_RS = np.ones((count, seeds))
        if crossed and seeds > 1:
            v_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count).astype(np.float64)
        total_R = ((u_RP @ filled_PS) * v_RS).sum(axis=1)
        weight_R = ((u_RP @ mask_PS.astype(np.float64)) * v_RS).sum(axis=1)
        means.append(total_R[weight_R > 0] / weight_R[weight_R > 0])
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(mean, float(low), float(high), prompts)


def paired_bootstrap(
    a_PS: np.ndarray, b_PS: np.ndarray, crossed: bool = False, samples: int = SAMPLES, level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """`bootstrap` of a − b, pair by pair; pairs with a missing value are left out.

    Raises:
        ValueError: different shapes, so not the same prompts and seeds.
    """
    a_PS, b_PS = np.asarray(a_PS, dtype=np.float64), np.asarray(b_PS, dtype=np.float64)
    if a_PS.shape != b_PS.shape:
        raise ValueError(f"pairs need the same prompts and seeds, got {a_PS.shape} and {b_PS.shape}")
    return bootstrap(a_PS - b_PS, crossed, samples, level, seed)
