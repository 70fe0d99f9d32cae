"""Growth of a LoRA between checkpoints.

    growth = x(to) / x(from) − 1,    to be compared with √(step_to / step_from) − 1, that of a random walk
    update cosine = cos(ΔW_k − ΔW_{k−1}, ΔW_{k−1} − ΔW_{k−2}):  1 a straight line, 0 a random walk, < 0 back and forth

`legacy` contains the floor that A starts with; `net` is the same figure less the floor. Only `net`, mean|B| and ‖ΔW‖_F
show the progress of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lapwan.diagnostics.lora_figures import Figures, inner_product, measure, summarise
from lapwan.diagnostics.run_folder import Checkpoint, noise_expert_steps
from lapwan.lora.state import Entry, LowRank


@dataclass(frozen=True)
class Growth:
    """Relative growth of one noise expert's figures between two checkpoints; None where it is undefined."""

    legacy: float | None
    net: float | None
    mean_abs_B: float | None
    delta_norm: float | None
    sqrt_step: float | None
    update_cosine: float | None


def history(
    points: Sequence[Checkpoint], weights: Mapping[str, Callable[[str], Tensor]] | None = None
) -> list[dict[str, Figures]]:
    """Figures by label at every checkpoint, without spectra; `weights` as in `measure`, by label.

    Args:
        points: the checkpoints, oldest first.
        weights: by label, a function from a module's path to its weight, which DoRA needs; None: not given.
    """
    return [
        {label: summarise(measure(lora.modules, False, (weights or {}).get(label)))
         for label, lora in point.loras.items()}
        for point in points
    ]


def growth(
    points: Sequence[Checkpoint], figures: Sequence[Mapping[str, Figures]], lines: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The `growth` list of the JSON: an entry per pair of successive checkpoints.

    Args:
        points: checkpoints by rising step.
        figures: of each checkpoint, by label.
        lines: the run's metrics, as `run_folder.metrics` reads them.
    """
    entries: list[dict[str, Any]] = []
    for k in range(1, len(points)):
        entry: dict[str, Any] = {"from_step": points[k - 1].step, "to_step": points[k].step}
        for label in points[k].loras:
            if label in points[k - 1].loras:
                cosine = None
                if k >= 2 and label in points[k - 2].loras:
                    cosine = update_cosine(*(points[j].loras[label].modules for j in (k - 2, k - 1, k)))
                start, end = (noise_expert_steps(lines, label, points[j].step) for j in (k - 1, k))
                entry[label] = asdict(growth_between(figures[k - 1][label], figures[k][label], (start, end), cosine))
        entries.append(entry)
    return entries


def growth_between(
    before: Figures, after: Figures, steps: tuple[float | None, float | None], cosine: float | None = None
) -> Growth:
    """Growth of one noise expert from `before` to `after`; `steps` are its own step counts at both.

    Args:
        before, after: figures of two checkpoints.
        steps: the noise expert's own steps at both.
        cosine: see `update_cosine`; None: undefined.
    """
    start, end = steps
    expected = math.sqrt(end / start) - 1 if start and end else None
    return Growth(
        legacy=_relative(before.legacy_mean_abs, after.legacy_mean_abs),
        net=_relative(before.net_mean_abs, after.net_mean_abs) if before.mean_abs_B else None,
        mean_abs_B=_relative(before.mean_abs_B, after.mean_abs_B),
        delta_norm=_relative(before.delta_norm, after.delta_norm),
        sqrt_step=expected, update_cosine=cosine,
    )


def _relative(before: float | None, after: float | None) -> float | None:
    if before is None or after is None or before <= 0:
        return None
    return after / before - 1


def update_cosine(
    first: Mapping[str, Entry], second: Mapping[str, Entry], third: Mapping[str, Entry]
) -> float | None:
    """cos(W_3 − W_2, W_2 − W_1) over the low-rank pairs that all three have, from inner products of the factors.

    Args:
        first: modules by path of a checkpoint, W_1.
        second: of the next one, W_2.
        third: of the one after it, W_3.

    Returns:
        The cosine in [-1, 1]; None if one of the differences is 0.
    """
    dot = norm_new = norm_old = 0.0
    for path in third:
        if path not in second or path not in first:
            continue
        a, b, c = first[path].entry(), second[path].entry(), third[path].entry()
        if not (isinstance(a, LowRank) and isinstance(b, LowRank) and isinstance(c, LowRank)) or not a.stackable:
            continue
        aa, bb, cc = inner_product(a, a), inner_product(b, b), inner_product(c, c)
        ab, bc, ac = inner_product(a, b), inner_product(b, c), inner_product(a, c)
        dot += bc - bb - ac + ab
        norm_new += cc - 2 * bc + bb
        norm_old += bb - 2 * ab + aa
    if not (norm_new > 0 and norm_old > 0):
        return None
    return max(-1.0, min(1.0, dot / math.sqrt(norm_new * norm_old)))
