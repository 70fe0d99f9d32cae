"""A cache folder: its index (no torch) and the tensors of an item.

`lapwan_index.jsonl`: the first line describes the cache, every other line is one item; file names are relative to the
folder. A folder made by musubi-tuner has no index: it is read by its file names.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapwan import files
from lapwan.caching.layout import PROMPTS_FILE, find_tensor, open_cache_file, read_recipe, recipe_fingerprint
from lapwan.checkpoints.container import TensorFile
from lapwan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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
    probe: str | None = None  # identity of the source file's bytes
    facts: dict[str, Any] | None = None  # what the source file says of itself (VideoFacts)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(frames, height, width): items of one bucket can share a batch."""
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class CacheIndex:
    """A cache folder. Facts that musubi's caches do not carry are None there, and `verified` is False."""

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
    apart = ("folder", "items", "verified")
    head |= {f.name: getattr(index, f.name) for f in fields(CacheIndex) if f.name not in apart}
    lines = [head, *({k: v for k, v in asdict(item).items() if v is not None} for item in index.items)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.write_text(index.folder / INDEX_FILE, text)


def load_index(folder: Path, labels: Path | None = None, empty: bool = False) -> CacheIndex:
    """The items of a cache folder, in the dataset's order, without importing torch.

    Args:
        labels: a labels JSONL, for caches that carry none; joined by the clip's stem.
        empty: a cache without a single finished item is no error.

    Raises:
        UserError: no cache there, a damaged index or one that names files elsewhere, a missing file, or labels that
            do not fit the items.
    """
    if not folder.is_dir():
        raise UserError(f"no cache folder {folder}; make one with lapwan cache")
    path = folder / INDEX_FILE
    if path.is_file():
        index = _parse_index(path)
    else:
        from lapwan.caching.musubi_cache import scan

        index = CacheIndex(folder, scan(folder), verified=False)
    if not index.items and not empty:
        raise UserError(f"{folder} holds no cached items; make them with lapwan cache")
    if labels is not None:
        from lapwan.caching.musubi_cache import join_labels

        index = join_labels(index, labels)
    return index


def _parse_index(path: Path) -> CacheIndex:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        head = json.loads(lines[0])
        if head.pop("lapwan_index") != INDEX_FORMAT:
            raise UserError(f"{path} has another format than this version of lapwan reads; cache again")
        known = {f.name for f in fields(CacheIndex)}
        items = tuple(_item(json.loads(line)) for line in lines[1:])
        names = [name for item in items for name in (item.latents, item.text, item.roi)] + [head.get("prompts")]
        for name in names:
            if name is not None:
                files.inside(path.parent, name, path)
        return CacheIndex(path.parent, items, **{k: v for k, v in head.items() if k in known})
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}); run lapwan cache again: files that are there are kept") from None


def _item(row: dict[str, Any]) -> CachedItem:
    if row.get("label_weights") is not None:
        row["label_weights"] = tuple(row["label_weights"])
    return CachedItem(**row)


def read_item(folder: Path, item: CachedItem) -> dict[str, Tensor | None]:
    """`latents` [C, T, H, W] fp32, `text` [n, D] as stored, `condition` [20, T, H, W] fp32 or None, `roi` or None.

    Raises:
        UserError: a file is missing or damaged.
    """
    from lapwan.checkpoints.tensors import load

    latents = _open(folder, item, "latents", item.latents)
    text = _open(folder, item, "text", item.text)
    condition = find_tensor(latents, "latents_image", required=False)
    roi = None
    if item.roi is not None:
        roi_file = _open(folder, item, "roi", item.roi)
        roi = load(roi_file, str(find_tensor(roi_file, "roi")))
    return {
        "latents": load(latents, str(find_tensor(latents, "latents"))).float(),
        "text": load(text, str(find_tensor(text, "varlen_t5"))),
        "condition": None if condition is None else load(latents, condition).float(),
        "roi": roi,
    }


def _open(folder: Path, item: CachedItem, kind: str, name: str) -> TensorFile:
    """A file of an item, if it still is what the index says."""
    file = open_cache_file(folder / name)
    recipe = read_recipe(file)
    if recipe is not None and recipe_fingerprint(recipe) != item.fingerprints.get(kind):
        raise UserError(f"{folder / name} is not the file its index means (it was cached again since); "
                        "run lapwan cache again")
    return file


def read_prompt(index: CacheIndex, kind: str) -> Tensor:
    """[n, D] features of the `empty` or the `negative` prompt.

    Raises:
        UserError: the cache has none (musubi-tuner caches none).
    """
    from lapwan.checkpoints.tensors import load

    path = index.folder / (index.prompts or PROMPTS_FILE)
    if not path.is_file():
        raise UserError(f"{index.folder} holds no features of the {kind} prompt; caption dropout and CFG need them: "
                        "run lapwan cache --no-latents on it")
    file = open_cache_file(path)
    return load(file, str(find_tensor(file, kind)))


def read_empty_text(index: CacheIndex) -> Tensor:
    """[n, D] features of the empty prompt, for caption dropout and CFG."""
    return read_prompt(index, "empty")
