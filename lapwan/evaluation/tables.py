"""What an evaluation says: the JSON that scripts rely on, and tables.

    {"routing": {"accuracy", "confusion", "n"}, "loss": {adapter: {noise_expert: {"mean", "ci95"}}},
     "generation": {adapter: {metric: {"mean", "ci95"}}}, "differences": [{"a", "b", "metric", "mean", "ci95"}]}

A difference is a − b, on the same clips, noise and seeds. Absent figures are null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from lapwan.evaluation.bootstrap import LEVEL, SAMPLES, Estimate, bootstrap, paired_bootstrap
from lapwan.evaluation.flow import FlowLosses
from lapwan.evaluation.routing import RoutingScores
from lapwan.evaluation.study import Findings, Study

FORMAT = 1
SHARES = ("identity", "tip_accuracy")  # shown as percentages


@dataclass(frozen=True)
class Interval:
    """How intervals are made."""

    samples: int = SAMPLES
    level: float = LEVEL
    seed: int = 0

    def of(self, values: np.ndarray) -> Estimate:
        """Mean and interval of [P] or [P, S]."""
        return bootstrap(values, samples=self.samples, level=self.level, seed=self.seed)

    def between(self, a: np.ndarray, b: np.ndarray) -> Estimate:
        """Of a − b, paired."""
        return paired_bootstrap(a, b, samples=self.samples, level=self.level, seed=self.seed)


def document(study: Study, found: Findings, interval: Interval) -> dict[str, Any]:
    """The whole evaluation as plain values."""
    families = _families(study)
    said: dict[str, Any] = {
        "format": FORMAT, "level": interval.level, "adapters": [arm.name for arm in study.arms],
        "routing": _routing(study, found, interval),
        "loss": {name: {e.value: _loss(study, own, families, interval) for e, own in by.items()}
                 for name, by in found.losses.items()},
        "generation": {name: _figures(scores, interval) for name, scores in found.scores.items()},
        "ceiling": _figures(found.ceiling, interval),
        "differences": [
            {"a": a, "b": b, "metric": metric, **estimate.as_json()}
            for a, b, metric, estimate in differences(found, interval)
        ],
    }
    if study.clips:
        said["clips"] = [{"id": clip.id, "prompt": clip.prompt} for clip in study.clips]
        said["scores"] = {name: {metric: _plain(values) for metric, values in scores.items()}
                          for name, scores in found.scores.items()}
    return said


def _families(study: Study) -> list[str]:
    """Main family of each cached item; "" without a label."""
    keys = study.taxonomy.keys
    found = []
    for item in study.items:
        index = int(np.argmax(item.label_weights)) if item.label_weights else item.label
        found.append("" if index is None or index >= len(keys) else keys[index])
    return found


def _loss(study: Study, own: FlowLosses, families: list[str], interval: Interval) -> dict[str, Any]:
    plan = study.flow
    said: dict[str, Any] = interval.of(own.whole_PK.mean(axis=1)).as_json()
    said["bins"] = []
    for bin_ in range(plan.bins):
        part = slice(bin_ * plan.draws, (bin_ + 1) * plan.draws)
        sigma = own.sigma_PK[:, part]
        said["bins"].append({"sigma": [float(sigma.min()), float(sigma.max())],
                             **interval.of(own.whole_PK[:, part].mean(axis=1)).as_json()})
    of_family = {name: np.array([f == name for f in families]) for name in dict.fromkeys(families) if name}
    said["families"] = {
        name: interval.of(own.whole_PK[rows].mean(axis=1)).as_json() for name, rows in of_family.items()}
    said["roi"], said["outside"] = (interval.of(values.mean(axis=1)).as_json()
                                    for values in (own.roi_PK, own.outside_PK))
    return said


def _figures(scores: Mapping[str, np.ndarray], interval: Interval) -> dict[str, Any]:
    return {metric: {**interval.of(values).as_json(), "videos": int((~np.isnan(values)).sum())}
            for metric, values in scores.items()}


def _routing(study: Study, found: Findings, interval: Interval) -> dict[str, Any]:
    """The first routed arm's answers at the top, every arm's under `adapters`."""
    if not found.routing:
        return {"accuracy": None, "confusion": None, "n": 0}
    by_arm = {name: {which: _answers(scores, interval) for which, scores in sets.items()}
              for name, sets in found.routing.items()}
    first = next(iter(by_arm.values()))
    which = next(iter(first))
    said = {**first[which], "captions": which, "adapters": by_arm}
    if "paraphrases" in first:
        said["paraphrases"] = first["paraphrases"]
    if found.probe:
        said["probe"] = found.probe
    return said


def _answers(scores: RoutingScores, interval: Interval) -> dict[str, Any]:
    estimate = interval.of(scores.right_N)
    return {"accuracy": scores.accuracy, "ci95": estimate.as_json()["ci95"], "n": len(scores.right_N),
            "families": list(scores.families), "confusion": scores.confusion_EE.tolist(),
            "entropy": float(scores.entropy_N.mean())}


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def measured(found: Findings, name: str) -> dict[str, np.ndarray]:
    """Everything of an arm that can be paired, [P] or [P, S]: `loss/high`, `loss/high/roi`, `identity`, ..."""
    every: dict[str, np.ndarray] = {}
    for noise_expert, own in found.losses.get(name, {}).items():
        every[f"loss/{noise_expert.value}"] = own.whole_PK.mean(axis=1)
        every[f"loss/{noise_expert.value}/roi"] = own.roi_PK.mean(axis=1)
    every |= found.scores.get(name, {})
    return {metric: values for metric, values in every.items() if not np.isnan(values).all()}


def differences(found: Findings, interval: Interval) -> Iterator[tuple[str, str, str, Estimate]]:
    """(a, b, metric, a − b) of every two arms, the later one first."""
    names = list(dict.fromkeys([*found.losses, *found.scores]))
    for b, a in combinations(names, 2):
        of_a, of_b = measured(found, a), measured(found, b)
        for metric in of_a:
            if metric in of_b:
                yield a, b, metric, interval.between(of_a[metric], of_b[metric])


def tables(study: Study, found: Findings, interval: Interval) -> list[Table]:
    """Figures by adapter, differences to the first adapter, routing."""
    made = []
    if found.losses or found.scores:
        made.append(_figure_table(study, found, interval))
    made += [_routing_table(name, which, scores, found.probe) for name, sets in found.routing.items()
             for which, scores in sets.items()]
    return [table for table in made if table.row_count]


def shown(metric: str, value: float, sign: bool = False, digits: int = 3) -> str:
    """`62.5` of a share in percent, else `digits` digits."""
    if np.isnan(value):
        return "-"
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if metric in SHARES else f"{value:{plus}.{digits}g}"


def told(metric: str, estimate: Estimate, sign: bool = False) -> str:
    """`62.5 [50.0, 75.0]`."""
    mean = shown(metric, estimate.mean, sign)
    if np.isnan(estimate.low):
        return mean
    return f"{mean} [{shown(metric, estimate.low, sign, 2)}, {shown(metric, estimate.high, sign, 2)}]"


def _figure_table(study: Study, found: Findings, interval: Interval) -> Table:
    """A row for each metric and adapter: its mean, and the paired difference to the first adapter."""
    by_arm = {arm.name: measured(found, arm.name) for arm in study.arms}
    first = study.arms[0].name
    table = Table(title=f"means and differences, each with its {100 * interval.level:g} % interval", box=box.SIMPLE,
                  title_justify="left", padding=(0, 1, 0, 0))
    for column in ("adapter", "mean", f"difference to {first}", ""):
        table.add_column(column, justify="left" if column in ("adapter", "") else "right", no_wrap=True)
    for metric in dict.fromkeys(metric for own in by_arm.values() for metric in own):
        table.add_section()
        table.add_row(f"{metric} %" if metric in SHARES else metric, style="bold")
        for name, own in by_arm.items():
            if metric not in own:
                continue
            gap = None if name == first or metric not in by_arm[first] else interval.between(
                own[metric], by_arm[first][metric])
            table.add_row(f"  {name}", told(metric, interval.of(own[metric])),
                          "" if gap is None else told(metric, gap, sign=True), "*" if gap and gap.excludes_zero else "")
        if metric in found.ceiling:
            table.add_row("  (VAE's ceiling)", told(metric, interval.of(found.ceiling[metric])))
    return table


def _routing_table(name: str, which: str, scores: RoutingScores, probe: Mapping[str, float]) -> Table:
    ceiling = f"; a linear probe of the text features: {100 * probe[which]:.1f} %" if which in probe else ""
    title = (f"{name}: router on {len(scores.right_N)} {which}, {100 * scores.accuracy:.1f} % right, mean entropy "
             f"{scores.entropy_N.mean():.2f} nats{ceiling}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("label \\ answer")
    for family in scores.families:
        table.add_column(family, justify="right")
    for family, row in zip(scores.families, scores.confusion_EE.tolist(), strict=True):
        table.add_row(family, *map(str, row))
    return table

