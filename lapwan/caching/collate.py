"""The batch of a training step: cached items of one bucket, stacked.

Shapes: B batch, C channels, T latent frames, H, W latent height and width, N tokens, D text features, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lapwan.caching.index import CachedItem
from lapwan.errors import UserError


@dataclass(frozen=True)
class Batch:
    """`text` holds one [n, D] per sample, unpadded; `roi_BTHW` is zero for a sample without a region."""

    ids: tuple[str, ...]
    latents_BCTHW: Tensor
    text: tuple[Tensor, ...]
    condition_BCTHW: Tensor | None
    label_weights_BE: Tensor | None
    fallback_B: Tensor
    roi_BTHW: Tensor | None
    captions: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """Every tensor on `device`."""
        target = torch.device(device)
        moved: dict[str, Any] = {k: to_device(v, target) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, text=tuple(to_device(text, target) for text in self.text))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`; to a GPU from pinned memory, asynchronously, in the order of the current stream."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def label_weights(item: CachedItem, families: int | None) -> Tensor | None:
    """[E] fp32: the soft label, or one-hot of a hard label when the number of families is known."""
    if item.label_weights is not None:
        return torch.tensor(item.label_weights, dtype=torch.float32)
    if item.label is None or families is None:
        return None
    return torch.nn.functional.one_hot(torch.tensor(item.label), families).float()


def collate(
    pairs: Sequence[tuple[CachedItem, dict[str, Tensor | None]]], families: int | None = None
) -> Batch:
    """Stack items with their tensors (`read_item`).

    Args:
        families: number of label families, for caches with hard labels only.

    Raises:
        ValueError: items of different buckets, or some with labels (or a condition) and some without.
        UserError: tensors of one bucket that have different shapes.
    """
    items = [item for item, _ in pairs]
    if len({item.bucket for item in items}) != 1:
        raise ValueError(f"items of different buckets: {sorted({item.bucket for item in items})}")
    latents = _stack([_tensor(tensors["latents"]) for _, tensors in pairs], "latents", items)
    weights = [label_weights(item, families) for item in items]
    rois = [tensors["roi"] for _, tensors in pairs]
    no_region = torch.zeros(latents.shape[2:], device=latents.device)  # cached clips may already be on a GPU
    has_roi = any(roi is not None for roi in rois)
    return Batch(
        ids=tuple(item.id for item in items),
        latents_BCTHW=latents,
        text=tuple(_tensor(tensors["text"]) for _, tensors in pairs),
        condition_BCTHW=_all_or_none([tensors["condition"] for _, tensors in pairs], "condition", items),
        label_weights_BE=_all_or_none(weights, "label", items),
        fallback_B=torch.tensor([item.fallback for item in items]),
        roi_BTHW=_stack([no_region if r is None else r.float() for r in rois], "region", items) if has_roi else None,
        captions=tuple(item.caption for item in items),
    )


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _all_or_none(values: list[Tensor | None], what: str, items: list[CachedItem]) -> Tensor | None:
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) != len(values):
        without = next(item.id for item, value in zip(items, values, strict=True) if value is None)
        raise ValueError(f"item {without} has no {what}, others of its batch have one")
    return _stack(present, what, items)


def _stack(values: list[Tensor], what: str, items: list[CachedItem]) -> Tensor:
    for value, item in zip(values, items, strict=True):
        if value.shape != values[0].shape:
            raise UserError(f"the cached {what} of {items[0].id} has shape {list(values[0].shape)}, that of {item.id} "
                            f"{list(value.shape)}, though both are {item.frames} frames {item.height}x{item.width}; "
                            "delete these files and run lapwan cache again")
    return torch.stack(values)
