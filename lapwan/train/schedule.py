"""The order of a run: which samples each step takes, and which noise expert each optimizer step trains.

`SampleOrder` is a pure function of (seed, stream, position), so that a position is all that resuming needs. Every visit
of a sample has its own number, which keys its noise and sigma: the draws do not depend on how visits are cut into
batches, so a batch of two equals two batches of one.
`interleave` gives the turns of the noise experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from lapwan import rng
from lapwan.names import NoiseExpert


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

    @property
    def batches_per_epoch(self) -> int:
        """Batches in the first epoch; weighted epochs over several buckets may differ by a few."""
        return len(self._epoch(0))

    def batches(self, start: tuple[int, int], count: int) -> tuple[list[list[Visit]], tuple[int, int]]:
        """`count` batches from position (epoch, batch) on, and the position after them."""
        epoch, index = start
        batches: list[list[Visit]] = []
        while len(batches) < count:
            batches.append(self._epoch(epoch)[index])
            index += 1
            if index == len(self._epoch(epoch)):
                epoch, index = epoch + 1, 0
        return batches, (epoch, index)


Window = tuple[int, int | None]  # steps of the run [start, stop) in which a noise expert has turns


def interleave(
    steps: Mapping[NoiseExpert, int], turn: int, windows: Mapping[NoiseExpert, Window] | None = None
) -> list[NoiseExpert]:
    """The noise expert of every optimizer step: turns of `turn` steps, in proportion to the steps that are left.

    With equal counts: `turn` steps high, `turn` steps low, and so on. With 1000 high and 500 low, there are two high
    turns for each low one, so that both end together. A noise expert outside its window waits. If no other one has
    steps left, the one whose window starts first starts at once, so that no step is empty. Steps that do not fit before
    a `stop` are left out.

    Args:
        steps: optimizer steps of each noise expert.
        windows: steps of the run [start, stop) in which a noise expert may have turns; without one: always.
    """
    windows = windows or {}
    order: list[NoiseExpert] = []
    left = {noise_expert: count for noise_expert, count in steps.items() if count > 0}
    while any(left.values()):
        at = len(order)
        candidates = [e for e in left if left[e] and _stop(windows, e, at) > at]
        ready = [e for e in candidates if windows.get(e, (0, None))[0] <= at]
        if not candidates:
            break
        # The noise expert with the largest share of its steps left is next; ties go in the order given (high first).
        if ready:
            noise_expert = max(ready, key=lambda e: left[e] / steps[e])
        else:
            noise_expert = min(candidates, key=lambda e: windows[e][0])
        length = min(turn, left[noise_expert], _stop(windows, noise_expert, at) - at)
        order += [noise_expert] * length
        left[noise_expert] -= length
    return order


def _stop(windows: Mapping[NoiseExpert, Window], noise_expert: NoiseExpert, at: int) -> int:
    stop = windows.get(noise_expert, (0, None))[1]
    return at + 2**31 if stop is None else stop


def one_after_the_other(phases: Sequence[Mapping[NoiseExpert, int]], turn: int) -> list[NoiseExpert]:
    """The turns of consecutive phases, each interleaved: high 1000, low 1500, then both 100."""
    return [noise_expert for phase in phases for noise_expert in interleave(phase, turn)]
