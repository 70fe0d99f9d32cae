"""Figures of what is being trained, ratios between the noise experts, and the verdict of `inspect-weights` on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import combinations
from typing import Any

from lapwan import console
from lapwan.diagnostics.growth import between
from lapwan.diagnostics.lora_figures import Figures, measure, summarise
from lapwan.diagnostics.mixture import overlap
from lapwan.diagnostics.tables import RATIOS, ratios, shown
from lapwan.diagnostics.verdict import PRESETS, Evidence, judge
from lapwan.lora.attach import Adapter
from lapwan.lora.state import LoraEntry
from lapwan.names import NoiseExpert
from lapwan.settings.callbacks import HealthSettings
from lapwan.train.callbacks.base import CallbackResult

_LEVELS = ("good", "warn", "stop")


def trained_entries(adapter: Adapter) -> dict[str, dict[str, LoraEntry]]:
    """What is trained in an adapter, by group: one group for a plain LoRA, one a family for a mixture."""
    layers = adapter.layers.values()
    columns = {group.column for layer in layers for group in layer.groups if group.trainable}
    return {name: adapter.state(name).entries for i, name in enumerate(adapter.group_names) if i in columns}


def _of_experts(
    label: str, noise_experts: Mapping[str, Mapping[str, LoraEntry]], matrix: Mapping[str, Mapping[str, float | None]]
) -> dict[str, float | None]:
    """‖ΔW‖ of each expert of a mixture, and how much each two overlap."""
    found: dict[str, float | None] = {
        f"weights/{label}/delta_norm_of/{name}": summarise(measure(dict(own), spectrum=False)).delta_norm
        for name, own in noise_experts.items()
    }
    for a, b in combinations(matrix, 2):
        found[f"weights/{label}/overlap/{a}-{b}"] = matrix[a][b]
    return found


class WeightFigures:
    """A watcher: figures every look; with a preset also the verdict, and a stop if it says so often enough."""

    def __init__(
        self, adapters: Mapping[NoiseExpert, Adapter], rates: Callable[[], dict[str, float]],
        own_steps: Callable[[], dict[str, int]], every: int, health: HealthSettings,
    ) -> None:
        self.every = every
        self._adapters, self._rates, self._own_steps, self._health = adapters, rates, own_steps, health
        self._before: dict[str, Figures] = {}
        self._steps_before: dict[str, int] = {}
        self._step_before = 0
        self._bad_in_a_row = 0
        self._said: frozenset[str] = frozenset()

    def look(self, step: int, board: Any) -> CallbackResult:
        groups = {e.value: trained_entries(adapter) for e, adapter in self._adapters.items()}
        figures = {}
        for label, own in groups.items():
            modules = {f"{path}.{name}" if len(own) > 1 else path: entry
                       for name, entries in own.items() for path, entry in entries.items()}
            figures[label] = summarise(measure(modules, spectrum=False))
        rates, steps = self._rates(), self._own_steps()
        overlaps = {label: overlap(own) for label, own in groups.items() if len(own) > 1}
        found: dict[str, float | None] = {}
        for label, matrix in overlaps.items():
            found |= _of_experts(label, groups[label], matrix)
        for label, one in figures.items():
            found |= {f"weights/{label}/{name}": getattr(one, name) for name in (*RATIOS, "init_floor")}
        found |= {f"weights/ratio/{name}": value for name, value in ratios(figures, rates).items()}
        grown = self._growth(figures, steps, step)
        for label in figures:
            if grown and grown[0][label]["net"] is not None:
                found[f"weights/{label}/growth"] = grown[0][label]["net"]
                found[f"weights/{label}/growth_of_noise"] = grown[0][label]["sqrt_step"]
        reason = None
        if self._health.preset is not None and min(steps.values()) >= self._health.after:
            verdict = judge(Evidence(PRESETS[self._health.preset], figures, rates, grown, step, overlaps or None))
            found["health/status"] = float(_LEVELS.index(verdict["status"]))
            reason = self._judge(verdict, step)
        self._before, self._steps_before, self._step_before = figures, steps, step
        return CallbackResult({name: value for name, value in found.items() if value is not None}, reason)

    def _growth(self, figures: Mapping[str, Figures], steps: Mapping[str, int], step: int) -> list[dict[str, Any]]:
        if not self._before:
            return []
        entry: dict[str, Any] = {"from_step": self._step_before, "to_step": step}
        for label, now in figures.items():
            own = (float(self._steps_before[label]), float(steps[label]))
            entry[label] = asdict(between(self._before[label], now, own))
        return [entry]

    def _judge(self, verdict: Mapping[str, Any], step: int) -> str | None:
        """Say what changed since the last look; the reason to stop when a rule has said so often enough."""
        bad = [rule for rule in verdict["rules"] if rule["status"] != "good"]
        lines = {f"{r['rule']}: {shown(r['value'])} (wanted {r['threshold']}, from {r['source']}); {r['action']}": r
                 for r in bad}
        now = frozenset(f"{rule['rule']} {rule['status']}" for rule in bad)
        if now != self._said:
            for line, rule in lines.items():
                (console.warn if rule["status"] == "stop" else console.log)(f"step {step}, {rule['status']}: {line}")
        self._said = now
        stops = [line for line, rule in lines.items() if rule["status"] == "stop"]
        self._bad_in_a_row = self._bad_in_a_row + 1 if stops else 0
        if self._bad_in_a_row >= self._health.patience and self._health.on_unhealthy == "stop":
            return (f"stopped, since health.on_unhealthy = \"stop\" and {self._bad_in_a_row} looks in a row said so: "
                    f"{stops[0]}; to go on all the same, --resume with health.on_unhealthy = \"warn\"")
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "before": {label: asdict(one) for label, one in self._before.items()}, "steps": dict(self._steps_before),
            "step": self._step_before, "bad": self._bad_in_a_row, "said": sorted(self._said),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._before = {label: Figures(**one) for label, one in state["before"].items()}
        self._steps_before, self._step_before = dict(state["steps"]), state["step"]
        self._bad_in_a_row, self._said = state["bad"], frozenset(state["said"])
