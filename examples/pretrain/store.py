"""What a pretraining run leaves: trained parts as safetensors, figures as JSON, sheets as PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from examples.pretrain.diffusion import Models, new_models
from examples.pretrain.settings import Recipe
from examples.pretrain.vae import new_vae
from lapwan.files import atomic_file, write_text
from lapwan.tiny.model import TEXT_FILE, EmbeddedParts


def save_module(module: torch.nn.Module, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Weights rounded to `dtype`, a shared tensor once, under its first name (T5 keeps its embedding under two)."""
    seen: set[int] = set()
    state = {}
    for name, value in module.state_dict().items():
        if value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        state[name] = value.detach().to("cpu", dtype).contiguous()
    with atomic_file(path) as temporary:
        save_file(state, temporary)


def _load(module: torch.nn.Module, path: Path) -> None:
    missing, unexpected = module.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    if unexpected or any("embed_tokens" not in name for name in missing):
        raise ValueError(f"{path} does not fit: missing {missing}, unexpected {unexpected}")


def save_vae(vae: Any, parts: EmbeddedParts, folder: Path) -> None:
    """Weights and the latents' statistics."""
    save_module(vae, folder / parts.vae_file)
    stats = {"latents_mean": list(vae.config.latents_mean), "latents_std": list(vae.config.latents_std)}
    write_text(folder / parts.latents_file, json.dumps(stats, indent=2) + "\n")


def load_vae(parts: EmbeddedParts, folder: Path, device: torch.device) -> Any:
    """The autoencoder as it is shipped (rounded)."""
    vae = new_vae(parts)
    _load(vae, folder / parts.vae_file)
    vae.register_to_config(**json.loads((folder / parts.latents_file).read_text(encoding="utf-8")))
    return vae.requires_grad_(False).eval().to(device)


def save_models(models: Models, folder: Path) -> None:
    """The noise experts, and the text encoder if it was trained."""
    if models.recipe.diffusion.train_text:
        save_module(models.text, folder / TEXT_FILE)
    for noise_expert, backbone in models.noise_experts.items():
        save_module(backbone.transformer, folder / models.recipe.parts.transformer_files[noise_expert])


def fill_models(models: Models, folder: Path) -> None:
    """Noise experts, and the text encoder if it is trained, as they are shipped (rounded)."""
    if models.recipe.diffusion.train_text:
        _load(models.text, folder / TEXT_FILE)
    for noise_expert, backbone in models.noise_experts.items():
        _load(backbone.transformer, folder / models.recipe.parts.transformer_files[noise_expert])


def load_models(recipe: Recipe, folder: Path, vocabulary: int, device: torch.device) -> Models:
    """Noise experts and text encoder as they are shipped (rounded)."""
    models = new_models(recipe, vocabulary, torch.device("cpu"))
    fill_models(models, folder)
    models.modules().requires_grad_(False).eval().to(device)
    return models


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Figures for the README."""
    write_text(path, json.dumps(figures, indent=2) + "\n")


def write_sheet(
    videos: list[np.ndarray], path: Path, titles: list[str] | None = None, columns: int = 6, wide: int = 1
) -> None:
    """One row a video, `columns` frames of it, `wide` videos beside each other; titles of ASCII text only.

    Frames of more than 96 pixels are shown at every second one.
    """
    rows = []
    for index, frames in enumerate(videos):
        every = max(1, frames.shape[2] // 96)
        picked = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int), ::every, ::every]
        row = np.concatenate(list(picked), axis=1)
        if titles is not None:
            bar = Image.new("RGB", (row.shape[1], 12), "white")
            ImageDraw.Draw(bar).text((2, 0), titles[index], fill="black")
            row = np.concatenate([np.asarray(bar), row])
        rows.append(np.pad(row, ((0, 2), (0, 4), (0, 0))))
    rows += [np.zeros_like(rows[0])] * (-len(rows) % wide)
    lines = [np.concatenate(rows[i:i + wide], axis=1) for i in range(0, len(rows), wide)]
    Image.fromarray(np.concatenate(lines)).save(path, optimize=True)
