"""A mixture at a given mix as a plain LoRA, for tools without a router.

    ΔW = w̄·Σ_e g_e·α_e/r_e·B_e A_e,    w̄ = mean of w(σ) over the noise expert's inference sigmas

Exact if w is constant over those sigmas; `gate_range` tells how far w is from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lapwan.lora.combine import concatenate
from lapwan.lora.state import AdapterState
from lapwan.moe.mixture import Mixture
from lapwan.names import Band, NoiseExpert


def inference_sigmas(mixture: Mixture, noise_expert: NoiseExpert) -> list[float]:
    """σ_i = s·t_i / (1 + (s − 1)·t_i), t = linspace(1, 1/1000, N + 1) without its end (diffusers' UniPC grid): those of
    the base model's N sampling steps that are in the band of `noise_expert`.

    Args:
        mixture: its spec holds the base model's N steps, flow shift s and bands.
        noise_expert: whose band.
    """
    spec = mixture.spec
    band = Band(*spec.bands[noise_expert])
    t_N = torch.linspace(1, 1 / 1000, spec.steps + 1, dtype=torch.float64)[:-1]
    sigmas = (spec.flow_shift * t_N / (1 + (spec.flow_shift - 1) * t_N)).tolist()
    return [sigma for sigma in sigmas if sigma in band]


@dataclass(frozen=True)
class GateRange:
    """Mean and range of w(σ)."""

    mean: float
    lowest: float
    highest: float


def gate_range(mixture: Mixture, noise_expert: NoiseExpert, sigmas: Sequence[float]) -> GateRange:
    """Mean and range of w(σ) of a noise expert over `sigmas`.

    Args:
        mixture: a mixture with a timestep gate for this noise expert.
        noise_expert: whose w.
        sigmas: noise levels to average over, see `inference_sigmas`; at least one.
    """
    with torch.no_grad():
        w = mixture.timestep_gate(noise_expert)(torch.tensor(sigmas, dtype=torch.float32)).double()
    return GateRange(float(w.mean()), float(w.min()), float(w.max()))


def mixture_to_lora(mixture: Mixture, noise_expert: NoiseExpert, mix: Sequence[float], w_bar: float) -> AdapterState:
    """The concatenated LoRA of a noise expert; families with weight 0 are left out.

    Args:
        mixture: the mixture.
        noise_expert: whose LoRA experts.
        mix: g in the order of the families, with α_e multiplied in if wanted.
        w_bar: mean of w(σ), see `gate_range`.

    Raises:
        ValueError: a mix of the wrong length, or all zero.
    """
    if len(mix) != len(mixture.families):
        raise ValueError(f"{len(mix)} weights for {len(mixture.families)} families")
    states = mixture.states[noise_expert]
    parts = [(states[f], w_bar * g) for f, g in zip(mixture.families, mix, strict=True) if g != 0]
    if not parts:
        raise ValueError("the mix is all zero: nothing is left of the mixture")
    return concatenate(parts)
