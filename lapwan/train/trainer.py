"""A small trainer that knows no algorithm: turns of optimiser steps by noise expert, checkpoints, metrics, resume."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lapwan import console
from lapwan.data.batch import Batch
from lapwan.errors import Interrupted, UserError
from lapwan.losses.sigmas import SigmaSampler
from lapwan.names import Band, NoiseExpert
from lapwan.train import checkpoint
from lapwan.train.metrics import Metrics
from lapwan.train.objective import Loss, Objective, make_draws
from lapwan.train.order import SampleOrder

_BAD_STEPS_BEFORE_STOP = 5


@dataclass
class Track:
    """One noise expert's way through the data: its order, sigma sampler and band, and how far it is."""

    order: SampleOrder
    sampler: SigmaSampler
    band: Band
    position: tuple[int, int] = (0, 0)  # (epoch, batch)
    steps: int = 0


@dataclass
class Plan:
    """Everything `fit` needs besides the objective; `load_batch` turns item indices into a batch on the device."""

    run: Path
    schedule: Sequence[NoiseExpert]
    tracks: dict[NoiseExpert, Track]
    optimisers: dict[str, Optimizer]
    lr_schedules: dict[str, Any]
    load_batch: Callable[[Sequence[int]], Batch]
    item_ids: Sequence[str]
    seed: int
    accumulate: int = 1
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.0
    save_every: int = 100
    log_every: int = 1
    keep_last: int | None = None
    resume_command: str = "--resume"


@dataclass
class _Log:
    """Figures of the steps since the last logged one, as sums and counts on the device: no sync in between."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sigmas: list[Tensor] = field(default_factory=list)

    def add(self, loss: Loss, total_B: Tensor, sigma_B: Tensor) -> None:
        for name, values in {**loss.figures, "loss": total_B.detach()}.items():
            self.sums[name] = self.sums.get(name, 0) + values.sum()
            self.counts[name] = self.counts.get(name, 0) + values.numel()
        self.sigmas.append(sigma_B.detach())

    def means(self) -> dict[str, float]:
        return {name: float(total) / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


class Trainer:
    """Runs a plan with an objective. Its state is the trained tensors and what `_rest` returns: nothing else counts."""

    def __init__(self, plan: Plan, objective: Objective) -> None:
        self.plan, self.objective = plan, objective
        self.step = 0
        self.skipped = 0
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for groups in objective.optimised.values()
            for group in groups
            for name, parameter in group.parameters.items()
        }
        self._logs = {expert: _Log() for expert in plan.tracks}
        self._bad_in_a_row = 0

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none."""
        found = checkpoint.checkpoints(self.plan.run)
        if not found:
            return False
        step, folder = found[-1]
        rest = checkpoint.load(folder, self.parameters)
        self.step, self.skipped = step, rest["skipped"]
        for expert, track in self.plan.tracks.items():
            epoch, index, track.steps = rest["tracks"][expert.value]
            track.position = (epoch, index)
        for name, optimiser in self.plan.optimisers.items():
            optimiser.load_state_dict(rest["optimisers"][name])
            self.plan.lr_schedules[name].load_state_dict(rest["lr_schedules"][name])
        self.objective.load_state_dict(rest["objective"])
        return True

    def _rest(self) -> dict[str, Any]:
        tracks = {e.value: [*t.position, t.steps] for e, t in self.plan.tracks.items()}
        return {
            "skipped": self.skipped, "tracks": tracks,
            "lr_schedules": {name: s.state_dict() for name, s in self.plan.lr_schedules.items()},
            "optimisers": {name: o.state_dict() for name, o in self.plan.optimisers.items()},
            "objective": self.objective.state_dict(),
        }

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        return checkpoint.save(
            self.plan.run, self.step, self.objective, self.parameters, self._rest(), self.plan.keep_last
        )

    def fit(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state is saved.
            UserError: too many non-finite steps in a row; the state is saved.
        """
        plan, total = self.plan, len(self.plan.schedule)
        metrics = Metrics(plan.run, self.step)
        saved = self.step if checkpoint.checkpoints(plan.run) else -1
        try:
            with _stop_requested() as stop, console.progress("training", total, "step", done=self.step) as bar:
                while self.step < total:
                    expert = plan.schedule[self.step]
                    started = time.monotonic()
                    figures = self._optimiser_step(expert)
                    self.step += 1
                    self._write(metrics, expert, figures, time.monotonic() - started, bar)
                    if self.step % plan.save_every == 0 or self.step == total or stop.requested or self._hopeless:
                        self.save()
                        saved = self.step
                    if self._hopeless:
                        raise UserError(
                            f"{_BAD_STEPS_BEFORE_STOP} steps in a row had a non-finite loss or gradient; the weights "
                            f"are as before them, saved at step {self.step}; lower the lr or look at the clips"
                        )
                    if stop.requested and self.step < total:
                        raise Interrupted(f"interrupted; state saved at step {self.step} of {total} in {plan.run}; "
                                          f"go on with {plan.resume_command}")
            if saved != self.step:
                self.save()
        finally:
            metrics.close()

    @property
    def _hopeless(self) -> bool:
        return self._bad_in_a_row >= _BAD_STEPS_BEFORE_STOP

    def _optimiser_step(self, expert: NoiseExpert) -> dict[str, Tensor | float]:
        plan, track = self.plan, self.plan.tracks[expert]
        visits, track.position = track.order.batches(track.position, plan.accumulate)
        batches = [plan.load_batch([visit.item for visit in group]) for group in visits]
        samples = sum(len(group) for group in visits)
        names = self.objective.stepped_by(expert)
        for name in names:
            plan.optimisers[name].zero_grad(set_to_none=True)
        self.objective.prepare(expert, batches)
        log = self._logs[expert]
        for batch, group in zip(batches, visits, strict=True):
            keys = [(plan.seed, expert.value, visit.number, plan.item_ids[visit.item]) for visit in group]
            draws = make_draws(batch, keys, track.sampler, track.band, plan.caption_dropout)
            with self.objective.loss(expert, batch, draws) as loss:
                total_B = loss.total_B
                torch.autograd.backward(total_B.sum() / samples)
            log.add(loss, total_B, draws.sigma_B)
        track.steps += 1
        return self._update(names)

    def _update(self, names: Sequence[str]) -> dict[str, Tensor | float]:
        """Clip and step, unless a gradient is not finite: then the weights and the optimiser stay as they were."""
        plan = self.plan
        parameters = [p for name in names for group in plan.optimisers[name].param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            self.skipped += 1
            self._bad_in_a_row += 1
            console.warn(f"step {self.step + 1}: non-finite loss or gradient; update dropped")
        else:
            self._bad_in_a_row = 0
            for name in names:
                plan.optimisers[name].step()
                plan.lr_schedules[name].step()
        return {"grad_norm": norm, "lr": float(plan.lr_schedules[names[0]].get_last_lr()[0])}

    def _write(self, metrics: Metrics, expert: NoiseExpert, figures: Mapping[str, Tensor | float], seconds: float,
               bar: console.Bar) -> None:
        if self.step % self.plan.log_every and self.step != len(self.plan.schedule):
            bar.advance()
            return
        log = self._logs[expert]
        means = log.means()
        self._logs[expert] = _Log()
        shown = {**means, **{name: float(value) for name, value in figures.items()}, "seconds": seconds}
        metrics.write(self.step, expert.value, shown)
        metrics.histogram(f"sigma/{expert.file_suffix}", torch.cat(log.sigmas).tolist(), self.step)
        bar.advance(expert=expert.value, loss=means["loss"], lr=shown["lr"])


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_requested() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request that the loop meets between steps; a second one acts at once."""
    stop = _Stop()
    before = {}

    def on_signal(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        console.log("stopping after this step and saving; press Ctrl-C again to stop at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
