"""Whether a cache file is what is wanted now, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwan.caching.layout import TEXT_END, Recipe, find_tensor, read_recipe
from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.errors import UserError

MISSING = "missing"
_TEMPORAL = 4  # of the VAE that caches without a recipe are made with


@dataclass(frozen=True)
class Verdict:
    """`reason` is what is wrong, None if the file is right; `recipe` is what a right file was made from, None where it
    does not say (another tool made it: right by shape and caption only)."""

    reason: str | None
    recipe: Recipe | None = None


def judge(path: Path, wanted: Recipe) -> Verdict:
    """Compare a file with the recipe wanted."""
    if not path.exists():
        return Verdict(MISSING)
    try:
        file = read_header(path)
    except UserError:
        return Verdict("damaged")
    made = read_recipe(file)
    if made is None:
        return Verdict(_unlike(file, wanted))
    reason = _difference(made, wanted, file.metadata.get("caption1"))
    return Verdict(reason, made if reason is None else None)


def _difference(made: Mapping[str, Any], wanted: Recipe, caption: str | None) -> str | None:
    changed = [key for key in wanted if made.get(key) != wanted[key]]
    if changed == ["i2v"] and made.get("i2v") is True:
        return None  # a condition that is not asked for does no harm
    if "caption" in wanted and caption != wanted["caption"] and "caption" not in changed:
        changed.append("caption")  # another tool rewrote the features and kept our metadata
    shown = [f"{key} {_shown(made.get(key))} -> {_shown(wanted[key])}" if key not in ("caption", "negative") else
             f"{key} changed" for key in changed]
    return ", ".join(shown) or None


def _shown(value: Any) -> str:
    return "x".join(str(part) for part in value) if isinstance(value, list) else str(value)[:12]


def _unlike(file: TensorFile, wanted: Recipe) -> str | None:
    """What shape and caption alone give away."""
    if file.path.name.endswith(TEXT_END):
        return None if file.metadata.get("caption1") == wanted.get("caption") else "caption changed"
    key = find_tensor(file, "latents", required=False)
    if key is None or "size" not in wanted:
        return "not a cache file"
    frames, height, width = file.tensors[key].shape[-3:]
    bucket_width, bucket_height = wanted["size"]
    expected = 1 if wanted["window"] is None else wanted["window"][1]
    if height * bucket_width != width * bucket_height or (frames - 1) * _TEMPORAL + 1 != expected:
        return f"size changed (latents are {frames}x{height}x{width})"
    if bucket_width != 8 * width:
        return f"size changed (latents are {frames}x{height}x{width})"
    if wanted["i2v"] and find_tensor(file, "latents_image", required=False) is None:
        return "no image condition"
    return None
