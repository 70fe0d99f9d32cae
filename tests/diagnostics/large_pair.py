"""A LoRA pair of Wan-14B's size: 400 modules of rank 32 for each noise expert, in bf16."""

from __future__ import annotations

from pathlib import Path

import torch

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank


def write_pair(folder: Path) -> list[Path]:
    """Write `high_noise.safetensors` and `low_noise.safetensors`; random A and B."""
    generator = torch.Generator().manual_seed(0)
    paths: list[Path] = []
    for label in ("high", "low"):
        entries = {}
        for block in range(40):
            for original, path in PROJECTIONS.items():
                n_out, n_in = {"ffn.0": (13824, 5120), "ffn.2": (5120, 13824)}.get(original, (5120, 5120))
                down = torch.rand(32, n_in, generator=generator).sub_(0.5).bfloat16()
                up = torch.randn(n_out, 32, generator=generator).mul_(0.002).bfloat16()
                entries[f"blocks.{block}.{path}"] = LowRank(down, up, 32.0)
        paths.append(folder / f"{label}_noise.safetensors")
        write_lora(paths[-1], AdapterState(entries))
    return paths
