"""Small caches of random latents in the real layout."""

from __future__ import annotations

from pathlib import Path

import torch

from lapwan.caching.index import CachedItem, CacheIndex, write_index
from lapwan.caching.layout import recipe_fingerprint, write_latents, write_prompts, write_roi, write_text_features
from lapwan.models.spec import ModelSpec

FAMILIES = ("scissors", "hook", "suction", "other")


def write_random_cache(folder: Path, spec: ModelSpec, clips: int = 4, labelled: bool = True, seed: int = 0,
                       families: tuple[str, ...] = FAMILIES, size: tuple[int, int] = (32, 32)) -> Path:
    """A cache of random latents (5 frames of `size`) with families in turn and a region on every even clip."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    channels, time, height, width = spec.latent_shape(5, *size)
    items = []
    for index in range(clips):
        stem = f"clip{index}"
        latents = torch.randn(channels, time, height, width, generator=generator)
        condition = torch.randn(20, time, height, width, generator=generator) if spec.task == "i2v" else None
        write_latents(folder / f"{stem}_wan.safetensors", latents, condition, (size[1], size[0]), 5, {})
        text = torch.randn(3 + index, spec.text_dim, generator=generator)
        write_text_features(folder / f"{stem}_wan_te.safetensors", text, stem, {})
        region = index % 2 == 0
        if region:
            mask = (torch.rand(time, height, width, generator=generator) > 0.5).float()
            write_roi(folder / f"{stem}_lapwan_roi.safetensors", mask.numpy(), {})
        weights = tuple(float(e == index % len(families)) for e in range(len(families)))
        items.append(CachedItem(
            id=stem, latents=f"{stem}_wan.safetensors", text=f"{stem}_wan_te.safetensors", caption=stem, frames=5,
            height=size[0], width=size[1], roi=f"{stem}_lapwan_roi.safetensors" if region else None,
            condition=condition is not None, label=index % len(families) if labelled else None,
            label_weights=weights if labelled else None, fallback=labelled and index == clips - 1,
            fingerprints={kind: recipe_fingerprint({}) for kind in ("latents", "text", "roi")},
        ))
    empty = torch.randn(1, spec.text_dim, generator=generator)
    write_prompts(folder / "lapwan_prompts.safetensors", empty, empty.clone(), {})
    write_index(CacheIndex(folder, tuple(items), task=spec.task, fps=16.0, text_dim=spec.text_dim,
                           taxonomy="surgical4" if labelled else None))
    return folder
