"""Labels from a JSONL for caches that carry none, joined by the clip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapwan.data.cachefile import CachedItem, CacheIndex
from lapwan.data.clips import MEDIA_KEYS, read_clips
from lapwan.data.layout import LATENTS_END, parse_latents_name
from lapwan.data.sources import label_fields
from lapwan.errors import UserError

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
