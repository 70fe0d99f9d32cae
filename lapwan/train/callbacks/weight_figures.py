"""Figures of the trained weights, ratios between the noise experts, and the verdict of `inspect-weights` on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

from lapwan import console
from lapwan.diagnostics.growth import growth_between
from lapwan.diagnostics.lora_figures import Figures, measure, summarise
from lapwan.diagnostics.mixture import overlap
from lapwan.diagnostics.tables import RATIOS, format_number, ratios
from lapwan.diagnostics.verdict import PRESETS, Evidence, judge
from lapwan.lora.attach import Adapter
from lapwan.lora.state import LowRank
from lapwan.names import NoiseExpert
from lapwan.settings.callbacks import HealthSettings
from lapwan.train.callbacks.base import REPEAT_EVERY, Callback, Evaluation
from lapwan.train.run_state import SavedState, Steps

_LEVELS = ("good", "warn", "stop")


def trained_entries(adapter: Adapter) -> dict[str, dict[str, LowRank]]:
    """The trained entries of an adapter by group: one group for a plain LoRA, one per family for a mixture."""
    layers = adapter.layers.values()
    columns = {group.column for layer in layers for group in layer.groups if group.trainable}
    return {name: adapter.state(name).low_rank(name) for i, name in enumerate(adapter.group_names) if i in columns}


def _expert_figures(
    label: str, experts: Mapping[str, Mapping[str, LowRank]], overlaps: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float | None]:
    """‖ΔW‖ of each expert of a mixture, and the overlap of each pair."""
    values: dict[str, float | None] = {
        f"weights/{label}/delta_norm_of/{name}": summarise(measure(dict(entries), spectrum=False)).delta_norm
        for name, entries in experts.items()
    }
    for a, b in combinations(overlaps, 2):
        values[f"weights/{label}/overlap/{a}-{b}"] = overlaps[a][b]
    return values


class _WeightFiguresState(SavedState):
    before: dict[str, Figures]
    steps: dict[str, Steps]
    step: Steps
    bad: Steps
    said: list[str]


class WeightFigures(Callback):
    """Logs figures of the weights; with a health preset also its verdict, which may stop the run.

    Args:
        learning_rates: current lr by noise expert.
        steps: optimizer steps taken by noise expert.
        every: steps of the run between two evaluations.
        one_transformer: the model has one for all noise, which is judged by fewer rules.
    """

    name = "weights"
    state_type = _WeightFiguresState

    def __init__(
        self, adapters: Mapping[NoiseExpert, Adapter], learning_rates: Callable[[], dict[str, float]],
        steps: Callable[[], dict[str, int]], every: int, health: HealthSettings, one_transformer: bool = False,
    ) -> None:
        self.every, self._one_transformer = every, one_transformer
        self._adapters, self._learning_rates, self._steps, self._health = adapters, learning_rates, steps, health
        self._before: dict[str, Figures] = {}
        self._steps_before: dict[str, int] = {}
        self._step_before = 0
        self._bad_in_a_row = 0
        self._stops: list[str] = []  # rules that said stop at the last evaluation
        self._reported: frozenset[str] = frozenset()  # rules and their status at the last evaluation

    def on_step(self, step: int, board: Any) -> Evaluation:
        groups = {e.value: trained_entries(adapter) for e, adapter in self._adapters.items()}
        figures = {}
        for label, experts in groups.items():
            modules = {f"{path}.{name}" if len(experts) > 1 else path: entry
                       for name, entries in experts.items() for path, entry in entries.items()}
            figures[label] = summarise(measure(modules, spectrum=False))
        rates, steps = self._learning_rates(), self._steps()
        overlaps = {label: overlap(experts) for label, experts in groups.items() if len(experts) > 1}
        values: dict[str, float | None] = {}
        for label, matrix in overlaps.items():
            values |= _expert_figures(label, groups[label], matrix)
        for label, summary in figures.items():
            values |= {f"weights/{label}/{name}": getattr(summary, name) for name in (*RATIOS, "init_floor")}
        values |= {f"weights/ratio/{name}": value for name, value in ratios(figures, rates).items()}
        grown = self._growth(figures, steps, step)
        for label in figures:
            if grown and grown[0][label]["net"] is not None:
                values[f"weights/{label}/growth"] = grown[0][label]["net"]
                values[f"weights/{label}/growth_of_noise"] = grown[0][label]["sqrt_step"]
        stop_reason = None
        if self._health.preset is not None and min(steps.values()) >= self._health.after:
            verdict = judge(Evidence(PRESETS[self._health.preset], figures, rates, grown, step, overlaps or None,
                                     one_transformer=self._one_transformer))
            values["health/status"] = float(_LEVELS.index(verdict["status"]))
            stop_reason = self._report(verdict, step)
        self._before, self._steps_before, self._step_before = figures, steps, step
        return Evaluation({name: value for name, value in values.items() if value is not None}, stop_reason)

    def _growth(self, figures: Mapping[str, Figures], steps: Mapping[str, int], step: int) -> list[dict[str, Any]]:
        if not self._before.keys() >= figures.keys():  # none yet
            return []
        entry: dict[str, Any] = {"from_step": self._step_before, "to_step": step}
        for label, now in figures.items():
            interval = (float(self._steps_before[label]), float(steps[label]))
            entry[label] = asdict(growth_between(self._before[label], now, interval))
        return [entry]

    def _report(self, verdict: Mapping[str, Any], step: int) -> str | None:
        """Log the verdict where it changed; the reason to stop once `patience` evaluations in a row said stop."""
        bad = [rule for rule in verdict["rules"] if rule["status"] != "good"]
        lines = {f"{rule['rule']}: {format_number(rule['value'])} (wanted {rule['threshold']}, from {rule['source']}); "
                 f"{rule['action']}": rule for rule in bad}
        now = frozenset(f"{rule['rule']} {rule['status']}" for rule in bad)
        if now != self._reported or (self._bad_in_a_row and not self._bad_in_a_row % REPEAT_EVERY):
            for line, rule in lines.items():
                (console.warn if rule["status"] == "stop" else console.log)(f"step {step}, {rule['status']}: {line}")
        self._reported = now
        stops = [line for line, rule in lines.items() if rule["status"] == "stop"]
        self._bad_in_a_row, self._stops = (self._bad_in_a_row + 1 if stops else 0), stops
        if self._bad_in_a_row >= self._health.patience and self._health.on_unhealthy == "stop":
            return (f"stopped by health.on_unhealthy = \"stop\" after {self._bad_in_a_row} evaluations in a row: "
                    f"{stops[0]}; to continue anyway, --resume with health.on_unhealthy = \"warn\"")
        return None

    def lasting(self) -> str | None:
        if not self._stops or self._bad_in_a_row < 2:
            return None
        return f"{self._stops[0]}, for {self._bad_in_a_row} evaluations in a row"

    def state_dict(self) -> dict[str, Any]:
        return {
            "before": {label: asdict(figures) for label, figures in self._before.items()},
            "steps": dict(self._steps_before), "step": self._step_before,
            "bad": self._bad_in_a_row, "said": sorted(self._reported),
        }

    def load_state_dict(self, state: _WeightFiguresState) -> None:
        if state.before.keys() - state.steps.keys():
            raise ValueError("figures of weights without their steps")
        self._before, self._steps_before, self._step_before = state.before, state.steps, state.step
        self._bad_in_a_row, self._reported = state.bad, frozenset(state.said)
