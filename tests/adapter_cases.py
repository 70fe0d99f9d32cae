"""LoRAs and mixtures with random non-zero weights for the embedded model."""

from __future__ import annotations

from pathlib import Path

import torch

from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.names import NoiseExpert

MODULES = {
    "blocks.3.attn1.to_q": (192, 192), "blocks.7.attn2.to_v": (192, 192), "blocks.7.ffn.net.0.proj": (768, 192),
}


def random_lora(seed: int, scale: float = 0.2, rank: int = 4, metadata: dict[str, str] | None = None) -> AdapterState:
    """Random A and B (so that ΔW ≠ 0), alpha = rank / 2 (so that alpha / rank matters)."""
    generator = torch.Generator().manual_seed(seed)
    entries = {
        path: LowRank(
            torch.randn(rank, n_in, generator=generator) * scale, torch.randn(n_out, rank, generator=generator) * scale,
            rank / 2,
        )
        for path, (n_out, n_in) in MODULES.items()
    }
    return AdapterState(entries, metadata or {})


def write_random_lora(folder: Path, seed: int = 1) -> list[str]:
    """A LoRA for each noise expert, named as train-lora names them, as arguments."""
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, noise_expert in enumerate(NoiseExpert):
        path = folder / f"lapwan_{noise_expert.file_suffix}.safetensors"
        metadata = {"lapwan.noise_expert": noise_expert.value, "lapwan.task": "t2v"}
        write_lora(path, random_lora(seed + i, metadata=metadata))
        made.append(f"{noise_expert.value}={path}")
    return made


def random_mixture(base: Base | ModelSpec, seed: int = 0, **facts: object) -> Mixture:
    """A surgical4 mixture for the base with random non-zero experts, router and timestep gates."""
    spec = base if isinstance(base, ModelSpec) else base.spec
    taxonomy = load_taxonomy("surgical4")
    torch.manual_seed(seed)
    made = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task=spec.task, text_dim=spec.text_dim,
        bands={e: (band.low, band.high) for e, band in spec.bands.items()},
        base={e: base.fingerprint(e) for e in spec.noise_experts}, **facts,
    )
    states = {
        e: {family: random_lora(100 * i + j) for j, family in enumerate(taxonomy.keys)}
        for i, e in enumerate(spec.noise_experts)
    }
    return Mixture(made, states).requires_grad_(False)


def write_random_mixture(path: Path, base: Base | ModelSpec) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mixture(path, random_mixture(base))
    return path
