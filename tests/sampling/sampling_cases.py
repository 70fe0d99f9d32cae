"""Random LoRAs and mixtures for the embedded model."""

from __future__ import annotations

import torch

from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.wan.folder import ModelSpec

MODULES = {
    "blocks.3.attn1.to_q": (192, 192), "blocks.7.attn2.to_v": (192, 192), "blocks.7.ffn.net.0.proj": (768, 192),
}


def random_lora(seed: int, scale: float = 0.2, rank: int = 4, metadata: dict[str, str] | None = None) -> LoraState:
    """Random A and B (so that ΔW ≠ 0), alpha = rank / 2 (so that alpha / rank matters)."""
    generator = torch.Generator().manual_seed(seed)
    entries = {
        path: LoraEntry(
            torch.randn(rank, n_in, generator=generator) * scale, torch.randn(n_out, rank, generator=generator) * scale,
            rank / 2,
        )
        for path, (n_out, n_in) in MODULES.items()
    }
    return LoraState(entries, metadata or {})


def random_mixture(spec: ModelSpec, seed: int = 0, **kwargs: object) -> Mixture:
    """A surgical4 mixture for the model with random non-zero experts, router and timestep gates."""
    taxonomy = load_taxonomy("surgical4")
    torch.manual_seed(seed)
    facts = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task=spec.task, text_dim=spec.text_dim,
        bands={e: (band.low, band.high) for e, band in spec.bands.items()},
        base={e: spec.fingerprint(e) for e in spec.experts}, **kwargs,
    )
    states = {
        e: {family: random_lora(100 * i + j) for j, family in enumerate(taxonomy.keys)}
        for i, e in enumerate(spec.experts)
    }
    return Mixture(facts, states).requires_grad_(False)
