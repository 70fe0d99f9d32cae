"""A small trainer that knows no algorithm: optimizer steps in turns by noise expert, checkpoints, metrics, resume.

`Trainer.fit` is the loop, `Trainer._train_step` one step of it. The algorithm is an `Objective`, the data a
`TrainingData`; what a run does besides is a `Callback`. `lapwan.train.recipe` makes them from settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwan import console
from lapwan.caching.collate import Batch
from lapwan.documents import checked
from lapwan.errors import Interrupted, UserError
from lapwan.faults import library_reads
from lapwan.interrupt import Stop, stop_requested
from lapwan.memory.out_of_memory import memory_figures, out_of_memory, peak_line, start_peak
from lapwan.names import NoiseExpert
from lapwan.train import checkpoint
from lapwan.train.callbacks.base import Callback, StepResult
from lapwan.train.dropped_steps import DroppedSteps, run_summary
from lapwan.train.ema import Ema
from lapwan.train.metrics import MetricsWriter, StepLog, merge_logs
from lapwan.train.objective import Objective
from lapwan.train.optimizers import ScheduledOptimizer
from lapwan.train.parallel import Distributed, full_tensors
from lapwan.train.run_state import RunState
from lapwan.train.trainer_config import TrainerConfig
from lapwan.train.training_data import StepData, TrainingData

_NON_FINITE_LIMIT = 5  # non-finite steps in a row after which the run stops


class Trainer:
    """Trains an objective on its data, a noise expert at a time. Its state is the trained parameters and `_state()`.

    Args:
        schedule: the noise expert of every optimizer step.
        optimizers: by the names of the objective's parameter groups.
        callbacks: their hooks are called in this order.
        ema: of the trained parameters; what is evaluated and saved where it is given.
    """

    def __init__(
        self, objective: Objective, data: TrainingData, schedule: Sequence[NoiseExpert],
        optimizers: Mapping[str, ScheduledOptimizer], config: TrainerConfig, callbacks: Sequence[Callback] = (),
        ema: Ema | None = None, distributed: Distributed | None = None,
    ) -> None:
        self.objective, self.data, self.schedule, self.optimizers = objective, data, schedule, optimizers
        self.config, self.ema, self.distributed = config, ema, distributed or Distributed()
        self.callbacks = {callback.name: callback for callback in callbacks}
        self.parameters = objective.parameters
        self.step = 0
        self.dropped = DroppedSteps(config.skip_bad_clips)
        self._step_losses: list[tuple[Batch, Tensor]] = []  # of this process in the current step
        self.finished: str | None = None  # why the run ends before its schedule, without a fault
        self._logs = {noise_expert: StepLog() for noise_expert in data.streams}
        self._writer = checkpoint.CheckpointWriter()
        self._non_finite_in_a_row = 0
        self._score: tuple[int, float | None] = (0, None)  # of the last evaluation: step, what keep_best compares

    def fit(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state is saved.
            UserError: too many non-finite steps in a row, a callback that stops the run, or out of memory; the state
                is saved.
        """
        config, total = self.config, len(self.schedule)
        metrics = MetricsWriter(config.run_folder, self.step, config.tracker) if self.distributed.first else None
        start_peak()
        saved = self.step if checkpoint.checkpoints(config.run_folder) else -1
        try:
            self._start_callbacks(metrics)
            with (stop_requested() as stop, run_summary(self.dropped, list(self.callbacks.values()), lambda: self.step),
                  console.progress("training", total, "step", done=self.step) as bar):
                while self.step < total and self.finished is None:
                    stop_error = self._train_step(metrics, bar, stop)
                    if self.step % config.save_every == 0 or self.step == total or stop_error:
                        self.save(wait=stop_error is not None)
                        saved = self.step
                    if stop_error:
                        raise stop_error
            if saved != self.step:
                self.save()
            self._writer.wait()
            if config.predicted_peak and (line := peak_line(config.predicted_peak)):
                console.log(line)
        except torch.OutOfMemoryError as error:
            self.save()
            raise out_of_memory(
                error, config.run_folder, self.step, config.resume_command, config.memory_summary) from None
        finally:
            self._writer.wait()
            if metrics is not None:
                metrics.close()

    def _start_callbacks(self, metrics: MetricsWriter | None) -> None:
        board = None if metrics is None else metrics.board
        for callback in self.callbacks.values():
            if self.distributed.first or callback.on_all_processes:
                callback.on_start(board)

    def _train_step(self, metrics: MetricsWriter | None, bar: console.Bar, stop: Stop) -> Exception | None:
        """One optimizer step, the callbacks that are due, and the log; what to raise after saving, if anything."""
        noise_expert = self.schedule[self.step]
        started = time.monotonic()
        step_figures = self._optimizer_step(noise_expert)
        self.step += 1
        seconds = time.monotonic() - started
        self._logs[noise_expert].seconds += seconds
        run_figures, stop_reason = self._evaluate(metrics)
        self._log(metrics, noise_expert, step_figures, run_figures, seconds, bar)
        return self._stop_error(stop_reason, stop)

    def _optimizer_step(self, noise_expert: NoiseExpert) -> dict[str, Tensor | float]:
        """Forward and backward of every batch, one update, then the callbacks' part; returns figures to log."""
        stream = self.data.streams[noise_expert]
        for callback in self.callbacks.values():
            callback.before_turn(noise_expert)
        data = self.data.step(noise_expert)
        optimizers = [self.optimizers[name] for name in self.objective.optimizers_for(noise_expert)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        batches = self.objective.prepare(noise_expert, data.batches, self.distributed.all_reduce, data.draws)
        losses, sigmas = self._backward(noise_expert, batches, data)
        for callback in self.callbacks.values():
            callback.after_backward(noise_expert)
        self._prefetch_next(noise_expert, data)  # while the device works on the backward
        # Only now: a step that runs out of memory, here or while the next one's clips are read, is not counted.
        stream.position, stream.steps = data.next_position, stream.steps + 1
        figures, updated = self._update(optimizers)
        if updated:
            figures |= self._after_update(noise_expert, losses, sigmas)
        return figures

    def _prefetch_next(self, noise_expert: NoiseExpert, data: StepData) -> None:
        if self.step + 1 < len(self.schedule):
            following = self.schedule[self.step + 1]
            same = following is noise_expert
            self.data.prefetch(following, data.next_position if same else self.data.streams[following].position)

    def _backward(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], data: StepData
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Accumulate the gradients of the mean loss over the step; returns flow losses and sigmas by batch."""
        log = self._logs[noise_expert]
        logged = len(log.losses)
        self._step_losses = []
        divisor = data.samples * self.distributed.context_parallel_size
        for batch, draws in zip(batches, data.draws, strict=True):
            with self.objective.loss(noise_expert, batch, draws) as loss:
                total_B = loss.total_B
                torch.autograd.backward(total_B.sum() / divisor)
            self._step_losses.append((batch, total_B.detach()))
            log.add(loss, total_B, draws.sigma_B if loss.sigma_B is None else loss.sigma_B)
        return log.losses[logged:], log.sigmas[logged:]

    def _update(self, optimizers: Sequence[ScheduledOptimizer]) -> tuple[dict[str, Tensor | float], bool]:
        """Clip and step; with a non-finite gradient the weights and the optimizer states stay as they were."""
        parameters = [parameter for optimizer in optimizers for parameter in optimizer.parameters]
        self.distributed.sum_gradients(parameters)
        norm = self.distributed.clip_gradients(parameters, self.config.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self._non_finite_in_a_row = 0
            for optimizer in optimizers:
                optimizer.step()
        else:
            self._non_finite_in_a_row += 1
            self._drop_step()
        return {"grad_norm": norm}, finite

    def _drop_step(self) -> None:
        """Name the clips of a dropped step, in every process, and train no longer on those to be skipped."""
        local = [(clip, math.isfinite(value)) for batch, total_B in self._step_losses
                 for clip, value in zip(batch.ids, total_B.tolist(), strict=True)]
        samples = [sample for part in self.distributed.gather_samples(local) for sample in part]
        console.warn(self.dropped.add(self.step + 1, samples))
        if left_out := self.dropped.left_out:
            self.data.exclude(left_out)

    def _after_update(
        self, noise_expert: NoiseExpert, losses: Sequence[Tensor], sigmas: Sequence[Tensor]
    ) -> dict[str, Tensor | float]:
        """The callbacks first, since what they change is part of the update; then the EMA."""
        result = StepResult(self.step + 1, self.data.streams[noise_expert].steps, noise_expert)
        if any(callback.needs_losses for callback in self.callbacks.values()):
            parts = self.distributed.gather_samples(
                (torch.cat(list(losses)).tolist(), torch.cat(list(sigmas)).tolist()))
            result = replace(
                result, losses=tuple(loss for part_losses, _ in parts for loss in part_losses),
                sigmas=tuple(sigma for _, part_sigmas in parts for sigma in part_sigmas))
        figures: dict[str, Tensor | float] = {}
        for callback in self.callbacks.values():
            figures |= callback.after_update(result)
        if self.ema is not None:
            names = self.objective.optimizers_for(noise_expert)
            groups = [group for name in names for group in self.objective.parameter_groups[name]]
            self.ema.update(name for group in groups for name in group.parameters)
        return figures

    def _evaluate(self, metrics: MetricsWriter | None) -> tuple[dict[str, float], str | None]:
        """Call `on_step` of the callbacks that are due; the first process's reason to stop holds for all."""
        last = self.step == len(self.schedule)
        due = [callback for callback in self.callbacks.values()
               if callback.every is not None and (self.step % callback.every == 0 or last)]
        if not due:
            return {}, None
        figures: dict[str, float] = {}
        stop_reason, finished, score = None, None, None
        if local := [callback for callback in due if self.distributed.first or callback.on_all_processes]:
            with self.ema_weights(), self.distributed.without_context_parallel():
                for callback in local:
                    result = callback.on_step(self.step, None if metrics is None else metrics.board)
                    figures |= result.figures
                    stop_reason, finished = stop_reason or result.stop, finished or result.finished
                    score = score if result.score is None else result.score
            self._score = (self.step, score)
        stop_reason, self.finished = self.distributed.from_first((stop_reason, finished))
        return figures, stop_reason

    def _log(
        self, metrics: MetricsWriter | None, noise_expert: NoiseExpert, step_figures: Mapping[str, Tensor | float],
        run_figures: Mapping[str, float], seconds: float, bar: console.Bar,
    ) -> None:
        due = self.step % self.config.log_every == 0 or self.step == len(self.schedule)
        if not due and not self.distributed.from_first(bool(run_figures)):
            bar.advance()
            return
        log, self._logs[noise_expert] = self._logs[noise_expert], StepLog()
        summary = merge_logs(self.distributed.gather_samples(log.to_host()))
        if metrics is None:
            return
        stream = self.data.streams[noise_expert]
        figures = {**summary.means, **summary.by_sigma_bin(stream.sigma_rule.band, self.config.sigma_bins)}
        figures |= {name: float(value) for name, value in step_figures.items()}
        figures["lr"] = float(self.optimizers[self.objective.optimizers_for(noise_expert)[0]].lr)
        figures |= {"own_step": stream.steps, "skipped_steps": self.dropped.count, "seconds": seconds,
                    "clips_per_second": len(summary.sigmas) / max(log.seconds, 1e-9), **memory_figures()}
        metrics.write(self.step, noise_expert.value, figures, run_figures)
        metrics.histogram(f"sigma/{noise_expert.file_suffix}", summary.sigmas, self.step)
        bar.advance(noise_expert=noise_expert.value, loss=figures["loss"], lr=figures["lr"])

    def _stop_error(self, stop_reason: str | None, stop: Stop) -> Exception | None:
        config, total, saved = self.config, len(self.schedule), f"saved at step {self.step}"
        if self._non_finite_in_a_row >= _NON_FINITE_LIMIT:
            return UserError(f"{_NON_FINITE_LIMIT} steps in a row had a non-finite loss or gradient; the weights "
                             f"are those before these steps, {saved}; lower the lr or check the clips")
        if stop_reason is not None:
            return UserError(f"{stop_reason}; {saved} of {total} in {config.run_folder}")
        if self.distributed.any(stop.requested) and self.step < total:
            return Interrupted(f"interrupted; state {saved} of {total} in {config.run_folder}; continue with "
                               f"{config.resume_command}")
        return None

    def ema_weights(self) -> AbstractContextManager[None]:
        """A scope in which the parameters are those that are saved: the EMA where it is on."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of this step, from the first process; without `wait`, in the background."""
        def write_adapters(folder: Path) -> list[Path]:
            with self.ema_weights():
                return self.objective.save(folder, self.step)

        config = self.config
        for callback in self.callbacks.values():
            callback.before_save()
        parameters, state = full_tensors(self.parameters), full_tensors(self._state())
        if self.distributed.first:
            scored_step, score = self._score
            retention = checkpoint.Retention(
                config.keep_last, config.keep_best, score if scored_step == self.step else None)
            self._writer.wait()  # one at a time: it may remove older ones
            self._writer.start(checkpoint.start_checkpoint(
                config.run_folder, self.step, write_adapters, parameters, state, retention))
            if wait:
                self._writer.wait()

    def _state(self) -> dict[str, Any]:
        """What besides the parameters a checkpoint holds; the keys are part of the file format."""
        states = [(callback, callback.state_dict()) for callback in self.callbacks.values()]
        return {
            "skipped": self.dropped.count,
            "dropped": self.dropped.state_dict(),
            "tracks": {e.value: [*stream.position, stream.steps] for e, stream in self.data.streams.items()},
            "identity": dict(self.config.identity),
            "lr_schedules": {name: o.lr_schedule.state_dict() for name, o in self.optimizers.items()},
            "optimisers": {name: o.optimizer.state_dict() for name, o in self.optimizers.items()},
            "kinds": {name: o.kind for name, o in self.optimizers.items()},
            "objective": self.objective.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "rules": {callback.name: state for callback, state in states if state and callback.every is None},
            "watchers": {callback.name: state for callback, state in states if state and callback.every is not None},
        }

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            UserError: a damaged checkpoint, or one of another run.
        """
        config, newest = self.config, checkpoint.newest_resumable(self.config.run_folder)
        if newest is None:
            return False
        step, folder = newest
        state = checked(checkpoint.load_checkpoint(folder, self.parameters), RunState, folder)
        with library_reads("the checkpoint", folder):
            checkpoint.check_identity(folder, state.identity, config.identity, config.allow_changed)
            if self.distributed.first:
                checkpoint.link_adapters(folder, config.run_folder)
            self._restore(step, folder, state)
        return True

    def _restore(self, step: int, folder: Path, state: RunState) -> None:
        """Take over what `_state` gave."""
        config = self.config
        self.step = step
        self.dropped.load(state.skipped, state.dropped)
        self.data.exclude(self.dropped.left_out)
        for noise_expert, stream in self.data.streams.items():
            epoch, index, stream.steps = state.tracks.get(noise_expert.value, (0, 0, 0))
            stream.position = (epoch, index)
        for name, optimizer in self.optimizers.items():
            if (kind := state.kinds.get(name)) != optimizer.kind:
                console.warn(f"{name}: the checkpoint's optimizer is {kind}, but this run's is {optimizer.kind}, which "
                             "starts with an empty state")
                continue
            optimizer.restore(state.optimisers[name], state.lr_schedules[name], folder,
                              keep_hyperparameters=config.allow_changed)
        self.objective.load_state_dict(checked(state.objective, self.objective.state_type, folder))
        if self.ema is not None and state.ema is not None:
            self.ema.load_state_dict(state.ema)
        for name, callback_state in {**state.rules, **state.watchers}.items():
            if (callback := self.callbacks.get(name)) is not None:
                callback.load_state_dict(checked(callback_state, callback.state_type, f"{folder}: {name}"))
