"""Reading a cache folder: its items (no torch) and the tensors of an item."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lapwan.caching.index import INDEX_FILE, CachedItem, CacheIndex, parse_index
from lapwan.caching.layout import PROMPTS_FILE, find_tensor, open_cache_file, read_recipe, recipe_fingerprint
from lapwan.caching.musubi_cache import join_labels, scan_musubi_cache
from lapwan.checkpoints.container import TensorFile
from lapwan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def load_index(folder: Path, labels: Path | None = None, empty: bool = False) -> CacheIndex:
    """The items of a cache folder, in the dataset's order, without importing torch.

    Args:
        labels: a labels JSONL, for caches that carry none; joined by the clip's stem.
        empty: allow a cache without any finished item.

    Raises:
        UserError: no cache, a damaged index or one that names files outside the folder, a missing file, or labels
            that do not fit the items.
    """
    if not folder.is_dir():
        raise UserError(f"no cache folder {folder}; make one with lapwan cache")
    path = folder / INDEX_FILE
    if path.is_file():
        index = parse_index(path)
    else:
        index = CacheIndex(folder, scan_musubi_cache(folder), verified=False)
    if not index.items and not empty:
        raise UserError(f"{folder} holds no cached items; make them with lapwan cache")
    if labels is not None:
        index = join_labels(index, labels)
    return index


def read_item(folder: Path, item: CachedItem, width: int | None = None) -> dict[str, Tensor | None]:
    """`latents` [C, T, H, W] fp32, `text` [n, D] as stored, `condition` [20, T, H, W] fp32 or None, `roi` or None.

    Args:
        folder: the cache.
        item: of its index.
        width: D of the cache's text features, where it is known.

    Raises:
        UserError: a file is missing or damaged, or its features have another width or its tensors other dimensions.
    """
    from lapwan.checkpoints.tensors import load_tensor

    latents = _open(folder, item, "latents", item.latents)
    text = _open(folder, item, "text", item.text)
    condition = find_tensor(latents, "latents_image", required=False)
    roi = None
    if item.roi is not None:
        roi_file = _open(folder, item, "roi", item.roi)
        roi = _dimensions(load_tensor(roi_file, str(find_tensor(roi_file, "roi"))), "THW", folder / item.roi)
    features = load_tensor(text, str(find_tensor(text, "varlen_t5")))
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise UserError(f"{folder / item.text} holds features {list(features.shape)}, but the cache's are [tokens, "
                        f"{'width' if width is None else width}]; run lapwan cache again")
    return {
        "latents": _dimensions(load_tensor(latents, str(find_tensor(latents, "latents"))), "CTHW",
                               folder / item.latents).float(),
        "text": features,
        "condition": None if condition is None else _dimensions(
            load_tensor(latents, condition), "CTHW", folder / item.latents).float(),
        "roi": roi,
    }


def _dimensions(tensor: Tensor, axes: str, path: Path) -> Tensor:
    if tensor.ndim != len(axes):
        raise UserError(f"{path} holds a tensor of shape {list(tensor.shape)} where [{', '.join(axes)}] is expected; "
                        "delete it and run lapwan cache again")
    return tensor


def _open(folder: Path, item: CachedItem, kind: str, name: str) -> TensorFile:
    """A file of an item, checked to be the one that the index refers to."""
    file = open_cache_file(folder / name)
    recipe = read_recipe(file)
    if recipe is not None and recipe_fingerprint(recipe) != item.fingerprints.get(kind):
        raise UserError(f"{folder / name} is not the file that the index refers to (it has been cached again); "
                        "run lapwan cache again")
    return file


def read_prompt(index: CacheIndex, kind: str) -> Tensor:
    """[n, D] features of the `empty` or the `negative` prompt.

    Raises:
        UserError: the cache has none (musubi-tuner caches none).
    """
    from lapwan.checkpoints.tensors import load_tensor

    path = index.folder / (index.prompts or PROMPTS_FILE)
    if not path.is_file():
        raise UserError(f"{index.folder} has no features of the {kind} prompt, which caption dropout and CFG need; run "
                        "lapwan cache --no-latents on it")
    file = open_cache_file(path)
    return load_tensor(file, str(find_tensor(file, kind)))


def read_empty_text(index: CacheIndex) -> Tensor:
    """[n, D] features of the empty prompt, for caption dropout and CFG."""
    return read_prompt(index, "empty")
