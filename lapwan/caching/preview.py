"""A preview of a cache: frames of a few cached clips, decoded from their latents as the model is trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lapwan.caching.read import load_index, read_item
from lapwan.files import atomic_file
from lapwan.models.device import pick_device
from lapwan.models.spec import ModelSpec
from lapwan.report.contact_sheet import spaced_frames
from lapwan.wan.vae import decode, load_vae

PREVIEW_FILE = "lapwan_preview.png"
_GAP = 4  # pixels between frames


def write_preview(folder: Path, spec: ModelSpec, count: int, device: str = "auto") -> Path:
    """Write `lapwan_preview.png`: a row for each of `count` items, evenly spaced in the cache, with up to six frames.

    A clip's region is outlined.

    Raises:
        UserError: no cache there, or a damaged file.
    """
    from PIL import Image

    index = load_index(folder)
    vae = load_vae(spec, device=pick_device(device))
    step = max(1, len(index.items) // count)
    rows: list[np.ndarray] = []
    for item in index.items[::step][:count]:
        tensors = read_item(folder, item)
        latents, roi = tensors["latents"], tensors["roi"]
        assert latents is not None
        with torch.no_grad():
            pixels_CTHW = decode(vae, latents[None])[0].cpu()
        frames = spaced_frames(item.frames)
        shown = ((pixels_CTHW[:, frames] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        if roi is not None:
            shown = _outlined(shown, roi.numpy(), frames, spec.temporal_stride)
        rows.append(_strip(shown))
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    path = folder / PREVIEW_FILE
    with atomic_file(path) as temporary:
        Image.fromarray(np.concatenate(padded)).save(temporary)
    return path


def _strip(frames_THWC: np.ndarray) -> np.ndarray:
    gaps = np.pad(frames_THWC, ((0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(gaps), axis=1)


def _outlined(frames_THWC: np.ndarray, roi_THW: np.ndarray, frames: np.ndarray, stride: int) -> np.ndarray:
    """Edges of the cells that are at least half inside the region, in yellow.

    Latent frame of pixel frame f: 0 for the first, then (f - 1) // stride + 1.
    """
    scale = frames_THWC.shape[1] // roi_THW.shape[1]
    cells = (roi_THW >= 0.5)[np.where(frames == 0, 0, (frames - 1) // stride + 1)]
    inside = cells.repeat(scale, axis=1).repeat(scale, axis=2)
    around = np.pad(inside, ((0, 0), (1, 1), (1, 1)))
    core = around[:, :-2, 1:-1] & around[:, 2:, 1:-1] & around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    outlined = frames_THWC.copy()
    outlined[inside & ~core] = (255, 220, 0)
    return outlined
