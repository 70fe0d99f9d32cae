"""A mixture and LoRAs with random non-zero weights, and a folder of held-out clips, for the embedded model."""

from __future__ import annotations

from pathlib import Path

import torch

from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.formats import write_lora
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.models.base import Base
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.names import NoiseExpert

_MODULES = {"blocks.2.attn1.to_v": (192, 192), "blocks.7.attn2.to_q": (192, 192), "blocks.5.ffn.net.0.proj": (768, 192)}


def random_lora(seed: int, **metadata: str) -> LoraState:
    generator = torch.Generator().manual_seed(seed)
    entries = {
        path: LoraEntry(0.3 * torch.randn(3, n_in, generator=generator),
                        0.3 * torch.randn(n_out, 3, generator=generator), 3.0)
        for path, (n_out, n_in) in _MODULES.items()
    }
    return LoraState(entries, {key.replace("__", "."): value for key, value in metadata.items()})


def write_random_lora(folder: Path, seed: int = 1) -> list[str]:
    """A LoRA for each noise expert, named as train-lora names them, as arguments."""
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, noise_expert in enumerate(NoiseExpert):
        path = folder / f"lapwan_{noise_expert.file_suffix}.safetensors"
        write_lora(path, random_lora(seed + i, lapwan__noise_expert=noise_expert.value, lapwan__task="t2v"))
        made.append(f"{noise_expert.value}={path}")
    return made


def write_random_mixture(path: Path, base: Base) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = base.spec
    taxonomy = load_taxonomy("surgical4")
    torch.manual_seed(5)
    facts = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task=spec.task, text_dim=spec.text_dim,
        bands={e: (band.low, band.high) for e, band in spec.bands.items()},
        base={e: base.fingerprint(e) for e in spec.noise_experts},
    )
    states = {e: {family: random_lora(100 * i + j) for j, family in enumerate(taxonomy.keys)}
              for i, e in enumerate(spec.noise_experts)}
    write_mixture(path, Mixture(facts, states).requires_grad_(False))
    return path
