"""The order in which training visits samples, and how they are cut into batches.

`SampleOrder` is a pure function of (seed, stream, position), so that a position is all that resuming needs. Every visit
of a sample has its own number, which keys its noise and sigma: the draws do not depend on how visits are cut into
batches, so a batch of two equals two batches of one.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from lapwan import rng


@dataclass(frozen=True)
class Visit:
    """One use of a sample: its index in the item list, and a number that is unique in the stream."""

    item: int
    number: int


class SampleOrder:
    """Epochs of batches; all samples of a batch are of one bucket (equal shapes).

    Without weights an epoch is a permutation of the samples. With weights it is as many draws with replacement, with
    probabilities proportional to the weights.
    """

    def __init__(
        self, buckets: Sequence[Hashable], batch_size: int, seed: int, stream: str,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not buckets:
            raise ValueError("no samples")
        self._buckets, self._batch_size, self._seed, self._stream = list(buckets), batch_size, seed, stream
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._excluded: set[int] = set()
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> list[list[Visit]]:
        generator = rng.generator(self._seed, self._stream, epoch, "order")
        count = len(self._buckets)
        if self._weights is None:
            items = torch.randperm(count, generator=generator).tolist()
        else:
            items = torch.multinomial(self._weights, count, replacement=True, generator=generator).tolist()
        by_bucket: dict[Hashable, list[Visit]] = {}
        for slot, item in enumerate(items):
            by_bucket.setdefault(self._buckets[item], []).append(Visit(item, epoch * count + slot))
        size = self._batch_size
        batches = [visits[i : i + size] for visits in by_bucket.values() for i in range(0, len(visits), size)]
        if len(by_bucket) > 1:  # else the order of the batches is the shuffled order already
            shuffle = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[i] for i in shuffle]
        return batches

    def exclude(self, items: Collection[int]) -> None:
        """Give the visits of these samples to the next sample of the same bucket; sizes and draws stay as they are.

        Raises:
            ValueError: no sample of a bucket would be left.
        """
        excluded = self._excluded | set(items)
        for bucket in {self._buckets[item] for item in items}:
            if all(item in excluded for item, other in enumerate(self._buckets) if other == bucket):
                raise ValueError(f"no sample of bucket {bucket} is left")
        self._excluded = excluded

    def _replaced(self, visit: Visit) -> Visit:
        item, count = visit.item, len(self._buckets)
        while item in self._excluded or self._buckets[item] != self._buckets[visit.item]:
            item = (item + 1) % count
        return Visit(item, visit.number)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in the first epoch; weighted epochs over several buckets may differ by a few."""
        return len(self._epoch(0))

    def batches(self, start: tuple[int, int], count: int) -> tuple[list[list[Visit]], tuple[int, int]]:
        """`count` batches from position (epoch, batch) on, and the position after them."""
        epoch, index = start
        batches: list[list[Visit]] = []
        while len(batches) < count:
            batches.append([self._replaced(visit) for visit in self._epoch(epoch)[index]])
            index += 1
            if index == len(self._epoch(epoch)):
                epoch, index = epoch + 1, 0
        return batches, (epoch, index)
