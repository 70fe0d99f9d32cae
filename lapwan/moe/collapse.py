"""A mixture at one given mix as a plain LoRA, for tools that know no router.

    ΔW = w̄·Σ_e g_e·α_e/r_e·B_e A_e,    w̄ = mean of w(σ) over the noise expert's inference sigmas

Exact where w is constant over those sigmas; the spread of w says how far it is from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lapwan.lora.combine import concatenate
from lapwan.lora.state import LoraState
from lapwan.moe.mixture import Mixture
from lapwan.names import NoiseExpert


@dataclass(frozen=True)
class GateSpread:
    """w(σ) over the sigmas it was averaged over."""

    mean: float
    lowest: float
    highest: float


def gate_spread(mixture: Mixture, expert: NoiseExpert, sigmas: Sequence[float]) -> GateSpread:
    """Mean and range of a noise expert's w(σ) over `sigmas`."""
    with torch.no_grad():
        w = mixture.timestep_gate(expert)(torch.tensor(sigmas, dtype=torch.float32)).double()
    return GateSpread(float(w.mean()), float(w.min()), float(w.max()))


def collapse(mixture: Mixture, expert: NoiseExpert, mix: Sequence[float], w_bar: float) -> LoraState:
    """The concatenated LoRA of a noise expert; families whose weight in the mix is 0 are left out.

    Args:
        mix: g in the families' order, with α_e multiplied in if wanted.

    Raises:
        ValueError: a mix of the wrong length, or one that is all zero.
    """
    if len(mix) != len(mixture.families):
        raise ValueError(f"{len(mix)} weights for {len(mixture.families)} families")
    states = mixture.states[expert]
    parts = [(states[f], w_bar * g) for f, g in zip(mixture.families, mix, strict=True) if g != 0]
    if not parts:
        raise ValueError("the mix is all zero: nothing is left of the mixture")
    return concatenate(parts)
