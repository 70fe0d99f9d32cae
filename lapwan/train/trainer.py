"""A small trainer that knows no algorithm: turns of optimizer steps by noise expert, checkpoints, metrics, resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lapwan import console
from lapwan.caching.batch import Batch
from lapwan.errors import Interrupted, UserError
from lapwan.memory.out_of_memory import memory_figures, out_of_memory, peak_line, start_peak
from lapwan.names import NoiseExpert
from lapwan.train import checkpoint
from lapwan.train.callbacks.base import PeriodicCallback, StepCallback, StepResult
from lapwan.train.ema import Ema
from lapwan.train.interrupt import Stop, stop_requested
from lapwan.train.metrics import Metrics, StepLog, join
from lapwan.train.objective import Draws, Objective, SigmaRule, make_draws
from lapwan.train.optimizers import current_lr, restore
from lapwan.train.parallel import Distributed, whole
from lapwan.train.prefetch import Ahead, StepData
from lapwan.train.schedule import SampleOrder

_BAD_STEPS_BEFORE_STOP = 5


@dataclass
class Track:
    """One noise expert's way through the data: its order, its sigmas, and how far it is."""

    order: SampleOrder
    rule: SigmaRule
    position: tuple[int, int] = (0, 0)  # (epoch, batch)
    steps: int = 0


@dataclass
class TrainerPlan:
    """Everything `fit` needs besides the objective; `load_batch` turns item indices into a batch on the device."""

    run: Path
    schedule: Sequence[NoiseExpert]
    tracks: dict[NoiseExpert, Track]
    optimizers: dict[str, Optimizer]
    lr_schedules: dict[str, Any]
    load_batch: Callable[[Sequence[int]], Batch]
    item_ids: Sequence[str]
    seed: int
    accumulate: int = 1
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.0
    ema_decay: float | None = None
    save_every: int = 100
    log_every: int = 1
    sigma_bins: int = 4
    keep_last: int | None = None
    keep_best: int | None = None
    resume_command: str = "--resume"
    identity: Mapping[str, str] = field(default_factory=dict)  # of clips and base: what a moved run is checked by
    changes_allowed: bool = False
    distributed: Distributed = field(default_factory=Distributed)
    memory: str = ""  # what was computed to be needed, for when it was not enough
    predicted_peak: int = 0  # bytes on the device; 0: not predicted
    micro_batch: int | None = None  # clips at a time where a batch does not fit whole: the same sums in more parts
    before_turn: Callable[[NoiseExpert], None] = lambda noise_expert: None  # brings its weights to the device
    after_step: Callable[[], None] = lambda: None  # may say what the step took besides computing
    callbacks_on_all_processes: bool = False  # watchers look in every process: sharded weights answer only when all ask
    alone: Callable[[], AbstractContextManager[None]] = nullcontext  # one process asks transformers that several share
    before_save: Callable[[], None] = lambda: None  # in every process, before the first one writes
    # Gives a step's batches their clean latents where these are made (a rollout from the draws' noise), not read.
    complete: Callable[[NoiseExpert, Sequence[Batch], Sequence[Draws]], list[Batch]] = lambda e, batches, d: [*batches]


class Trainer:
    """Runs a plan with an objective. Its state is the trained tensors and what `_rest` returns: nothing else counts."""

    def __init__(self, plan: TrainerPlan, objective: Objective) -> None:
        self.plan, self.objective = plan, objective
        self.step = 0
        self.skipped = 0
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for groups in objective.optimised.values()
            for group in groups
            for name, parameter in group.parameters.items()
        }
        self.ema = None if plan.ema_decay is None else Ema(self.parameters, plan.ema_decay)
        self.rules: dict[str, StepCallback] = {}
        self.callbacks: dict[str, PeriodicCallback] = {}
        self._logs = {noise_expert: StepLog() for noise_expert in plan.tracks}
        self._ahead = Ahead(self._make_data)
        self._writer = checkpoint.CheckpointWriter()
        self._bad_in_a_row = 0
        self._score: tuple[int, float | None] = (0, None)  # the last validation: step, mean loss
        self.finished: str | None = None  # why the run ends before its schedule, by no fault

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            UserError: a damaged checkpoint, or one of another run.
        """
        found = checkpoint.checkpoints(self.plan.run)
        if not found:
            return False
        step, folder = found[-1]
        rest = checkpoint.load(folder, self.parameters)
        checkpoint.check_identity(folder, rest["identity"], self.plan.identity, self.plan.changes_allowed)
        self.step, self.skipped = step, rest["skipped"]
        for noise_expert, track in self.plan.tracks.items():
            epoch, index, track.steps = rest["tracks"].get(noise_expert.value, (0, 0, 0))
            track.position = (epoch, index)
        for name, optimizer in self.plan.optimizers.items():
            if rest["kinds"].get(name) != type(optimizer).__name__:
                console.warn(f"{name}: the checkpoint's optimizer is {rest['kinds'].get(name)}, this run's "
                             f"{type(optimizer).__name__}, which starts without a history")
                continue
            restore(optimizer, self.plan.lr_schedules[name], rest["optimisers"][name], rest["lr_schedules"][name],
                    ours=self.plan.changes_allowed)
        self.objective.load_state_dict(rest["objective"])
        if self.ema is not None and rest["ema"] is not None:
            self.ema.load_state_dict(rest["ema"])
        for part, saved in ((self.rules, rest["rules"]), (self.callbacks, rest["watchers"])):
            for name, one in part.items():
                if name in saved:
                    one.load_state_dict(saved[name])
        return True

    def _rest(self) -> dict[str, Any]:
        tracks = {e.value: [*t.position, t.steps] for e, t in self.plan.tracks.items()}
        return {
            "skipped": self.skipped, "tracks": tracks, "identity": dict(self.plan.identity),
            "lr_schedules": {name: s.state_dict() for name, s in self.plan.lr_schedules.items()},
            "optimisers": {name: o.state_dict() for name, o in self.plan.optimizers.items()},
            "kinds": {name: type(o).__name__ for name, o in self.plan.optimizers.items()},
            "objective": self.objective.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "rules": {name: rule.state_dict() for name, rule in self.rules.items()},
            "watchers": {name: callback.state_dict() for name, callback in self.callbacks.items()},
        }

    def as_saved(self) -> AbstractContextManager[None]:
        """The weights that are saved: the running mean where it is on."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of this step, from the first process; without `wait`, while the next steps run."""
        def adapters(folder: Path) -> list[Path]:
            with self.as_saved():
                return self.objective.save(folder, self.step)

        self.plan.before_save()
        parameters, rest = whole(self.parameters), whole(self._rest())
        if self.plan.distributed.first:
            score = self._score[1] if self._score[0] == self.step else None
            keep = checkpoint.Keep(self.plan.keep_last, self.plan.keep_best, score)
            self._writer.wait()  # one at a time: it may drop older ones
            finish = checkpoint.begin(self.plan.run, self.step, adapters, parameters, rest, keep)
            self._writer.start(finish)
            if wait:
                self._writer.wait()

    def fit(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state is saved.
            UserError: too many non-finite steps in a row, a watcher's reason to stop, out of memory; the state is
                saved.
        """
        plan, total = self.plan, len(self.plan.schedule)
        metrics = Metrics(plan.run, self.step) if plan.distributed.first else None
        start_peak()
        saved = self.step if checkpoint.checkpoints(plan.run) else -1
        try:
            with stop_requested() as stop, console.progress("training", total, "step", done=self.step) as bar:
                while self.step < total and self.finished is None:
                    reason = self._one_step(metrics, bar, stop)
                    if self.step % plan.save_every == 0 or self.step == total or reason:
                        self.save(wait=reason is not None)
                        saved = self.step
                    if reason:
                        raise reason
            if saved != self.step:
                self.save()
            self._writer.wait()
            if plan.predicted_peak and (told := peak_line(plan.predicted_peak)):
                console.log(told)
        except torch.OutOfMemoryError as error:
            self.save()
            raise out_of_memory(error, plan.run, self.step, plan.resume_command, plan.memory) from None
        finally:
            self._writer.wait()
            if metrics is not None:
                metrics.close()

    def _one_step(self, metrics: Metrics | None, bar: console.Bar, stop: Stop) -> Exception | None:
        """Train, log and look once; why to stop after saving, if there is a reason."""
        plan, noise_expert = self.plan, self.plan.schedule[self.step]
        started = time.monotonic()
        figures = self._optimizer_step(noise_expert)
        plan.after_step()
        self.step += 1
        seconds = time.monotonic() - started
        self._logs[noise_expert].seconds += seconds
        shared, reason = self._look(metrics)
        self._write(metrics, noise_expert, figures, shared, seconds, bar)
        where = f"saved at step {self.step}"
        if self._bad_in_a_row >= _BAD_STEPS_BEFORE_STOP:
            return UserError(f"{_BAD_STEPS_BEFORE_STOP} steps in a row had a non-finite loss or gradient; the weights "
                             f"are as before them, {where}; lower the lr or look at the clips")
        if reason is not None:
            return UserError(f"{reason}; {where} of {len(plan.schedule)} in {plan.run}")
        if plan.distributed.any(stop.requested) and self.step < len(plan.schedule):
            return Interrupted(f"interrupted; state {where} of {len(plan.schedule)} in {plan.run}; go on with "
                               f"{plan.resume_command}")
        return None

    def _make_data(self, noise_expert: NoiseExpert, position: tuple[int, int]) -> StepData:
        plan, track = self.plan, self.plan.tracks[noise_expert]
        visits, after = track.order.batches(position, plan.accumulate)
        samples = sum(len(group) for group in visits)
        size = plan.micro_batch or max(map(len, visits))
        visits = [group[i : i + size] for group in plan.distributed.own(visits) for i in range(0, len(group), size)]
        batches = [plan.load_batch([visit.item for visit in group]) for group in visits]
        keys = [[(plan.seed, noise_expert.value, visit.number, plan.item_ids[visit.item]) for visit in g] for g in visits]
        drawn = [make_draws(batch, own, track.rule, plan.caption_dropout)
                 for batch, own in zip(batches, keys, strict=True)]
        return StepData(batches, drawn, samples, after)

    def _optimizer_step(self, noise_expert: NoiseExpert) -> dict[str, Tensor | float]:
        plan, track = self.plan, self.plan.tracks[noise_expert]
        plan.before_turn(noise_expert)
        data = self._ahead.take(noise_expert, track.position)
        names = self.objective.stepped_by(noise_expert)
        for name in names:
            plan.optimizers[name].zero_grad(set_to_none=True)
        batches = plan.complete(noise_expert, data.batches, data.drawn)
        self.objective.prepare(noise_expert, batches, plan.distributed.sum, data.drawn)
        log, before = self._logs[noise_expert], len(self._logs[noise_expert].losses)
        for batch, draws in zip(batches, data.drawn, strict=True):
            with self.objective.loss(noise_expert, batch, draws) as loss:
                total_B = loss.total_B
                torch.autograd.backward(total_B.sum() / (data.samples * plan.distributed.copies))
            log.add(loss, total_B, draws.sigma_B if loss.sigma_B is None else loss.sigma_B)
        for following in plan.schedule[self.step + 1 : self.step + 2]:  # while the device works on the backward
            self._ahead.foresee(following, data.after if following is noise_expert else plan.tracks[following].position)
        # Only now: a step that runs out of memory, here or while the next one's clips are read, is not taken.
        track.position, track.steps = data.after, track.steps + 1
        figures, stepped = self._update(names)
        if stepped:
            figures |= self._follow_rules(noise_expert, log.losses[before:], log.sigmas[before:])
        return figures

    def _update(self, names: Sequence[str]) -> tuple[dict[str, Tensor | float], bool]:
        """Clip and step, unless a gradient is not finite: then the weights and the optimizer stay as they were."""
        plan = self.plan
        parameters = [p for name in names for group in plan.optimizers[name].param_groups for p in group["params"]]
        plan.distributed.sum_gradients(parameters)
        norm = plan.distributed.clip(parameters, plan.max_grad_norm)
        stepped = bool(torch.isfinite(norm))
        if stepped:
            self._bad_in_a_row = 0
            for name in names:
                plan.optimizers[name].step()
                plan.lr_schedules[name].step()
        else:
            self.skipped += 1
            self._bad_in_a_row += 1
            console.warn(f"step {self.step + 1}: non-finite loss or gradient; update dropped")
        return {"grad_norm": norm}, stepped

    def _follow_rules(
        self, noise_expert: NoiseExpert, losses: Sequence[Tensor], sigmas: Sequence[Tensor]
    ) -> dict[str, Tensor | float]:
        """Rules first, since what they do to the weights is part of the update; then the running mean."""
        own = self.plan.tracks[noise_expert].steps
        seen = StepResult(self.step + 1, own, noise_expert)
        if any(rule.needs_losses for rule in self.rules.values()):
            parts = self.plan.distributed.figures((torch.cat(list(losses)).tolist(), torch.cat(list(sigmas)).tolist()))
            seen = StepResult(seen.step, own, noise_expert, tuple(x for part in parts for x in part[0]),
                            tuple(x for part in parts for x in part[1]))
        figures: dict[str, Tensor | float] = {}
        for rule in self.rules.values():
            figures |= rule.after_update(seen)
        if self.ema is not None:
            groups = [g for name in self.objective.stepped_by(noise_expert) for g in self.objective.optimised[name]]
            self.ema.update(name for group in groups for name in group.parameters)
        return figures

    def _look(self, metrics: Metrics | None) -> tuple[dict[str, float], str | None]:
        """Ask the watchers that are due, in the first process; the reason to stop is everybody's."""
        last = self.step == len(self.plan.schedule)
        due = [w for w in self.callbacks.values() if self.step % w.every == 0 or last]
        if not due:
            return {}, None
        figures: dict[str, float] = {}
        reason, finished, score = None, None, None
        if metrics is not None or self.plan.callbacks_on_all_processes:
            with self.as_saved(), self.plan.alone():
                for callback in due:
                    seen = callback.look(self.step, None if metrics is None else metrics.board)
                    figures |= seen.figures
                    reason, finished = reason or seen.stop, finished or seen.finished
                    score = score if seen.score is None else seen.score
            self._score = (self.step, figures.get("validation/mean", score))
        reason, self.finished = self.plan.distributed.from_first((reason, finished))
        return figures, reason

    def _write(
        self, metrics: Metrics | None, noise_expert: NoiseExpert, figures: Mapping[str, Tensor | float],
        shared: Mapping[str, float], seconds: float, bar: console.Bar,
    ) -> None:
        plan = self.plan
        quiet = self.step % plan.log_every and self.step != len(plan.schedule)
        if quiet and not plan.distributed.from_first(bool(shared)):
            bar.advance()
            return
        logged = join(plan.distributed.figures(self._logs[noise_expert].plain()))
        clips_per_second = len(logged.sigmas) / max(self._logs[noise_expert].seconds, 1e-9)
        self._logs[noise_expert] = StepLog()
        if metrics is None:
            return
        band = plan.tracks[noise_expert].rule.band
        own = {**logged.means, **logged.by_bin(band, plan.sigma_bins)}
        own |= {name: float(value) for name, value in figures.items()}
        own["lr"] = float(current_lr(plan.optimizers[self.objective.stepped_by(noise_expert)[0]]))
        own |= {"own_step": plan.tracks[noise_expert].steps, "skipped_steps": self.skipped, "seconds": seconds,
                "clips_per_second": clips_per_second, **memory_figures()}
        metrics.write(self.step, noise_expert.value, own, shared)
        metrics.histogram(f"sigma/{noise_expert.file_suffix}", logged.sigmas, self.step)
        bar.advance(noise_expert=noise_expert.value, loss=own["loss"], lr=own["lr"])
