"""Output of an evaluation: the JSON document, and tables for the terminal.

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
from lapwan.evaluation.flow_losses import FlowLosses
from lapwan.evaluation.router_accuracy import RoutingScores
from lapwan.evaluation.study import Study, StudyResults
from lapwan.train.clip_store import family_of

FORMAT = 1
SHARES = ("identity", "judged_none", "judged_unclear", "tip_accuracy")  # printed as percentages


@dataclass(frozen=True)
class IntervalRule:
    """Settings of the bootstrap intervals."""

    samples: int = SAMPLES
    level: float = LEVEL
    seed: int = 0

    def of(self, values: np.ndarray) -> Estimate:
        """Mean and interval of [P] or [P, S]."""
        return bootstrap(values, samples=self.samples, level=self.level, seed=self.seed)

    def between(self, a: np.ndarray, b: np.ndarray) -> Estimate:
        """Mean and interval of the paired difference a − b."""
        return paired_bootstrap(a, b, samples=self.samples, level=self.level, seed=self.seed)


def document(study: Study, results: StudyResults, interval: IntervalRule) -> dict[str, Any]:
    """The whole evaluation as plain values."""
    families = _families(study)
    result: dict[str, Any] = {
        "format": FORMAT, "level": interval.level, "adapters": [arm.name for arm in study.arms],
        "routing": _routing(study, results, interval),
        "loss": {name: {e.value: _loss(study, losses, families, interval) for e, losses in by_noise_expert.items()}
                 for name, by_noise_expert in results.losses.items()},
        "generation": {name: _figures(scores, interval) for name, scores in results.scores.items()},
        "ceiling": _figures(results.ceiling, interval),
        "differences": [
            {"a": a, "b": b, "metric": metric, **estimate.as_json()}
            for a, b, metric, estimate in differences(results, interval)
        ],
    }
    if study.clips:
        result["judge"] = None if study.judge is None else {
            "classes": list(study.judge.classes), "fingerprint": study.judge.fingerprint}
        result["clips"] = [{"id": clip.id, "prompt": clip.prompt} for clip in study.clips]
        result["scores"] = {name: {metric: _plain(values) for metric, values in scores.items()}
                            for name, scores in results.scores.items()}
    return result


def _families(study: Study) -> list[str]:
    """Main family of each cached item; "" without a label."""
    keys = study.taxonomy.keys
    families = []
    for item in study.items:
        index = family_of(item)
        families.append("" if index is None or index >= len(keys) else keys[index])
    return families


def _loss(study: Study, losses: FlowLosses, families: list[str], interval: IntervalRule) -> dict[str, Any]:
    plan = study.flow
    entry: dict[str, Any] = interval.of(losses.whole_PK.mean(axis=1)).as_json()
    entry["bins"] = []
    for bin_ in range(plan.bins):
        part = slice(bin_ * plan.draws, (bin_ + 1) * plan.draws)
        sigma = losses.sigma_PK[:, part]
        entry["bins"].append({"sigma": [float(sigma.min()), float(sigma.max())],
                              **interval.of(losses.whole_PK[:, part].mean(axis=1)).as_json()})
    rows_of = {name: np.array([f == name for f in families]) for name in dict.fromkeys(families) if name}
    entry["families"] = {
        name: interval.of(losses.whole_PK[rows].mean(axis=1)).as_json() for name, rows in rows_of.items()}
    entry["roi"], entry["outside"] = (interval.of(values.mean(axis=1)).as_json()
                                      for values in (losses.roi_PK, losses.outside_PK))
    return entry


def _figures(scores: Mapping[str, np.ndarray], interval: IntervalRule) -> dict[str, Any]:
    return {metric: {**interval.of(values).as_json(), "videos": int((~np.isnan(values)).sum())}
            for metric, values in scores.items()}


def _routing(study: Study, results: StudyResults, interval: IntervalRule) -> dict[str, Any]:
    """The first routed arm's scores at the top, those of every arm under `adapters`."""
    if not results.routing:
        return {"accuracy": None, "confusion": None, "n": 0}
    by_arm = {name: {which: _routing_scores(scores, interval) for which, scores in sets.items()}
              for name, sets in results.routing.items()}
    first = next(iter(by_arm.values()))
    which = next(iter(first))
    entry = {**first[which], "captions": which, "adapters": by_arm}
    if "paraphrases" in first:
        entry["paraphrases"] = first["paraphrases"]
    if results.probe:
        entry["probe"] = results.probe
    return entry


def _routing_scores(scores: RoutingScores, interval: IntervalRule) -> dict[str, Any]:
    estimate = interval.of(scores.right_N)
    return {"accuracy": scores.accuracy, "ci95": estimate.as_json()["ci95"], "n": len(scores.right_N),
            "families": list(scores.families), "confusion": scores.confusion_EE.tolist(),
            "entropy": float(scores.entropy_N.mean())}


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def metrics_of(results: StudyResults, name: str) -> dict[str, np.ndarray]:
    """All metrics of an arm that can be paired, [P] or [P, S]: `loss/high`, `loss/high/roi`, `identity`, ...

    Of a model of one transformer: `loss`, `loss/roi`.
    """
    metrics: dict[str, np.ndarray] = {}
    by_noise_expert = results.losses.get(name, {})
    for noise_expert, losses in by_noise_expert.items():
        key = f"loss/{noise_expert.value}" if len(by_noise_expert) > 1 else "loss"
        metrics[key] = losses.whole_PK.mean(axis=1)
        metrics[f"{key}/roi"] = losses.roi_PK.mean(axis=1)
    metrics |= results.scores.get(name, {})
    return {metric: values for metric, values in metrics.items() if not np.isnan(values).all()}


def differences(results: StudyResults, interval: IntervalRule) -> Iterator[tuple[str, str, str, Estimate]]:
    """(a, b, metric, a − b) of every pair of arms, the later arm first."""
    names = list(dict.fromkeys([*results.losses, *results.scores]))
    for b, a in combinations(names, 2):
        of_a, of_b = metrics_of(results, a), metrics_of(results, b)
        for metric in of_a:
            if metric in of_b:
                yield a, b, metric, interval.between(of_a[metric], of_b[metric])


def tables(study: Study, results: StudyResults, interval: IntervalRule) -> list[Table]:
    """Figures by adapter, differences to the first adapter, routing."""
    tables_ = []
    if results.losses or results.scores:
        tables_.append(_figure_table(study, results, interval))
    tables_ += [_routing_table(name, which, scores, results.probe) for name, sets in results.routing.items()
             for which, scores in sets.items()]
    return [table for table in tables_ if table.row_count]


def format_value(metric: str, value: float, sign: bool = False, digits: int = 3) -> str:
    """`62.5` for a share in percent, else `digits` digits."""
    if np.isnan(value):
        return "-"
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if metric in SHARES else f"{value:{plus}.{digits}g}"


def format_estimate(metric: str, estimate: Estimate, sign: bool = False) -> str:
    """`62.5 [50.0, 75.0]`."""
    mean = format_value(metric, estimate.mean, sign)
    if np.isnan(estimate.low):
        return mean
    return f"{mean} [{format_value(metric, estimate.low, sign, 2)}, {format_value(metric, estimate.high, sign, 2)}]"


def _figure_table(study: Study, results: StudyResults, interval: IntervalRule) -> Table:
    """A row for each metric and adapter: its mean, and the paired difference to the first adapter."""
    by_arm = {arm.name: metrics_of(results, arm.name) for arm in study.arms}
    first = study.arms[0].name
    table = Table(title=f"means and differences, each with its {100 * interval.level:g} % interval", box=box.SIMPLE,
                  title_justify="left", padding=(0, 1, 0, 0))
    for column in ("adapter", "mean", f"difference to {first}", ""):
        table.add_column(column, justify="left" if column in ("adapter", "") else "right", no_wrap=True)
    for metric in dict.fromkeys(metric for metrics in by_arm.values() for metric in metrics):
        table.add_section()
        table.add_row(f"{metric} %" if metric in SHARES else metric, style="bold")
        control = by_arm[first].get(metric)
        for name, metrics in by_arm.items():
            if metric not in metrics:
                continue
            gap = None if name == first or control is None else interval.between(metrics[metric], control)
            table.add_row(f"  {name}", format_estimate(metric, interval.of(metrics[metric])),
                          "" if gap is None else format_estimate(metric, gap, sign=True),
                          "*" if gap and gap.excludes_zero else "")
        if metric in results.ceiling:
            table.add_row("  (VAE's ceiling)", format_estimate(metric, interval.of(results.ceiling[metric])))
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
