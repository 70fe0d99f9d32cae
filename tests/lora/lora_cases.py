"""Small random transformers and LoRAs for the tests of LoRA files and merging."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.commands.merge import run
from lapwan.lora.state import AdapterState, LowRank
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings

BLOCKS = 3
HIDDEN, FFN, TEXT = 24, 40, 16


def shapes(
    blocks: Iterable[int] = range(BLOCKS), projections: Iterable[str] = PROJECTIONS
) -> dict[str, tuple[int, int]]:
    """[out, in] by diffusers' path, for the small transformer's block Linears."""
    sizes = {"ffn.0": (FFN, HIDDEN), "ffn.2": (HIDDEN, FFN)}
    return {
        f"blocks.{b}.{PROJECTIONS[p]}": sizes.get(p, (HIDDEN, HIDDEN)) for b in blocks for p in projections
    }


def random_state(
    sizes: dict[str, tuple[int, int]], rank: int = 4, alpha: float | None = None, dtype: torch.dtype = torch.float32,
    seed: int = 0, metadata: dict[str, str] | None = None,
) -> AdapterState:
    """Random A and B; `alpha` None gives alpha = r, a number the same for all modules."""
    generator = torch.Generator().manual_seed(seed)
    entries = {
        path: LowRank(
            torch.randn(rank, n_in, generator=generator).to(dtype) * 0.3,
            torch.randn(n_out, rank, generator=generator).to(dtype) * 0.3,
            float(rank if alpha is None else alpha),
        )
        for path, (n_out, n_in) in sizes.items()
    }
    return AdapterState(entries, metadata or {})


def make_transformer(seed: int, in_channels: int = 16) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=in_channels, out_channels=16,
        text_dim=TEXT, freq_dim=16, ffn_dim=FFN, num_layers=BLOCKS, rope_max_seq_len=32,
    ).eval()


def velocity(transformer: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The transformer's output on one fixed input, in fp64 so that only the weights' rounding shows."""
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(1, transformer.config.in_channels, 2, 4, 4, generator=generator, dtype=dtype)
    text = torch.randn(1, 5, TEXT, generator=generator, dtype=dtype)
    with torch.no_grad():
        return transformer.to(dtype)(latents, torch.tensor([700.0]), text, return_dict=False)[0]


def merge(dry_run: bool = False, overwrite: bool = False, **options: object) -> None:
    """`lapwan merge` with these options."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    run(load(MergeSettings, options=values, environment={}), RunOptions(dry_run, overwrite))
