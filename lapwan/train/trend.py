"""Is a loss still falling? A straight line through losses made comparable between sigmas.

Each loss is divided by the mean of its sigma bin, so that 1 is usual, and time and loss are centred within their bin,
so that a run of low sigmas does not look like progress. Least squares of loss on step then gives the slope b with its
standard error: the relative decrease per 100 steps is −100·b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

_FEWEST = 20  # observations below which nothing is said


@dataclass(frozen=True)
class Observation:
    """One sample's loss, at the noise expert's own step, in a sigma bin."""

    step: int
    bin: int
    loss: float


@dataclass(frozen=True)
class Trend:
    """Relative decrease per 100 steps, its upper confidence bound, and how much of the scatter the line explains."""

    decrease: float
    upper: float
    r2: float
    count: int


def trend(seen: Sequence[Observation], confidence: float) -> Trend | None:
    """The trend of the losses; None with too few of them."""
    groups: dict[int, list[Observation]] = {}
    for one in seen:
        groups.setdefault(one.bin, []).append(one)
    times: list[float] = []
    values: list[float] = []
    for own in groups.values():
        mean_loss = math.fsum(o.loss for o in own) / len(own)
        mean_step = math.fsum(o.step for o in own) / len(own)
        if mean_loss > 0:
            times += [o.step - mean_step for o in own]
            values += [o.loss / mean_loss - 1 for o in own]
    freedom = len(values) - len(groups) - 1
    spread = math.fsum(t * t for t in times)
    if len(values) < _FEWEST or freedom < 1 or spread == 0:
        return None
    slope = math.fsum(t * v for t, v in zip(times, values, strict=True)) / spread
    residual = math.fsum((v - slope * t) ** 2 for t, v in zip(times, values, strict=True))
    total = math.fsum(v * v for v in values)
    error = math.sqrt(residual / freedom / spread)
    bound = -100 * slope + NormalDist().inv_cdf(confidence) * 100 * error
    return Trend(-100 * slope, bound, 1 - residual / total if total else 0.0, len(values))


def plain_slope(losses: Sequence[float]) -> tuple[float, float]:
    """(slope in loss units per step, R²) of raw losses in order: the figures other trainers decide by."""
    n = len(losses)
    if n < 2:
        return 0.0, 0.0
    middle, mean = (n - 1) / 2, math.fsum(losses) / n
    spread = math.fsum((i - middle) ** 2 for i in range(n))
    slope = math.fsum((i - middle) * loss for i, loss in enumerate(losses)) / spread
    total = math.fsum((loss - mean) ** 2 for loss in losses)
    return slope, slope * slope * spread / total if total else 0.0
