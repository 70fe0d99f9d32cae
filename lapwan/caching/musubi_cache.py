"""Caches made by musubi-tuner: no index, no recipe; read by file names and shapes, so they are unverified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.layout import LATENTS_END, find_tensor, open_cache_file, parse_latents_name, read_recipe, text_name
from lapwan.data.clips import MEDIA_KEYS, read_clips
from lapwan.data.source_clips import label_fields
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

_SHOWN = 5


def join_labels(index: CacheIndex, labels: Path) -> CacheIndex:
    """`index` with the labels of `labels`. A line belongs to an item if its path names the item's clip; where the
    cache does not know its clips' paths, by the file's stem.

    Raises:
        UserError: an item without a line, or one that several different labels fit.
    """
    by_path, by_stem = _read(labels)
    items: list[CachedItem] = []
    missing: list[str] = []
    for item in index.items:
        found = by_path.get(item.clip or "")
        if found is None:
            stem = stem_of(item)
            candidates = by_stem.get(stem, [])
            if not candidates:
                missing.append(stem)
                continue
            distinct = [fields for at, (_, fields) in enumerate(candidates) if fields not in
                        [other for _, other in candidates[:at]]]
            if len(distinct) > 1:
                raise UserError(f"{labels}: lines {', '.join(str(line) for line, _ in candidates)} all fit item "
                                f"'{stem}' with different labels; keep the one that is meant")
            found = distinct[0]
        items.append(replace(item, **found))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise UserError(f"{labels} has no line for {len(missing)} of {len(index.items)} items: "
                        f"{', '.join(missing[:_SHOWN])}{more}; label those clips too")
    return replace(index, items=tuple(items))


def stem_of(item: CachedItem) -> str:
    """The stem of the clip an item is cut from."""
    name = parse_latents_name(item.id + LATENTS_END)
    return item.id if name is None else name.stem


def _read(labels: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[tuple[int, dict[str, Any]]]]]:
    """Label fields by absolute path and, with line numbers, by stem."""
    by_path: dict[str, dict[str, Any]] = {}
    by_stem: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for clip in read_clips(labels):
        place = f"{labels}, line {clip.line}"
        media: Any = next((clip.data[key] for key in MEDIA_KEYS if key in clip.data), None)
        if not isinstance(media, str):
            raise UserError(f"{place}: no 'video_path' to join labels by")
        fields = _labelled(clip.data, place)
        by_stem.setdefault(Path(media).stem, []).append((clip.line, fields))
        by_path[str(labels.absolute().parent / media)] = fields
    return by_path, by_stem


def _labelled(data: Mapping[str, Any], place: str) -> dict[str, Any]:
    fields = label_fields(data, place)
    if "label" not in fields and "label_weights" not in fields:
        raise UserError(f"{place} has no instrument_label; make the file with lapwan label")
    return fields
