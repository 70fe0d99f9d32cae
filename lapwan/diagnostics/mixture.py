"""Numbers about a mixture: its experts' norms and overlaps, timestep gates, router, and routing over a run.

    overlap(i, j) = ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖),  over all modules: 1 the same change, 0 unrelated, −1 opposed
    w̄ = mean of w(σ) over the noise expert's own sampling sigmas;   H = −Σ_e p_e ln p_e of the router before top-k

The gates of a text router depend on the prompts, which a file does not hold: its usage is read from `metrics.jsonl`.
A label router is a function of the label alone, so its gates for each family are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lapwan.checkpoints.container import read_header
from lapwan.diagnostics.lora_figures import Figures, mean, measure, summarise
from lapwan.lora.state import LowRank
from lapwan.losses.routing import entropy
from lapwan.moe.mixture import Mixture
from lapwan.moe.mixture_file import is_mixture, read_mixture
from lapwan.moe.to_lora import gate_range, inference_sigmas
from lapwan.names import NoiseExpert

_USAGE = "metrics/expert_usage_"
# Figure in a window -> its key in metrics.jsonl, where it is the mean over a step's clips.
_KEYS = {"entropy": "loss/routing_entropy", "accuracy": "metrics/routing_accuracy", "teacher_kl": "loss/teacher_kl"}
_MAX_WINDOWS, MIN_WINDOW_LINES = 20, 20


@dataclass(frozen=True)
class NoiseExpertMixture:
    """A mixture's experts for one noise expert, as modules named `{module path}.{family}`."""

    path: Path
    metadata: dict[str, str]
    mixture: Mixture
    noise_expert: NoiseExpert

    @property
    def modules(self) -> dict[str, LowRank]:
        """Every expert's modules."""
        states = self.mixture.states[self.noise_expert]
        return {f"{path}.{family}": e for family, state in states.items() for path, e in state.low_rank(family).items()}

    def fingerprint(self) -> str:
        """Identity of the experts' content, to tell a copy from another file."""
        return "".join(state.fingerprint() for state in self.mixture.states[self.noise_expert].values())


def is_mixture_file(path: Path) -> bool:
    """True if the file's metadata is a mixture's."""
    return path.suffix == ".safetensors" and is_mixture(read_header(path).metadata)


def open_mixture(path: Path) -> dict[str, NoiseExpertMixture]:
    """The mixture by noise expert, under the labels `high` and `low`.

    Raises:
        UserError: a damaged mixture.
    """
    metadata, mixture = read_header(path).metadata, read_mixture(path)
    return {e.value: NoiseExpertMixture(path, metadata, mixture, e) for e in mixture.noise_experts}


def mixture_json(source: NoiseExpertMixture) -> dict[str, Any]:
    """The `mixture` part of the JSON for one noise expert: families, overlap, timestep gate."""
    mixture, noise_expert = source.mixture, source.noise_expert
    states = mixture.states[noise_expert]
    figures = {family: summarise(measure(state.entries)) for family, state in states.items()}
    gated = gated_norms(mixture, noise_expert, figures)
    return {
        "families": {family: asdict(family_figures) | gated[family] for family, family_figures in figures.items()},
        "overlap": overlap({family: state.low_rank(family) for family, state in states.items()}),
        "timestep_gate": timestep_gate(mixture, noise_expert),
    }


def overlap(families: Mapping[str, Mapping[str, LowRank]]) -> dict[str, dict[str, float | None]]:
    """The matrix of overlaps by family; None where an expert is zero or not finite.

    The inner products of all pairs come from one product of the concatenated factors, module by module.
    """
    names = list(families)
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    for path in dict.fromkeys(path for entries in families.values() for path in entries):
        entries = [(n, families[name][path]) for n, name in enumerate(names) if path in families[name]]
        down = torch.cat([entry.down.double() for _, entry in entries])
        up = torch.cat([entry.up.double() * entry.scale for _, entry in entries], dim=1)
        expert = torch.cat([torch.full((entry.rank,), n) for n, entry in entries])
        blocks = (down @ down.T) * (up.T @ up)
        # Sum each block [r_i, r_j] into its pair: first over rows, then over columns.
        rows = torch.zeros(len(names), len(expert), dtype=torch.float64).index_add_(0, expert, blocks)
        products.index_add_(1, expert, rows)
    norms = products.diagonal().clamp_min(0).sqrt()
    cosines = products / norms.outer(norms)
    return {
        a: {b: cosines[i, j].item() if math.isfinite(cosines[i, j].item()) else None for j, b in enumerate(names)}
        for i, a in enumerate(names)
    }


def timestep_gate(mixture: Mixture, noise_expert: NoiseExpert) -> dict[str, Any]:
    """The curve w(σ) at its knots, and its range over the base model's sampling sigmas (None if those are unknown).

    Args:
        mixture: the mixture.
        noise_expert: whose gate.
    """
    gate = mixture.timestep_gate(noise_expert)
    sigmas = torch.linspace(gate.low, gate.high, gate.knots)
    with torch.no_grad():
        strengths = gate(sigmas).tolist()
    grid = inference_sigmas(mixture, noise_expert)
    sampled = gate_range(mixture, noise_expert, grid) if grid else None
    return {
        "sigma": sigmas.tolist(), "strength": strengths, "min": min(strengths),
        "mean": mean(strengths), "max": max(strengths),
        "sampling": None if sampled is None else {
            "steps": len(grid), "mean": sampled.mean, "min": sampled.lowest, "max": sampled.highest},
    }


def gated_norms(
    mixture: Mixture, noise_expert: NoiseExpert, figures: Mapping[str, Figures]
) -> dict[str, dict[str, Any]]:
    """By family: α / r (None where modules differ), and w̄·‖ΔW_e‖, the norm of its change when it acts alone.

    Args:
        mixture: the mixture; w̄ is the mean of w(σ) over its sampling sigmas.
        noise_expert: whose experts.
        figures: of each LoRA expert, by family.
    """
    grid = inference_sigmas(mixture, noise_expert)
    mean = gate_range(mixture, noise_expert, grid).mean if grid else None
    norms: dict[str, dict[str, Any]] = {}
    for family, state in mixture.states[noise_expert].items():
        scales = {entry.scale for entry in state.entries.values()}
        norm = figures[family].delta_norm
        norms[family] = {
            "alpha_over_rank": scales.pop() if len(scales) == 1 else None,
            "gated_norm": None if norm is None or mean is None else mean * norm,
        }
    return norms


def describe_router(mixture: Mixture) -> dict[str, Any]:
    """The `router` part of the JSON; `by_label` holds a label router's gates before top-k for each family's label."""
    spec, families = mixture.spec, mixture.families
    description: dict[str, Any] = {
        "kind": spec.router, "top_k": spec.top_k, "temperature": spec.router_temperature, "families": list(families),
        "parameters": sum(p.numel() for p in mixture.router.parameters()), "largest_entropy": math.log(len(families)),
        "by_label": None,
    }
    if mixture.router.learned and not mixture.router.reads_text:
        with torch.no_grad():
            # At sigma = 0.5, for a router that reads sigma.
            sigma_E = torch.full((len(families),), 0.5)
            gates_EE = mixture.route([], torch.eye(len(families)), sigma_E)
        description["by_label"] = {
            family: {"mix": dict(zip(families, row.tolist(), strict=True)), "entropy": float(entropy(row[None]))}
            for family, row in zip(families, gates_EE, strict=True)
        }
    return description


def routing_windows(
    lines: Sequence[Mapping[str, Any]], families: Sequence[str], step: int | None
) -> list[dict[str, Any]]:
    """Usage of each expert after top-k, entropy, accuracy and KL over up to 20 windows of a run, until `step`.

    A window has at least 20 lines of metrics.jsonl, if the run has as many: a line may cover a single clip. A figure is
    the mean over the window's lines that have it; None if no line has.

    Args:
        lines: of metrics.jsonl.
        families: keys in the order of the experts.
        step: the last step to count; None: all.
    """
    routed = [line for line in lines if all(f"{_USAGE}{family}" in line for family in families)
              and isinstance(line.get("step"), int) and (step is None or line["step"] <= step)]
    count = min(_MAX_WINDOWS, max(1, len(routed) // MIN_WINDOW_LINES)) if routed else 0
    windows = []
    for n in range(count):
        part = routed[n * len(routed) // count : (n + 1) * len(routed) // count]
        window: dict[str, Any] = {"from_step": part[0]["step"], "to_step": part[-1]["step"], "lines": len(part)}
        window["usage"] = {family: _mean(part, f"{_USAGE}{family}") for family in families}
        windows.append(window | {name: _mean(part, key) for name, key in _KEYS.items()})
    return windows


def _mean(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if isinstance(line.get(key), int | float)]
    return mean(values)
