"""The data side of training: what each optimizer step trains on, prefetched.

A step's batches and draws are made while the device still works on the step before. Draws are keyed, so it does not
matter when they are made. A CPU takes milliseconds (noise of 480x832: 20 ms), which would otherwise pass between the
end of a step, where the trainer waits for the gradient norm, and the start of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lapwan.caching.collate import Batch
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.train.objective import Draws, SigmaRule, make_draws
from lapwan.train.parallel import Distributed
from lapwan.train.sample_order import SampleOrder

LoadBatch = Callable[[Sequence[int]], Batch]  # item indices to a batch on the device
_Position = tuple[int, int]  # (epoch, batch)


@dataclass
class DataStream:
    """The data of one noise expert: the order of samples, how sigmas are drawn, and the position reached."""

    order: SampleOrder
    sigma_rule: SigmaRule
    position: _Position = (0, 0)
    steps: int = 0  # optimizer steps of this noise expert


@dataclass(frozen=True)
class StepData:
    """This process's batches of one optimizer step with their draws; `samples` counts those of all processes."""

    batches: list[Batch]
    draws: list[Draws]
    samples: int
    next_position: _Position


class TrainingData:
    """The batches and draws of every optimizer step, by noise expert.

    Args:
        accumulate: batches an optimizer step, over all processes.
        micro_batch: clips a forward, where a whole batch does not fit; the result is the same.
        caption_dropout: probability that a sample's caption is dropped.
        first_frame: probability that a sample's first latent frame is given clean.
    """

    def __init__(
        self, streams: Mapping[NoiseExpert, DataStream], load_batch: LoadBatch, item_ids: Sequence[str], seed: int,
        accumulate: int = 1, micro_batch: int | None = None, caption_dropout: float = 0.0,
        distributed: Distributed | None = None, first_frame: float = 0.0,
    ) -> None:
        self.streams, self.load_batch, self.item_ids = dict(streams), load_batch, item_ids
        self.micro_batch, self._seed, self._accumulate = micro_batch, seed, accumulate
        self._caption_dropout, self._distributed = caption_dropout, distributed or Distributed()
        self._first_frame = first_frame
        self._prefetched: tuple[NoiseExpert, _Position, StepData] | None = None

    def step(self, noise_expert: NoiseExpert) -> StepData:
        """The data of this noise expert's next step: what was prefetched if it is for this step, else loaded now."""
        position = self.streams[noise_expert].position
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[:2] == (noise_expert, position):
            return prefetched[2]
        return self._load(noise_expert, position)

    def prefetch(self, noise_expert: NoiseExpert, position: _Position) -> None:
        """Load the data of the step that starts at this position of the noise expert's stream now."""
        self._prefetched = noise_expert, position, self._load(noise_expert, position)

    def exclude(self, clips: Collection[str]) -> None:
        """Train on these clips no longer: the next clips of their size take their turns.

        Raises:
            UserError: no clip of that size is left.
        """
        items = [index for index, item_id in enumerate(self.item_ids) if item_id in clips]
        self._prefetched = None
        for stream in self.streams.values():
            try:
                stream.order.exclude(items)
            except ValueError as error:
                raise UserError(f"data.on_bad_clip = \"skip\": {error}, after the losses or gradients of all its clips "
                                "were not finite; lower the lr or check the clips") from None

    def _load(self, noise_expert: NoiseExpert, position: _Position) -> StepData:
        stream = self.streams[noise_expert]
        visits, next_position = stream.order.batches(position, self._accumulate)
        samples = sum(len(batch) for batch in visits)
        size = self.micro_batch or max(map(len, visits))
        visits = [batch[i : i + size]
                  for batch in self._distributed.local_items(visits) for i in range(0, len(batch), size)]
        batches = [self.load_batch([visit.item for visit in batch]) for batch in visits]
        # By visit: neither batch size nor the number of processes changes a sample's draws.
        keys = [[(self._seed, noise_expert.value, visit.number, self.item_ids[visit.item]) for visit in batch]
                for batch in visits]
        draws = [make_draws(batch, batch_keys, stream.sigma_rule, self._caption_dropout, self._first_frame)
                 for batch, batch_keys in zip(batches, keys, strict=True)]
        return StepData(batches, draws, samples, next_position)
