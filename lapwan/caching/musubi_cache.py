"""Caches made by musubi-tuner, read by file names and shapes, and labels joined to them.

They have no index and no recipe, so their items are unverified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapwan.caching.families import with_families
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.layout import (
    LATENTS_END,
    TEMPORAL_STRIDE,
    find_tensor,
    open_cache_file,
    parse_latents_name,
    read_recipe,
    spatial_stride,
    text_name,
)
from lapwan.console import listed
from lapwan.data.clip_file import MEDIA_KEYS, read_clips
from lapwan.data.clips import label_fields
from lapwan.errors import UserError
from lapwan.files import is_temporary

_RANK = 4  # of latents


def scan_musubi_cache(folder: Path) -> tuple[CachedItem, ...]:
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
        raise UserError(f"{path} has no text features beside it ({text_path.name}); cache the captions too")
    file, text = open_cache_file(path), open_cache_file(text_path)
    if read_recipe(file) is not None:
        raise UserError(f"{path.parent} has no index: lapwan cache was interrupted there; run it again to finish")
    shape = file.tensors[str(find_tensor(file, "latents"))].shape
    if len(shape) != _RANK:
        raise UserError(f"{path}: its latents {list(shape)} are not [channels, frames, height, width]; delete it and "
                        "cache again")
    frames, spatial = (shape[-3] - 1) * TEMPORAL_STRIDE + 1, spatial_stride(shape[0])
    if name.window is not None and name.window.frames != frames:
        raise UserError(f"{path}: its name says {name.window.frames} frames, its latents {list(shape)} hold {frames}; "
                        "cache again")
    return CachedItem(
        id=path.name.removesuffix(LATENTS_END), latents=path.name, text=text_path.name,
        caption=text.metadata.get("caption1", ""), frames=frames, height=shape[-2] * spatial,
        width=shape[-1] * spatial, condition=find_tensor(file, "latents_image", required=False) is not None,
        start=name.window.start if name.window else 0,
    )


def join_labels(index: CacheIndex, labels: Path) -> CacheIndex:
    """`index` with the labels of a labels JSONL, joined by the clip's path, or by its stem if the cache lacks the path.

    Raises:
        UserError: an item without a line, or with several lines of different labels.
    """
    by_path, by_stem, taxonomy = _read_labels(labels)
    items: list[CachedItem] = []
    missing: list[str] = []
    for item in index.items:
        fields = by_path.get(item.clip or "")
        if fields is None:
            stem = clip_stem(item)
            candidates = by_stem.get(stem, [])
            if not candidates:
                missing.append(stem)
                continue
            distinct: list[dict[str, Any]] = []
            for _, candidate in candidates:
                if candidate not in distinct:
                    distinct.append(candidate)
            if len(distinct) > 1:
                raise UserError(f"{labels}: lines {', '.join(str(line) for line, _ in candidates)} all match "
                                f"item '{stem}' with different labels; keep only the right one")
            fields = distinct[0]
        items.append(replace(item, **fields))
    if missing:
        raise UserError(f"{labels} has no line for {len(missing)} of {len(index.items)} items: "
                        f"{listed(missing)}; label those clips too")
    joined = replace(index, items=tuple(items), taxonomy=taxonomy, families=None, taxonomy_fingerprint=None)
    return with_families(joined, [vars(item) for item in items])


def clip_stem(item: CachedItem) -> str:
    """The stem of the clip an item is cut from."""
    name = parse_latents_name(item.id + LATENTS_END)
    return item.id if name is None else name.stem


def _read_labels(
    labels: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple[int, dict[str, Any]]]], str | None]:
    """Label fields by absolute path and, with line numbers, by stem; the name of their taxonomy."""
    taxonomy: str | None = None
    by_path: dict[str, dict[str, Any]] = {}
    by_stem: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for clip in read_clips(labels):
        location = f"{labels}, line {clip.line}"
        media: Any = next((clip.data[key] for key in MEDIA_KEYS if key in clip.data), None)
        if not isinstance(media, str):
            raise UserError(f"{location}: no 'video_path' to join labels by")
        fields = _labelled(clip.data, location)
        by_stem.setdefault(Path(media).stem, []).append((clip.line, fields))
        by_path[str(labels.absolute().parent / media)] = fields
        named = clip.data.get("instrument_taxonomy")
        taxonomy = taxonomy or (named if isinstance(named, str) else None)
    return by_path, by_stem, taxonomy


def _labelled(data: Mapping[str, Any], location: str) -> dict[str, Any]:
    fields = label_fields(data, location)
    if "label" not in fields and "label_weights" not in fields:
        raise UserError(f"{location} has no instrument_label; make the file with lapwan label")
    return fields
