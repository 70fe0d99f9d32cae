"""Random LoRAs and mixtures for the embedded model, and the command as it is typed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.models.spec import ModelSpec
from lapwan.moe.mixture import Mixture, MixtureSpec

SMALL = ("--num-frames", "5", "--size", "32x48", "--steps", "3", "--guidance", "1")
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
        base={e: spec.fingerprint(e) for e in spec.noise_experts}, **kwargs,
    )
    states = {
        e: {family: random_lora(100 * i + j) for j, family in enumerate(taxonomy.keys)}
        for i, e in enumerate(spec.noise_experts)
    }
    return Mixture(facts, states).requires_grad_(False)


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def generate(lapwan, *arguments: str, model: str = "tiny", prompt: str = "电凝钩切割组织", output: str = "a") -> Ran:
    return lapwan("generate", "--model", model, "--prompt", prompt, "-o", output, *SMALL, *arguments)


def frames(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def refused(ran: Ran, *words: str) -> None:
    """Exit code 2, and one line on stderr with these words."""
    assert ran.code == 2, ran
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ran.err, ran.err
    for word in words:
        assert word in lines[0], lines[0]
