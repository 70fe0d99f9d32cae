"""How a mixture's gates act: timestep gates and router as the file has them, and routing over a run's metrics.

    w̄ = mean of w(σ) over the noise expert's own sampling sigmas;   H = −Σ_e p_e ln p_e of the router before top-k

What a text router says depends on the prompts, which a file does not hold: its usage comes from `metrics.jsonl`. A
label router is a function of the label alone, so its answer to each family is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lapwan.diagnostics.lora_figures import Figures
from lapwan.losses.routing import entropy
from lapwan.moe.mixture import Mixture
from lapwan.moe.to_lora import gate_spread, inference_sigmas
from lapwan.names import NoiseExpert

_USAGE = "metrics/expert_usage_"
# Figure in a window -> its key in metrics.jsonl, where it is the mean over a step's clips.
_KEYS = {"entropy": "loss/routing_entropy", "accuracy": "metrics/routing_accuracy", "teacher_kl": "loss/teacher_kl"}
_WINDOWS, FEWEST_LINES = 20, 20


def timestep_gate(mixture: Mixture, noise_expert: NoiseExpert) -> dict[str, Any]:
    """The curve w(σ) by its knots, and what it amounts to over the base model's own sampling steps (None: none)."""
    gate = mixture.timestep_gate(noise_expert)
    sigmas = torch.linspace(gate.low, gate.high, gate.knots)
    with torch.no_grad():
        strengths = gate(sigmas).tolist()
    grid = inference_sigmas(mixture, noise_expert)
    spread = gate_spread(mixture, noise_expert, grid) if grid else None
    return {
        "sigma": sigmas.tolist(), "strength": strengths, "min": min(strengths),
        "mean": math.fsum(strengths) / len(strengths), "max": max(strengths),
        "sampling": None if spread is None else {
            "steps": len(grid), "mean": spread.mean, "min": spread.lowest, "max": spread.highest},
    }


def effective(mixture: Mixture, noise_expert: NoiseExpert, figures: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    """By family: its α / r (None where modules differ), and w̄·‖ΔW_e‖, the size of its change when it acts alone."""
    grid = inference_sigmas(mixture, noise_expert)
    mean = gate_spread(mixture, noise_expert, grid).mean if grid else None
    found: dict[str, dict[str, Any]] = {}
    for family, state in mixture.states[noise_expert].items():
        scales = {entry.scale for entry in state.entries.values()}
        norm = figures[family].delta_norm
        found[family] = {
            "alpha_over_rank": scales.pop() if len(scales) == 1 else None,
            "gated_norm": None if norm is None or mean is None else mean * norm,
        }
    return found


def router(mixture: Mixture) -> dict[str, Any]:
    """What the file says of the router; `by_label` is its answer before top-k to each family's label (label router)."""
    spec, families = mixture.spec, mixture.families
    said: dict[str, Any] = {
        "kind": spec.router, "top_k": spec.top_k, "temperature": spec.router_temperature, "families": list(families),
        "parameters": sum(p.numel() for p in mixture.router.parameters()), "largest_entropy": math.log(len(families)),
        "by_label": None,
    }
    if spec.router == "label":
        with torch.no_grad():
            # In the middle of sigma, for a router that sees it.
            middle_E = torch.full((len(families),), 0.5)
            answers_EE = mixture.route([], torch.eye(len(families)), middle_E)
        said["by_label"] = {
            family: {"mix": dict(zip(families, row.tolist(), strict=True)), "entropy": float(entropy(row[None]))}
            for family, row in zip(families, answers_EE, strict=True)
        }
    return said


def routing(lines: Sequence[Mapping[str, Any]], families: Sequence[str], step: int | None) -> list[dict[str, Any]]:
    """Usage of each expert after top-k, entropy, accuracy and KL over up to 20 windows of a run, until `step`.

    A window has 20 `lines` or more, where the run has: a line may be of one clip. Its figure is the mean over its lines
    that have it; None where no line has.
    """
    own = [line for line in lines if all(f"{_USAGE}{family}" in line for family in families)
           and isinstance(line.get("step"), int) and (step is None or line["step"] <= step)]
    count = min(_WINDOWS, max(1, len(own) // FEWEST_LINES)) if own else 0
    windows = []
    for n in range(count):
        part = own[n * len(own) // count : (n + 1) * len(own) // count]
        window: dict[str, Any] = {"from_step": part[0]["step"], "to_step": part[-1]["step"], "lines": len(part)}
        window["usage"] = {family: _mean(part, f"{_USAGE}{family}") for family in families}
        windows.append(window | {name: _mean(part, key) for name, key in _KEYS.items()})
    return windows


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
    return math.fsum(values) / len(values) if values else None
