"""Caches made by musubi-tuner: no index, no recipe; read by file names and shapes, so they are unverified."""

from __future__ import annotations

from pathlib import Path

from lapwan.data.cachefile import CachedItem
from lapwan.data.layout import (
    LATENTS_END,
    find_tensor,
    open_cache_file,
    parse_latents_name,
    read_recipe,
    text_name,
)
from lapwan.errors import UserError
from lapwan.files import is_temporary

_TEMPORAL, _SPATIAL = 4, 8  # of the VAE that these caches are made with


def scan(folder: Path) -> tuple[CachedItem, ...]:
    """The items of a cache folder without an index, sorted by name.

    Raises:
        UserError: a file of no known name, a damaged one, or latents without their text.
    """
    return tuple(_item(path) for path in sorted(folder.glob(f"*{LATENTS_END}")) if not is_temporary(path))


def _item(path: Path) -> CachedItem:
    name = parse_latents_name(path.name)
    if name is None:
        raise UserError(f"{path} is not named as a cache file: {{stem}}_{{start}}-{{frames}}_{{W}}x{{H}}{LATENTS_END}; "
                        "move it elsewhere")
    text_path = path.with_name(text_name(name.stem))
    if not text_path.is_file():
        raise UserError(f"{path} has no text beside it ({text_path.name}); cache the captions too")
    file, text = open_cache_file(path), open_cache_file(text_path)
    if read_recipe(file) is not None:
        raise UserError(f"{path.parent} was being made by lapwan cache and has no index yet; run it again to the end")
    shape = file.tensors[str(find_tensor(file, "latents"))].shape
    frames = (shape[-3] - 1) * _TEMPORAL + 1
    if name.window is not None and name.window.frames != frames:
        raise UserError(f"{path}: its name says {name.window.frames} frames, its latents {list(shape)} hold {frames}; "
                        "cache again")
    return CachedItem(
        id=path.name.removesuffix(LATENTS_END), latents=path.name, text=text_path.name,
        caption=text.metadata.get("caption1", ""), frames=frames, height=shape[-2] * _SPATIAL,
        width=shape[-1] * _SPATIAL, condition=find_tensor(file, "latents_image", required=False) is not None,
        start=name.window.start if name.window else 0,
    )
