"""Routing of a mixture in training: usage, confusion and gates over windows, and the gradient norm of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapwan import console
from lapwan.diagnostics.router_health import RoutingFault, RoutingThresholds, RoutingTotals, judge_routing
from lapwan.lora.attach import Adapter
from lapwan.moe.mixture import Mixture
from lapwan.names import NoiseExpert
from lapwan.report import plots
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train.callbacks.base import REPEAT_EVERY, Callback, Evaluation, StepResult
from lapwan.train.moe.objective import MixtureObjective
from lapwan.train.run_state import SavedState, Steps, as_saved

_DPI = 100  # of images in TensorBoard
_CLIPS_PER_EXPERT = 5  # a window with fewer clips for each expert is not judged but extended


class _RoutingWindowState(SavedState):
    before: Tensor
    said: list[str]
    bad: Steps


class RoutingCallback(Callback):
    """Routing since the last evaluation, the timestep gates, and warnings with advice."""

    name = "routing"
    state_type = _RoutingWindowState

    def __init__(self, objective: MixtureObjective, settings: TrainMoeSettings) -> None:
        self.every = settings.routing_watch.every
        self._objective, self._settings = objective, settings
        s = settings.routing_watch
        self._thresholds = RoutingThresholds(s.entropy, s.least_usage, s.most_usage, s.teacher_kl)
        self._before = objective.totals
        self._reported: frozenset[str] = frozenset()  # faults of the last window that was judged
        self._bad_in_a_row = 0
        self.faults: list[RoutingFault] = []  # of the last window that was judged

    def on_step(self, step: int, board: Any) -> Evaluation:
        window = self._objective.totals - self._before
        figures = self._gates(board, step)
        if window.clips < _CLIPS_PER_EXPERT * window.experts:
            return Evaluation(figures)
        self._before = self._objective.totals
        figures |= window_figures(window, self._objective.mixture.families)
        board.add_image("routing/confusion", _confusion_image(window, self._objective.mixture), step, dataformats="HWC")
        if step < self._settings.routing_watch.after:
            return Evaluation(figures)
        learned = self._objective.mixture.router.learned
        self.faults = judge_routing(
            window, self._objective.mixture.families, self._thresholds, _advised_settings(self._settings), learned)
        figures["routing/faults"] = float(len(self.faults))
        return Evaluation(figures, self._report(step))

    def _report(self, step: int) -> str | None:
        """Warn of new faults; the reason to stop after `patience` bad windows in a row, if that is asked for."""
        health, now = self._settings.health, frozenset(fault.text.split(" ")[0] + fault.kind for fault in self.faults)
        if now - self._reported or (now and self._bad_in_a_row and not self._bad_in_a_row % REPEAT_EVERY):
            for fault in self.faults:
                console.warn(f"step {step}: {fault}")
        self._reported = now
        self._bad_in_a_row = self._bad_in_a_row + 1 if self.faults else 0
        if self.faults and self._bad_in_a_row >= health.patience and health.on_unhealthy == "stop":
            return (f"stopped by health.on_unhealthy = \"stop\" after {self._bad_in_a_row} windows in a row: "
                    f"{self.faults[0]}")
        return None

    def lasting(self) -> str | None:
        if not self.faults or self._bad_in_a_row < 2:
            return None
        return f"{self.faults[0].text}, for {self._bad_in_a_row} windows in a row"

    def _gates(self, board: Any, step: int) -> dict[str, float]:
        """w(σ) at its knots as figures, and as an image for TensorBoard."""
        figures: dict[str, float] = {}
        lines: dict[str, list[tuple[float, float]]] = {}
        for noise_expert in self._objective.adapters:
            gate = self._objective.mixture.timestep_gate(noise_expert)
            sigmas = torch.linspace(gate.low, gate.high, gate.knots)
            with torch.no_grad():
                strengths = gate(sigmas.to(gate.values_K.device)).tolist()
            lines[noise_expert.value] = list(zip(sigmas.tolist(), strengths, strict=True))
            figures |= {f"timestep_gate/{noise_expert.value}/w_at_{s:.3f}": w for s, w in lines[noise_expert.value]}
        curve = plots.render(lambda figure: plots.line_chart(
            figure.subplots(), "w(sigma): the timestep gates", lines, plots.NOISE_EXPERT_COLOURS,
            "sigma (1: pure noise)", "strength w"), 5.6, 3.5, _DPI)
        board.add_image("timestep_gate/curve", np.asarray(curve), step, dataformats="HWC")
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before.flat, "said": sorted(self._reported), "bad": self._bad_in_a_row}

    def load_state_dict(self, state: _RoutingWindowState) -> None:
        self._before = RoutingTotals(as_saved("routing", state.before, self._before.flat), self._before.experts)
        self._reported, self._bad_in_a_row = frozenset(state.said), state.bad


def window_figures(window: RoutingTotals, families: Sequence[str]) -> dict[str, float]:
    """Figures of a window by tag; those that no clip of the window gives are left out."""
    figures: dict[str, float | None] = {
        "routing/clips": window.clips, "routing/entropy": window.entropy, "routing/teacher_kl": window.teacher_kl,
        "routing/accuracy": window.accuracy,
    }
    usage, by_family, confusion = window.usage_E, window.usage_by_family_EE, window.confusion_EE
    for i, family in enumerate(families):
        figures[f"routing/usage/{family}"] = float(usage[i])
        for j, chosen in enumerate(families):
            figures[f"routing/confusion/{family}/{chosen}"] = float(confusion[i, j])
            if float(confusion[i].sum()):
                figures[f"routing/usage_of/{family}/{chosen}"] = float(by_family[i, j])
    return {name: value for name, value in figures.items() if value is not None}


def _confusion_image(window: RoutingTotals, mixture: Mixture) -> np.ndarray:
    names_zh = {family["key"]: family["names_zh"][0] for family in mixture.taxonomy.get("families", ())
                if family.get("names_zh")}
    image = plots.render(lambda figure: plots.confusion(
        figure.subplots(), "labels and the router's choices", plots.family_labels(mixture.families, names_zh),
        window.confusion_EE.numpy(), "clips"), *plots.confusion_size(window.experts), _DPI)
    return np.asarray(image)


def _advised_settings(settings: TrainMoeSettings) -> dict[str, float]:
    loss = settings.routing_loss
    return {"routing_loss.balance": loss.balance, "routing_loss.entropy": loss.entropy,
            "routing_loss.teacher_kl": loss.teacher_kl, "data.balance": settings.data.balance}


class ExpertGradients(Callback):
    """√(Σ ‖∇A_f‖² + ‖∇B_f‖²) for each expert f, over the layers of the noise expert that was stepped.

    After clipping, every `every` steps of the run.
    """

    name = "expert_gradients"

    def __init__(self, adapters: Mapping[NoiseExpert, Adapter], every: int) -> None:
        self._adapters, self._interval = adapters, every

    def after_update(self, result: StepResult) -> dict[str, Tensor | float]:
        if result.step % self._interval:
            return {}
        adapter = self._adapters[result.noise_expert]
        layers = [layer for layer in adapter.layers.values() if layer.down_RI.grad is not None]
        if not layers:
            return {}
        squares_G = torch.zeros(len(adapter.group_names), device=layers[0].down_RI.device)
        for layer in layers:
            assert layer.down_RI.grad is not None and layer.up_OR.grad is not None
            squares_R = layer.down_RI.grad.square().sum(dim=1) + layer.up_OR.grad.square().sum(dim=0)
            squares_G.index_add_(0, layer.group_of_row_R[len(layer.frozen_down_RI) :], squares_R.to(squares_G))
        trained = {group.column for layer in layers for group in layer.groups if group.trainable}
        norms = squares_G.sqrt()
        return {f"grad_norm_of/{name}": norms[i] for i, name in enumerate(adapter.group_names) if i in trained}
