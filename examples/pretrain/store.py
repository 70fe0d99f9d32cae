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
from examples.pretrain.vae import new_vae
from lapwan.files import atomic_file, write_text
from lapwan.tiny.model import LATENTS_FILE, TEXT_FILE, VAE_FILE, noise_expert_file


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


def save_vae(vae: Any, folder: Path) -> None:
    """Weights and the latents' statistics."""
    save_module(vae, folder / VAE_FILE)
    stats = {"latents_mean": list(vae.config.latents_mean), "latents_std": list(vae.config.latents_std)}
    write_text(folder / LATENTS_FILE, json.dumps(stats, indent=2) + "\n")


def load_vae(folder: Path, device: torch.device) -> Any:
    """The autoencoder as it is shipped (rounded)."""
    vae = new_vae()
    _load(vae, folder / VAE_FILE)
    vae.register_to_config(**json.loads((folder / LATENTS_FILE).read_text(encoding="utf-8")))
    return vae.requires_grad_(False).eval().to(device)


def save_models(models: Models, folder: Path) -> None:
    """Both noise experts and the text encoder."""
    save_module(models.text, folder / TEXT_FILE)
    for noise_expert, backbone in models.noise_experts.items():
        save_module(backbone.transformer, folder / noise_expert_file(noise_expert))


def load_models(folder: Path, vocabulary: int, device: torch.device) -> Models:
    """Noise experts and text encoder as they are shipped (rounded)."""
    models = new_models(vocabulary, torch.device("cpu"))
    _load(models.text, folder / TEXT_FILE)
    for noise_expert, backbone in models.noise_experts.items():
        _load(backbone.transformer, folder / noise_expert_file(noise_expert))
    models.modules().requires_grad_(False).eval().to(device)
    return models


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Figures for the README."""
    write_text(path, json.dumps(figures, indent=2) + "\n")


def write_sheet(
    videos: list[np.ndarray], path: Path, titles: list[str] | None = None, columns: int = 6, wide: int = 1
) -> None:
    """One row a video, `columns` frames of it, `wide` videos beside each other; titles of ASCII text only."""
    rows = []
    for index, frames in enumerate(videos):
        picked = frames[np.linspace(0, len(frames) - 1, columns).round().astype(int)]
        row = np.concatenate(list(picked), axis=1)
        if titles is not None:
            bar = Image.new("RGB", (row.shape[1], 12), "white")
            ImageDraw.Draw(bar).text((2, 0), titles[index], fill="black")
            row = np.concatenate([np.asarray(bar), row])
        rows.append(np.pad(row, ((0, 2), (0, 4), (0, 0))))
    rows += [np.zeros_like(rows[0])] * (-len(rows) % wide)
    lines = [np.concatenate(rows[i:i + wide], axis=1) for i in range(0, len(rows), wide)]
    Image.fromarray(np.concatenate(lines)).save(path, optimize=True)
