"""The index of a cache folder: its format, writing and parsing. No torch.

`lapwan_index.jsonl`: the first line describes the cache, each other line is an item; file names are relative to the
folder. `read.py` reads a folder; one made by musubi-tuner has no index (`musubi_cache.py`).

How to add a field of an item: a field of `CachedItem` with a default, set in `_index_item` of `plan.py`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lapwan import files
from lapwan.errors import UserError

INDEX_FILE = "lapwan_index.jsonl"
INDEX_FORMAT = 1


@dataclass(frozen=True)
class CachedItem:
    """One training item. `id` is unique in its cache and stable; `latents`, `text`, `roi` are file names.

    `frames`, `height`, `width` are the bucket's, in pixels; `start` counts frames at the model's rate;
    `label_weights` sum to 1 in the taxonomy's order; `repeats` is how often an epoch shows the item.
    """

    id: str
    latents: str
    text: str
    caption: str
    frames: int
    height: int
    width: int
    roi: str | None = None
    condition: bool = False
    start: int = 0
    label: int | None = None
    label_name: str | None = None
    label_weights: tuple[float, ...] | None = None
    fallback: bool = False
    split: str | None = None
    source: str | None = None
    clip: str | None = None
    repeats: int = 1
    probe: str | None = None  # fingerprint of the source file
    facts: dict[str, Any] | None = None  # VideoFacts of the source file
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(frames, height, width): items of one bucket can share a batch."""
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class CacheIndex:
    """A cache folder. For caches of musubi-tuner, fields it does not store are None and `verified` is False."""

    folder: Path
    items: tuple[CachedItem, ...]
    task: str | None = None
    fps: float | None = None
    vae: str | None = None
    text_encoder: str | None = None
    text_dim: int | None = None
    taxonomy: str | None = None
    dataset: str | None = None
    prompts: str | None = None
    pixels_per_second: float | None = None  # of the last encoding, for the next plan's estimate
    verified: bool = True


def write_index(index: CacheIndex) -> None:
    """Write the index atomically."""
    head = {"lapwan_index": INDEX_FORMAT}
    not_in_head = ("folder", "items", "verified")
    head |= {f.name: getattr(index, f.name) for f in fields(CacheIndex) if f.name not in not_in_head}
    lines = [head, *({k: v for k, v in asdict(item).items() if v is not None} for item in index.items)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(index.folder / INDEX_FILE, text)


def parse_index(path: Path) -> CacheIndex:
    """The index at `path`, checked line by line.

    Raises:
        UserError: a damaged index, one of another format, or one that names files outside the folder.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        head = json.loads(lines[0])
        if head.pop("lapwan_index") != INDEX_FORMAT:
            raise UserError(f"{path} has a format that this version of lapwan cannot read; run lapwan cache again")
        known = {f.name for f in fields(CacheIndex)}
        items = tuple(_item(json.loads(line)) for line in lines[1:])
        names = [name for item in items for name in (item.latents, item.text, item.roi)] + [head.get("prompts")]
        for name in names:
            if name is not None:
                files.inside(path.parent, name, path)
        return CacheIndex(path.parent, items, **{k: v for k, v in head.items() if k in known})
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}); run lapwan cache again; existing files are kept") from None


def _item(row: dict[str, Any]) -> CachedItem:
    if row.get("label_weights") is not None:
        row["label_weights"] = tuple(row["label_weights"])
    return CachedItem(**row)
