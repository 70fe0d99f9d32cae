"""From rows to `result.json` and `result.md`: means with intervals, differences, goals met and missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.comparison.rows import ARMS, METRIC, best_lr, sweep_names
from examples.comparison.settings import CONTINUED, MIXTURE, NONE, SAME_SIZE, ComparisonSettings, TaskName
from lapwan import __version__
from lapwan.data.taxonomy import load_taxonomy
from lapwan.evaluation.bootstrap import Estimate, bootstrap, paired_bootstrap
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import FAMILIES

ROUTER, HINT, WRONG = (f"{MIXTURE}, {how}" for how in ("router", "hint", "wrong hint"))
_SAMPLES = 10_000
_GOALS = {"captions": 0.95, "without keywords": 0.85}
_ERROR_REDUCTION = 0.25


class Results:
    """Rows by name, as arrays of prompts and training seeds."""

    def __init__(self, settings: ComparisonSettings, rows: Mapping[str, Any], named: Sequence[str]) -> None:
        self.settings, self.rows = settings, rows
        self.named = list(named)  # the test clips' instruments

    def scores(self, task: TaskName, arm: str, metric: str) -> np.ndarray | None:
        """[P, training seeds]; None where a seed is missing. An arm without training is the same at every seed."""
        seeds = self.settings.seeds
        names = [f"test {task} none"] * len(seeds) if arm == NONE else [f"test {task} {arm} {seed}" for seed in seeds]
        return self._stacked(names, metric)

    def ablation(self, task: TaskName, name: str, metric: str) -> np.ndarray | None:
        """[P, ablation seeds]."""
        return self._stacked([f"test {task} {name} {seed}" for seed in self.settings.ablation_seeds], metric)

    def _stacked(self, names: Sequence[str], metric: str) -> np.ndarray | None:
        if not names or any(name not in self.rows for name in names):
            return None
        columns = [self.rows[name]["scores"][metric] for name in names]
        return np.array([[np.nan if x is None else x for x in column] for column in columns], dtype=float).T

    def wrong_seen(self, task: TaskName, arm: str) -> np.ndarray | None:
        """[P, seeds]: the instrument that the wrong hint names is the one seen, whatever hint the arm was given."""
        by_name = [scores for name in INSTRUMENTS if (scores := self.scores(task, arm, f"seen_{name}")) is not None]
        if len(by_name) < len(INSTRUMENTS):
            return None
        stacked = np.stack(by_name)  # [instruments, P, S]
        return stacked[[_wrong(name) for name in self.named], np.arange(len(self.named))]

    def routing(self, kind: str, what: str, task: TaskName | None = None) -> np.ndarray | None:
        """[captions, training seeds] of the router (`right`) or of the probe."""
        names = [f"routing {task or self.settings.tasks[0]} {seed}" for seed in self.settings.seeds]
        if any(name not in self.rows for name in names):
            return None
        return np.array([self.rows[name][kind][what] for name in names], dtype=float).T


def _wrong(instrument: str) -> int:
    """The index of the instrument that a wrong hint names: of the next family in the taxonomy's order."""
    keys = load_taxonomy("surgical4").keys
    family = {name: "other" if name == "grasper" else name for name in FAMILIES}
    after = keys[(keys.index(family[instrument]) + 1) % len(keys)]
    return next(i for i, name in enumerate(INSTRUMENTS) if family[name] == after)


def error_reduction(a_PS: np.ndarray, b_PS: np.ndarray, seed: int = 0) -> Estimate:
    """1 − (1 − a) / (1 − b), resampled over prompts and training seeds together."""
    rng, (prompts, seeds) = np.random.default_rng(seed), a_PS.shape
    u_RP = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=_SAMPLES)
    v_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=_SAMPLES)
    errors = [np.where(np.isnan(x), 0.0, 1.0 - x) for x in (a_PS, b_PS)]
    a_R, b_R = (np.einsum("rp,ps,rs->r", u_RP, error, v_RS, optimize=True) for error in errors)
    kept = b_R > 0
    low, high = np.percentile(1 - a_R[kept] / b_R[kept], [2.5, 97.5]) if kept.any() else (np.nan, np.nan)
    whole = 1 - errors[0].sum() / errors[1].sum() if errors[1].sum() else float("nan")
    return Estimate(float(whole), float(low), float(high), prompts)


def summarise(results: Results) -> dict[str, Any]:
    """Everything that is there, as JSON; what is missing is left out."""
    s = results.settings
    summary: dict[str, Any] = {
        "format": 1, "goals": [], "tasks": {}, "lapwan": __version__, "machine": _machine(results)}
    for task in s.tasks:
        summary["tasks"][task] = _task(results, task, summary["goals"])
    summary["routing"] = _routing(results, summary["goals"])
    summary["ablations"] = _ablations(results)
    if "timing" in results.rows:
        times = {arm: min(results.rows["timing"][arm]) for arm in (SAME_SIZE, MIXTURE)}
        summary["seconds_per_step"] = {**times, "ratio": times[MIXTURE] / times[SAME_SIZE]}
    return summary


def _machine(results: Results) -> dict[str, Any]:
    """Where the trainings ran; the report may be made elsewhere."""
    machines = [row["machine"] for name, row in results.rows.items() if name.startswith("sweep") and "machine" in row]
    return machines[0] if machines else {}


def _task(results: Results, task: TaskName, goals: list[dict[str, Any]]) -> dict[str, Any]:
    s, metric = results.settings, METRIC[task]
    arms = [NONE, CONTINUED, SAME_SIZE, ROUTER, HINT, WRONG, *(f"{MIXTURE}, alpha {alpha:g}" for alpha in s.alphas)]
    scores = {arm: {m: values for m in ("identity", "tip_accuracy")
                    if (values := results.scores(task, arm, m)) is not None} for arm in arms}
    summary: dict[str, Any] = {"metric": metric, "prompts": len(results.named), "training_seeds": list(s.seeds)}
    summary["arms"] = {arm: {m: bootstrap(values, crossed=True).as_json() for m, values in by_metric.items()
                           if not np.isnan(values).all()} for arm, by_metric in scores.items() if by_metric}
    pairs = [(ROUTER, CONTINUED), (ROUTER, SAME_SIZE), (HINT, CONTINUED), (HINT, SAME_SIZE), (ROUTER, HINT),
             (ROUTER, WRONG), (ROUTER, NONE)]
    summary["differences"] = []
    for a, b in pairs:
        if metric in scores[a] and metric in scores[b]:
            difference = paired_bootstrap(scores[a][metric], scores[b][metric], crossed=True)
            reduction = error_reduction(scores[a][metric], scores[b][metric])
            summary["differences"].append({"a": a, "b": b, "metric": metric, **difference.as_json(),
                                         "relative_error_reduction": reduction.as_json()})
            if (a, b) in pairs[:2]:
                goals.append(_goal(f"{task}: {metric} of the mixture above {b}", difference, 0.0))
                goals.append({"goal": f"{task}: at least a quarter fewer errors than {b}", "value": reduction.mean,
                              "wanted": _ERROR_REDUCTION, "met": reduction.mean >= _ERROR_REDUCTION})
            if metric == "identity" and b in (NONE, WRONG):
                goals.append(_goal(f"{task}: identity of the mixture above {'alpha_expert 0' if b == NONE else b}",
                                   difference, 0.0))
    seen = [results.wrong_seen(task, arm) for arm in (WRONG, ROUTER)]
    if seen[0] is not None and seen[1] is not None:
        difference = paired_bootstrap(seen[0], seen[1], crossed=True)
        summary["wrong_hint"] = {"seen_with_it": bootstrap(seen[0], crossed=True).as_json(),
                               "seen_with_the_router": bootstrap(seen[1], crossed=True).as_json(),
                               "difference": difference.as_json()}
        if metric == "identity":
            goals.append(_goal(f"{task}: a wrong hint makes the instrument it names appear", difference, 0.0))
    summary["sweep"] = {
        arm: {"validation": {f"{lr:g}": results.rows[name]["validation"][metric]
                             for lr, name in zip(s.lrs, sweep_names(s, task, arm), strict=True)},
              "chosen": best_lr(s, task, arm, results.rows),
              "parameters": results.rows[sweep_names(s, task, arm)[0]]["parameters"]}
        for arm in ARMS if all(name in results.rows for name in sweep_names(s, task, arm))}
    return summary


def _goal(text: str, difference: Estimate, wanted: float) -> dict[str, Any]:
    """Met if the whole interval lies above what is wanted."""
    return {"goal": text, "value": difference.mean, "ci95": [difference.low, difference.high], "wanted": wanted,
            "met": bool(difference.low > wanted)}


def _routing(results: Results, goals: list[dict[str, Any]]) -> dict[str, Any]:
    s, summary = results.settings, {}
    for kind, wanted in _GOALS.items():
        right, probe = results.routing(kind, "right"), results.routing(kind, "probe")
        if right is None or probe is None:
            continue
        rows = [results.rows[f"routing {s.tasks[0]} {seed}"] for seed in s.seeds]
        estimate, ceiling = bootstrap(right, crossed=True), bootstrap(probe, crossed=True)
        summary[kind] = {"accuracy": estimate.as_json(), "probe": ceiling.as_json(), "families": rows[0]["families"],
                       "confusion": np.sum([row[kind]["confusion"] for row in rows], axis=0).tolist(),
                       "entropy": float(np.mean([row[kind]["entropy"] for row in rows]))}
        met = estimate.mean >= wanted or (kind == "without keywords" and estimate.mean >= ceiling.mean - 0.05)
        goals.append({"goal": f"routing accuracy, {kind}", "value": estimate.mean, "probe": ceiling.mean,
                      "ci95": [estimate.low, estimate.high], "wanted": wanted, "met": bool(met)})
    return summary


def _ablations(results: Results) -> dict[str, Any]:
    s, summary = results.settings, {}
    task = s.tasks[0]
    metric = METRIC[task]
    whole = results.scores(task, ROUTER, metric)
    for name in s.ablations:
        scores = results.ablation(task, name, metric)
        if scores is None or whole is None:
            continue
        same = whole[:, [s.seeds.index(seed) for seed in s.ablation_seeds]]
        rows = [results.rows.get(f"routing {task} {name} {seed}") for seed in s.ablation_seeds]
        accuracy = [float(np.mean(row["captions"]["right"])) for row in rows if row is not None]
        faults = sorted({text.split(";")[0] for seed in s.ablation_seeds
                         for text in results.rows[f"train {task} {name} {seed}"]["routing_faults"]})
        summary[name] = {metric: bootstrap(scores, crossed=True).as_json(),
                       "minus_the_mixture": paired_bootstrap(scores, same, crossed=True).as_json(),
                       "routing_accuracy": float(np.mean(accuracy)) if accuracy else None, "routing_faults": faults}
    return summary
