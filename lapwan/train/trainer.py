"""A small trainer that knows no algorithm: optimizer steps in turns by noise expert, checkpoints, metrics, resume.

`Trainer.fit` is the loop, `Trainer._train_step` one step of it. The algorithm is an `Objective`; what runs besides is a
callback (`lapwan.train.callbacks.base`). `lapwan.train.recipe` makes the `TrainerPlan` from settings.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lapwan import console
from lapwan.caching.collate import Batch
from lapwan.errors import Interrupted, UserError
from lapwan.memory.out_of_memory import memory_figures, out_of_memory, peak_line, start_peak
from lapwan.names import NoiseExpert
from lapwan.train import checkpoint
from lapwan.train.callbacks.base import PeriodicCallback, StepCallback, StepResult
from lapwan.train.ema import Ema
from lapwan.train.interrupt import Stop, stop_requested
from lapwan.train.metrics import MetricsWriter, StepLog, merge_logs
from lapwan.train.objective import Objective
from lapwan.train.optimizers import current_lr, restore
from lapwan.train.parallel import full_tensors
from lapwan.train.trainer_plan import Prefetcher, StepData, TrainerPlan

_NON_FINITE_LIMIT = 5  # non-finite steps in a row after which the run stops


class Trainer:
    """Runs a plan with an objective. Its state is the trained parameters and what `_state` returns."""

    def __init__(self, plan: TrainerPlan, objective: Objective) -> None:
        self.plan, self.objective = plan, objective
        self.step = 0
        self.skipped = 0
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for groups in objective.parameter_groups.values()
            for group in groups
            for name, parameter in group.parameters.items()
        }
        self.ema = None if plan.ema_decay is None else Ema(self.parameters, plan.ema_decay)
        self.step_callbacks: dict[str, StepCallback] = {}
        self.callbacks: dict[str, PeriodicCallback] = {}
        self._logs = {noise_expert: StepLog() for noise_expert in plan.data_streams}
        self._prefetcher = Prefetcher(plan)
        self._writer = checkpoint.CheckpointWriter()
        self._non_finite_in_a_row = 0
        self._validation_score: tuple[int, float | None] = (0, None)  # the last validation: step, mean loss
        self.finished: str | None = None  # why the run ends before its schedule, without a fault

    def fit(self) -> None:
        """Train to the end of the schedule.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the state is saved.
            UserError: too many non-finite steps in a row, a callback that stops the run, or out of memory; the state
                is saved.
        """
        plan, total = self.plan, len(self.plan.schedule)
        metrics = MetricsWriter(plan.run_folder, self.step) if plan.distributed.first else None
        start_peak()
        saved = self.step if checkpoint.checkpoints(plan.run_folder) else -1
        try:
            with stop_requested() as stop, console.progress("training", total, "step", done=self.step) as bar:
                while self.step < total and self.finished is None:
                    stop_error = self._train_step(metrics, bar, stop)
                    if self.step % plan.save_every == 0 or self.step == total or stop_error:
                        self.save(wait=stop_error is not None)
                        saved = self.step
                    if stop_error:
                        raise stop_error
            if saved != self.step:
                self.save()
            self._writer.wait()
            if plan.predicted_peak and (line := peak_line(plan.predicted_peak)):
                console.log(line)
        except torch.OutOfMemoryError as error:
            self.save()
            raise out_of_memory(
                error, plan.run_folder, self.step, plan.resume_command, plan.memory_summary) from None
        finally:
            self._writer.wait()
            if metrics is not None:
                metrics.close()

    def _train_step(self, metrics: MetricsWriter | None, bar: console.Bar, stop: Stop) -> Exception | None:
        """One optimizer step, the callbacks that are due, and the log; what to raise after saving, if anything."""
        noise_expert = self.plan.schedule[self.step]
        started = time.monotonic()
        step_figures = self._optimizer_step(noise_expert)
        self.plan.after_step()
        self.step += 1
        seconds = time.monotonic() - started
        self._logs[noise_expert].seconds += seconds
        run_figures, stop_reason = self._run_callbacks(metrics)
        self._log(metrics, noise_expert, step_figures, run_figures, seconds, bar)
        return self._stop_error(stop_reason, stop)

    def _optimizer_step(self, noise_expert: NoiseExpert) -> dict[str, Tensor | float]:
        """Forward and backward of every batch, one update, then the step callbacks; returns figures to log."""
        plan, stream = self.plan, self.plan.data_streams[noise_expert]
        plan.before_turn(noise_expert)
        data = self._prefetcher.get(noise_expert, stream.position)
        optimizers = self.objective.optimizers_for(noise_expert)
        for name in optimizers:
            plan.optimizers[name].zero_grad(set_to_none=True)
        batches = plan.complete_batches(noise_expert, data.batches, data.draws)
        self.objective.prepare(noise_expert, batches, plan.distributed.all_reduce, data.draws)
        losses, sigmas = self._backward(noise_expert, batches, data)
        self._prefetch_next(noise_expert, data)  # while the device works on the backward
        # Only now: a step that runs out of memory, here or while the next one's clips are read, is not counted.
        stream.position, stream.steps = data.next_position, stream.steps + 1
        figures, updated = self._update(optimizers)
        if updated:
            figures |= self._run_step_callbacks(noise_expert, losses, sigmas)
        return figures

    def _prefetch_next(self, noise_expert: NoiseExpert, data: StepData) -> None:
        for following in self.plan.schedule[self.step + 1 : self.step + 2]:
            same = following is noise_expert
            position = data.next_position if same else self.plan.data_streams[following].position
            self._prefetcher.prefetch(following, position)

    def _backward(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], data: StepData
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Accumulate the gradients of the mean loss over the step; returns flow losses and sigmas by batch."""
        log = self._logs[noise_expert]
        logged = len(log.losses)
        divisor = data.samples * self.plan.distributed.context_parallel_size
        for batch, draws in zip(batches, data.draws, strict=True):
            with self.objective.loss(noise_expert, batch, draws) as loss:
                total_B = loss.total_B
                torch.autograd.backward(total_B.sum() / divisor)
            log.add(loss, total_B, draws.sigma_B if loss.sigma_B is None else loss.sigma_B)
        return log.losses[logged:], log.sigmas[logged:]

    def _update(self, optimizers: Sequence[str]) -> tuple[dict[str, Tensor | float], bool]:
        """Clip and step; with a non-finite gradient the weights and the optimizer states stay as they were."""
        plan = self.plan
        parameters = [p for name in optimizers for group in plan.optimizers[name].param_groups for p in group["params"]]
        plan.distributed.sum_gradients(parameters)
        norm = plan.distributed.clip_gradients(parameters, plan.max_grad_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self._non_finite_in_a_row = 0
            for name in optimizers:
                plan.optimizers[name].step()
                plan.lr_schedules[name].step()
        else:
            self.skipped += 1
            self._non_finite_in_a_row += 1
            console.warn(f"step {self.step + 1}: non-finite loss or gradient; update dropped")
        return {"grad_norm": norm}, finite

    def _run_step_callbacks(
        self, noise_expert: NoiseExpert, losses: Sequence[Tensor], sigmas: Sequence[Tensor]
    ) -> dict[str, Tensor | float]:
        """The step callbacks first, since what they change is part of the update; then the EMA."""
        plan = self.plan
        result = StepResult(self.step + 1, plan.data_streams[noise_expert].steps, noise_expert)
        if any(callback.needs_losses for callback in self.step_callbacks.values()):
            parts = plan.distributed.gather_samples(
                (torch.cat(list(losses)).tolist(), torch.cat(list(sigmas)).tolist()))
            result = replace(
                result, losses=tuple(loss for part_losses, _ in parts for loss in part_losses),
                sigmas=tuple(sigma for _, part_sigmas in parts for sigma in part_sigmas))
        figures: dict[str, Tensor | float] = {}
        for callback in self.step_callbacks.values():
            figures |= callback.after_update(result)
        if self.ema is not None:
            names = self.objective.optimizers_for(noise_expert)
            groups = [group for name in names for group in self.objective.parameter_groups[name]]
            self.ema.update(name for group in groups for name in group.parameters)
        return figures

    def _run_callbacks(self, metrics: MetricsWriter | None) -> tuple[dict[str, float], str | None]:
        """Run the periodic callbacks that are due, in the first process; their reason to stop holds for all."""
        last = self.step == len(self.plan.schedule)
        due = [callback for callback in self.callbacks.values() if self.step % callback.every == 0 or last]
        if not due:
            return {}, None
        figures: dict[str, float] = {}
        stop_reason, finished, score = None, None, None
        if metrics is not None or self.plan.callbacks_on_all_processes:
            with self.ema_weights(), self.plan.without_context_parallel():
                for callback in due:
                    result = callback.run(self.step, None if metrics is None else metrics.board)
                    figures |= result.figures
                    stop_reason, finished = stop_reason or result.stop, finished or result.finished
                    score = score if result.score is None else result.score
            self._validation_score = (self.step, figures.get("validation/mean", score))
        stop_reason, self.finished = self.plan.distributed.from_first((stop_reason, finished))
        return figures, stop_reason

    def _log(
        self, metrics: MetricsWriter | None, noise_expert: NoiseExpert, step_figures: Mapping[str, Tensor | float],
        run_figures: Mapping[str, float], seconds: float, bar: console.Bar,
    ) -> None:
        plan = self.plan
        due = self.step % plan.log_every == 0 or self.step == len(plan.schedule)
        if not due and not plan.distributed.from_first(bool(run_figures)):
            bar.advance()
            return
        log, self._logs[noise_expert] = self._logs[noise_expert], StepLog()
        summary = merge_logs(plan.distributed.gather_samples(log.to_host()))
        if metrics is None:
            return
        stream = plan.data_streams[noise_expert]
        figures = {**summary.means, **summary.by_sigma_bin(stream.sigma_rule.band, plan.sigma_bins)}
        figures |= {name: float(value) for name, value in step_figures.items()}
        figures["lr"] = float(current_lr(plan.optimizers[self.objective.optimizers_for(noise_expert)[0]]))
        figures |= {"own_step": stream.steps, "skipped_steps": self.skipped, "seconds": seconds,
                    "clips_per_second": len(summary.sigmas) / max(log.seconds, 1e-9), **memory_figures()}
        metrics.write(self.step, noise_expert.value, figures, run_figures)
        metrics.histogram(f"sigma/{noise_expert.file_suffix}", summary.sigmas, self.step)
        bar.advance(noise_expert=noise_expert.value, loss=figures["loss"], lr=figures["lr"])

    def _stop_error(self, stop_reason: str | None, stop: Stop) -> Exception | None:
        plan, total, saved = self.plan, len(self.plan.schedule), f"saved at step {self.step}"
        if self._non_finite_in_a_row >= _NON_FINITE_LIMIT:
            return UserError(f"{_NON_FINITE_LIMIT} steps in a row had a non-finite loss or gradient; the weights are "
                             f"as before them, {saved}; lower the lr or look at the clips")
        if stop_reason is not None:
            return UserError(f"{stop_reason}; {saved} of {total} in {plan.run_folder}")
        if plan.distributed.any(stop.requested) and self.step < total:
            return Interrupted(f"interrupted; state {saved} of {total} in {plan.run_folder}; continue with "
                               f"{plan.resume_command}")
        return None

    def ema_weights(self) -> AbstractContextManager[None]:
        """A scope in which the parameters are those that are saved: the EMA where it is on."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint of this step, from the first process; without `wait`, in the background."""
        def write_adapters(folder: Path) -> list[Path]:
            with self.ema_weights():
                return self.objective.save(folder, self.step)

        plan = self.plan
        plan.before_save()
        parameters, state = full_tensors(self.parameters), full_tensors(self._state())
        if plan.distributed.first:
            validated_step, score = self._validation_score
            retention = checkpoint.Retention(
                plan.keep_last, plan.keep_best, score if validated_step == self.step else None)
            self._writer.wait()  # one at a time: it may remove older ones
            self._writer.start(checkpoint.start_checkpoint(
                plan.run_folder, self.step, write_adapters, parameters, state, retention))
            if wait:
                self._writer.wait()

    def _state(self) -> dict[str, Any]:
        """What besides the parameters a checkpoint holds; the keys are part of the file format."""
        plan = self.plan
        return {
            "skipped": self.skipped,
            "tracks": {e.value: [*stream.position, stream.steps] for e, stream in plan.data_streams.items()},
            "identity": dict(plan.identity),
            "lr_schedules": {name: schedule.state_dict() for name, schedule in plan.lr_schedules.items()},
            "optimisers": {name: optimizer.state_dict() for name, optimizer in plan.optimizers.items()},
            "kinds": {name: type(optimizer).__name__ for name, optimizer in plan.optimizers.items()},
            "objective": self.objective.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "rules": {name: callback.state_dict() for name, callback in self.step_callbacks.items()},
            "watchers": {name: callback.state_dict() for name, callback in self.callbacks.items()},
        }

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            UserError: a damaged checkpoint, or one of another run.
        """
        plan, saved_steps = self.plan, checkpoint.checkpoints(self.plan.run_folder)
        if not saved_steps:
            return False
        step, folder = saved_steps[-1]
        state = checkpoint.load(folder, self.parameters)
        checkpoint.check_identity(folder, state["identity"], plan.identity, plan.allow_changed)
        self.step, self.skipped = step, state["skipped"]
        for noise_expert, stream in plan.data_streams.items():
            epoch, index, stream.steps = state["tracks"].get(noise_expert.value, (0, 0, 0))
            stream.position = (epoch, index)
        for name, optimizer in plan.optimizers.items():
            if (kind := state["kinds"].get(name)) != type(optimizer).__name__:
                console.warn(f"{name}: the checkpoint's optimizer is {kind}, this run's {type(optimizer).__name__}, "
                             "which starts without a history")
                continue
            restore(optimizer, plan.lr_schedules[name], state["optimisers"][name], state["lr_schedules"][name],
                    keep_hyperparameters=plan.allow_changed)
        self.objective.load_state_dict(state["objective"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        callbacks: tuple[tuple[Mapping[str, StepCallback | PeriodicCallback], str], ...] = (
            (self.step_callbacks, "rules"), (self.callbacks, "watchers"))
        for by_name, key in callbacks:
            for name, callback in by_name.items():
                if name in state[key]:
                    callback.load_state_dict(state[key][name])
        return True
