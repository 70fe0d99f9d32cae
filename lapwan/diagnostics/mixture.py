"""Numbers about a mixture: each expert's norms, how much experts overlap, and the timestep gates' curves.

    overlap(i, j) = ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖),  over all modules: 1 the same change, 0 unrelated, −1 opposed

Inner products of all pairs come from one product of the concatenated factors, module by module.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lapwan.checkpoints.container import read_header
from lapwan.diagnostics.gates import effective, timestep_gate
from lapwan.diagnostics.lora_figures import measure, summarise
from lapwan.lora.state import LoraEntry
from lapwan.moe.mixture import Mixture
from lapwan.moe.mixture_file import is_mixture, read_mixture
from lapwan.names import NoiseExpert


@dataclass(frozen=True)
class MixtureSide:
    """One noise expert's experts as modules named `{module path}.{family}`, as far as figures and growth need it."""

    path: Path
    metadata: dict[str, str]
    mixture: Mixture
    noise_expert: NoiseExpert

    @property
    def modules(self) -> dict[str, LoraEntry]:
        """Every expert's modules."""
        states = self.mixture.states[self.noise_expert]
        return {f"{path}.{family}": e for family, state in states.items() for path, e in state.entries.items()}

    def fingerprint(self) -> str:
        """Identity of the experts' content, to tell a copy from another file."""
        return "".join(state.fingerprint() for state in self.mixture.states[self.noise_expert].values())


def is_mixture_file(path: Path) -> bool:
    """True if the file's metadata says it is a mixture."""
    return is_mixture(read_header(path).metadata)


def open_mixture(path: Path) -> dict[str, MixtureSide]:
    """The mixture's sides by label (`high`, `low`).

    Raises:
        UserError: a damaged mixture.
    """
    metadata, mixture = read_header(path).metadata, read_mixture(path)
    return {noise_expert.value: MixtureSide(path, metadata, mixture, noise_expert) for noise_expert in mixture.noise_experts}


def describe(side: MixtureSide) -> dict[str, Any]:
    """The `mixture` part of the JSON for one noise expert: families, overlap, timestep gate."""
    states = side.mixture.states[side.noise_expert]
    figures = {family: summarise(measure(state.entries)) for family, state in states.items()}
    acting = effective(side.mixture, side.noise_expert, figures)
    return {
        "families": {family: asdict(one) | acting[family] for family, one in figures.items()},
        "overlap": overlap({family: state.entries for family, state in states.items()}),
        "timestep_gate": timestep_gate(side.mixture, side.noise_expert),
    }


def overlap(families: dict[str, dict[str, LoraEntry]]) -> dict[str, dict[str, float | None]]:
    """The matrix of overlaps by family; None where an expert is still zero or not finite."""
    names = list(families)
    products = torch.zeros(len(names), len(names), dtype=torch.float64)
    for path in dict.fromkeys(path for entries in families.values() for path in entries):
        own = [(n, families[name][path]) for n, name in enumerate(names) if path in families[name]]
        down = torch.cat([entry.down.double() for _, entry in own])
        up = torch.cat([entry.up.double() * entry.scale for _, entry in own], dim=1)
        owner = torch.cat([torch.full((entry.rank,), n) for n, entry in own])
        blocks = (down @ down.T) * (up.T @ up)
        # Sum each block [r_i, r_j] into its pair: first over rows, then over columns.
        rows = torch.zeros(len(names), len(owner), dtype=torch.float64).index_add_(0, owner, blocks)
        products.index_add_(1, owner, rows)
    norms = products.diagonal().clamp_min(0).sqrt()
    cosines = products / norms.outer(norms)
    return {
        a: {b: cosines[i, j].item() if math.isfinite(cosines[i, j].item()) else None for j, b in enumerate(names)}
        for i, a in enumerate(names)
    }
