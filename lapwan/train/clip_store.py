"""Cached clips as batches on the training device, kept in memory as far as they fit; which clips are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lapwan.caching.collate import Batch, collate
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import read_empty_text, read_item
from lapwan.console import warn
from lapwan.data.clips import empty_split
from lapwan.data.regions import motion_region
from lapwan.errors import UserError
from lapwan.models.fingerprints import text_encoder_fingerprint, vae_fingerprint
from lapwan.models.spec import ModelSpec

LABEL_FIRST = "run `lapwan label` before `lapwan cache`, or give labels = \"labels.jsonl\" in [data]"

_MEMORY_BUDGET = 8 * 2**30  # bytes of cached tensors kept in RAM; a 256 x 256 x 81 clip takes about 5 MB


class ClipStore:
    """The items of a run. Each is read once while the memory budget lasts, else at every use.

    Args:
        families: number of families, to turn a hard label into weights; not needed for soft labels.
        motion_regions: derive a region from motion for items without one.
        keep_on_device: keep what was read on the device, so that it crosses the bus once.
    """

    def __init__(
        self, index: CacheIndex, items: Sequence[CachedItem], device: torch.device, families: int | None = None,
        motion_regions: bool = False, keep_on_device: bool = False,
    ) -> None:
        self.index, self.items, self._device = index, list(items), device
        self._storage_device = device if keep_on_device else torch.device("cpu")
        self._motion_regions, self._families = motion_regions, families
        self._kept: dict[str, dict[str, Tensor | None]] = {}
        self._bytes = 0

    def batch(self, indices: Sequence[int]) -> Batch:
        """The items at these indices as one batch on the device."""
        return collate([(self.items[i], self._read(i)) for i in indices], self._families).to(self._device)

    def empty_text(self) -> Tensor:
        """The features of the empty caption, on the device.

        Raises:
            UserError: the cache has none.
        """
        return read_empty_text(self.index).to(self._device)

    def _read(self, index: int) -> dict[str, Tensor | None]:
        item = self.items[index]
        if item.id in self._kept:
            return self._kept[item.id]
        tensors = read_item(self.index.folder, item, self.index.text_dim)
        if self._motion_regions and tensors["roi"] is None and tensors["latents"] is not None:
            tensors["roi"] = motion_region(tensors["latents"])
        size = sum(t.numel() * t.element_size() for t in tensors.values() if t is not None)
        if self._bytes + size <= _MEMORY_BUDGET or self._storage_device.type != "cpu":
            self._bytes += size
            tensors = {name: None if t is None else t.to(self._storage_device) for name, t in tensors.items()}
            self._kept[item.id] = tensors
        return tensors


def cached_bytes(index: CacheIndex, items: Sequence[CachedItem]) -> int:
    """An upper bound of the bytes the items take once read; latents are converted to fp32."""
    latents, texts = {item.latents for item in items}, {item.text for item in items}
    sizes = [2 * (index.folder / name).stat().st_size for name in latents]
    return sum(sizes) + sum((index.folder / name).stat().st_size for name in texts)


def training_items(index: CacheIndex, split: str | None) -> list[CachedItem]:
    """The items of a split and those without a split, each `repeats` times.

    Raises:
        UserError: there are none.
    """
    kept = [item for item in index.items if split is None or item.split in (None, split)]
    if not kept:
        raise empty_split(index.folder, split, {item.split for item in index.items}, "set data.split")
    return [item for item in kept for _ in range(item.repeats)]


def check_cache(index: CacheIndex, spec: ModelSpec, items: Sequence[CachedItem]) -> None:
    """Refuse a cache made for another model; what a cache of another tool does not state is checked at its first item.

    Raises:
        UserError: another task, text encoder width, or latent channels.
    """
    if index.task is not None and index.task != spec.task:
        raise UserError(f"{index.folder} was cached for {index.task}, but the model is {spec.task} "
                        f"({spec.family.title}); run lapwan cache with this model")
    if spec.image_channels and not all(item.condition for item in items):
        missing = next(item.id for item in items if not item.condition)
        raise UserError(f"{index.folder}: {missing} has no image condition, which an I2V model needs; "
                        "run lapwan cache with --i2v")
    if index.text_dim is not None and index.text_dim != spec.text_dim:
        raise UserError(f"{index.folder} holds text features of width {index.text_dim}, but the model takes "
                        f"{spec.text_dim}; cache with this model's text encoder")
    for name, cached_with, fingerprint in (
        ("VAE", index.vae, vae_fingerprint), ("text encoder", index.text_encoder, text_encoder_fingerprint),
    ):
        # Only a warning: the same encoder in another precision has another fingerprint and works as well.
        if cached_with is not None and cached_with != fingerprint(spec):
            warn(f"{index.folder} was cached with another {name} than {spec.path}'s; unless they only differ in "
                 "precision, cache again with this model")
    first = read_item(index.folder, items[0])
    latents, text = first["latents"], first["text"]
    if latents is not None and latents.shape[0] != spec.latent_channels:
        raise UserError(f"{index.folder}: {items[0].latents} has {latents.shape[0]} latent channels, but the "
                        f"model has {spec.latent_channels}; cache with this model's VAE")
    if text is not None and text.shape[1] != spec.text_dim:
        raise UserError(f"{index.folder}: {items[0].text} has features of width {text.shape[1]}, but the model "
                        f"takes {spec.text_dim}; cache with this model's text encoder")


def family_of(item: CachedItem) -> int | None:
    """The index of the family with the largest weight in an item's label; None without a label."""
    if item.label_weights is not None:
        return max(range(len(item.label_weights)), key=item.label_weights.__getitem__)
    return item.label


def sampling_weights(items: Sequence[CachedItem], power: float) -> list[float] | None:
    """w_i ∝ n_f^(−power), n_f the number of items of i's family.

    At 0 each item comes once an epoch (None is returned); at 1 all families are drawn equally often.

    Raises:
        UserError: an item without a label.
    """
    if power == 0:
        return None
    families = [family_of(item) for item in items]
    if None in families:
        first = items[families.index(None)].id
        raise UserError(f"data.balance = {power:g} draws clips by family, but clip {first} has no label; "
                        f"{LABEL_FIRST}")
    return [float(families.count(family)) ** -power for family in families]
