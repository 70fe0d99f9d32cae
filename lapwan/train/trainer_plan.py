"""What a trainer is given besides its objective, and the data of each optimizer step, prefetched.

A step's batches and draws are made while the device still works on the step before. Draws are keyed, so it does not
matter when they are made. A CPU takes milliseconds (noise of 480x832: 20 ms), which would otherwise pass between the
end of a step, where the trainer waits for the gradient norm, and the start of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from lapwan.caching.collate import Batch
from lapwan.names import NoiseExpert
from lapwan.train.objective import Draws, SigmaRule, make_draws
from lapwan.train.parallel import Distributed
from lapwan.train.sample_order import SampleOrder


@dataclass
class DataStream:
    """The data of one noise expert: the order of samples, how sigmas are drawn, and the position reached."""

    order: SampleOrder
    sigma_rule: SigmaRule
    position: tuple[int, int] = (0, 0)  # (epoch, batch)
    steps: int = 0  # optimizer steps of this noise expert


@dataclass
class TrainerPlan:
    """Everything `fit` needs besides the objective."""

    run_folder: Path
    schedule: Sequence[NoiseExpert]  # the noise expert of every optimizer step
    data_streams: dict[NoiseExpert, DataStream]
    optimizers: dict[str, Optimizer]
    lr_schedules: dict[str, Any]
    load_batch: Callable[[Sequence[int]], Batch]  # item indices to a batch on the device
    item_ids: Sequence[str]
    seed: int
    accumulate: int = 1  # batches an optimizer step, over all processes
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.0
    ema_decay: float | None = None
    save_every: int = 100
    log_every: int = 1
    sigma_bins: int = 4
    keep_last: int | None = None
    keep_best: int | None = None
    resume_command: str = "--resume"
    identity: Mapping[str, str] = field(default_factory=dict)  # hashes of clips and base, checked on resume
    allow_changed: bool = False  # resume although settings or contents differ
    distributed: Distributed = field(default_factory=Distributed)
    memory_summary: str = ""  # the memory plan in one line, for an out-of-memory message
    predicted_peak: int = 0  # bytes on the device; 0: not predicted
    micro_batch: int | None = None  # clips a forward, where a whole batch does not fit; the result is the same
    before_turn: Callable[[NoiseExpert], None] = lambda noise_expert: None  # brings its weights to the device
    after_step: Callable[[], None] = lambda: None
    before_save: Callable[[], None] = lambda: None  # in every process, before the first one writes
    callbacks_on_all_processes: bool = False  # sharded weights run a forward only in all processes at once
    without_context_parallel: Callable[[], AbstractContextManager[None]] = nullcontext  # for the periodic callbacks
    # Adds clean latents to a step's batches where they are generated (a rollout from the draws' noise), not read.
    complete_batches: Callable[[NoiseExpert, Sequence[Batch], Sequence[Draws]], list[Batch]] = (
        lambda noise_expert, batches, draws: [*batches])


@dataclass(frozen=True)
class StepData:
    """This process's batches of one optimizer step with their draws; `samples` counts those of all processes."""

    batches: list[Batch]
    draws: list[Draws]
    samples: int
    next_position: tuple[int, int]


def load_step_data(plan: TrainerPlan, noise_expert: NoiseExpert, position: tuple[int, int]) -> StepData:
    """The batches of a step that start at a position of the noise expert's data; draws are keyed by visit."""
    stream = plan.data_streams[noise_expert]
    visits, next_position = stream.order.batches(position, plan.accumulate)
    samples = sum(len(batch) for batch in visits)
    size = plan.micro_batch or max(map(len, visits))
    visits = [batch[i : i + size]
              for batch in plan.distributed.local_items(visits) for i in range(0, len(batch), size)]
    batches = [plan.load_batch([visit.item for visit in batch]) for batch in visits]
    keys = [[(plan.seed, noise_expert.value, visit.number, plan.item_ids[visit.item]) for visit in batch]
            for batch in visits]
    draws = [make_draws(batch, batch_keys, stream.sigma_rule, plan.caption_dropout)
             for batch, batch_keys in zip(batches, keys, strict=True)]
    return StepData(batches, draws, samples, next_position)


class Prefetcher:
    """The data of the next step, loaded ahead of its use."""

    def __init__(self, plan: TrainerPlan) -> None:
        self._plan = plan
        self._ready: tuple[NoiseExpert, tuple[int, int], StepData] | None = None

    def prefetch(self, noise_expert: NoiseExpert, position: tuple[int, int]) -> None:
        """Load the data of this step now."""
        self._ready = noise_expert, position, load_step_data(self._plan, noise_expert, position)

    def get(self, noise_expert: NoiseExpert, position: tuple[int, int]) -> StepData:
        """The data of a step: what was prefetched if it is for this step, else loaded now."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[:2] == (noise_expert, position):
            return ready[2]
        return load_step_data(self._plan, noise_expert, position)
