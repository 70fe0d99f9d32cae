"""From settings to optimizers and their lr schedules.

How to add an optimizer: see `lapwan.settings.optimizers`. Here it is a case of `build`, registered by its settings.
"""

from __future__ import annotations

import importlib.util
import io
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lapwan.errors import UserError
from lapwan.faults import library_reads
from lapwan.settings.optimizers import (
    AdamW8bitSettings,
    AdamWSettings,
    AutomagicSettings,
    OptimizerSettings,
    ProdigySettings,
    ScheduleSettings,
)
from lapwan.train.automagic import Automagic
from lapwan.train.master_weights import Master, MasterAdamW
from lapwan.train.objective import ParameterGroup

# State as large as its parameter, which fused kernels read and write without looking at its shape.
_ELEMENTWISE = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "state1", "state2", "master"})
_LARGEST = 2.0**53  # of a number in a saved state
AGREEMENTS = (0.47, 0.50, 0.53)  # sign agreements met in practice; 0.5 is noise


def check_optimizer(optimizer: OptimizerSettings, schedule: ScheduleSettings) -> None:
    """Refuse an optimizer that cannot run, before any weights are loaded.

    Raises:
        UserError: a library that is not installed, or an lr schedule for an optimizer that sets its own lr.
    """
    kind, library = optimizer.kind, optimizer.library
    if library is not None and importlib.util.find_spec(library) is None:
        raise UserError(f"optimizer.type = '{kind}' needs {library}, which is not installed; "
                        f"pip install 'lapwan[{kind}]', or set optimizer.type = 'adamw'")
    if optimizer.own_schedule is not None and schedule.changes:
        raise UserError(f"schedule.name = '{schedule.name}' with warmup_steps = {schedule.warmup_steps} has no effect "
                        f"on {kind}, {optimizer.own_schedule}; leave it out")


@dataclass(frozen=True)
class MasterWeights:
    """The dtype in which weights are stepped, where the state is, and the seed of stochastic rounding."""

    dtype: Master
    on_cpu: bool
    seed: int


def make_optimizer(
    settings: OptimizerSettings, groups: Sequence[ParameterGroup], master: MasterWeights | None = None
) -> Optimizer:
    """The optimizer over the groups, each at `lr · lr_scale`, B matrices at LoRA+'s ratio times that.

    Args:
        master: step master weights, if `settings.takes_master_weights`; None: the parameters themselves.

    Raises:
        UserError: different lrs for an optimizer with one step size, or no GPU for one that needs it.
    """
    parts = [part for group in groups for part in _by_factor(group, settings.up_lr_scale)]
    if not settings.separate_lrs and len({part.lr_scale for part in parts}) > 1:
        raise UserError(f"optimizer.type = '{settings.kind}' uses one step size for all parameters; set "
                        "timestep_gate.lr_scale = 1, or another optimizer")
    return build(settings, parts, master)


@singledispatch
def build(settings: OptimizerSettings, parts: Sequence[ParameterGroup], master: MasterWeights | None) -> Optimizer:
    """The optimizer of these settings; a case for each kind is registered below."""
    raise NotImplementedError(f"no optimizer is registered for {type(settings).__name__}")


def lr_groups(lr: float, parts: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    """Parameter groups for torch, each with its lr."""
    return [{"params": list(part.parameters.values()), "lr": lr * part.lr_scale} for part in parts]


def _plain(settings: AdamWSettings | AdamW8bitSettings | ProdigySettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}


@build.register
def _adamw(settings: AdamWSettings, parts: Sequence[ParameterGroup], master: MasterWeights | None) -> Optimizer:
    parameters = lr_groups(settings.lr, parts)
    if master is not None:
        return MasterAdamW(parameters, settings, master.dtype, master.on_cpu, master.seed)
    return torch.optim.AdamW(parameters, **_plain(settings), fused=True)


@build.register
def _adamw8bit(settings: AdamW8bitSettings, parts: Sequence[ParameterGroup], master: MasterWeights | None) -> Optimizer:
    if not any(p.is_cuda for part in parts for p in part.parameters.values()):
        raise UserError("optimizer.type = 'adamw8bit' needs a GPU; set optimizer.type = 'adamw'")
    from bitsandbytes.optim import AdamW8bit

    eight_bit: Optimizer = AdamW8bit(lr_groups(settings.lr, parts), **_plain(settings))
    return eight_bit


@build.register
def _automagic(settings: AutomagicSettings, parts: Sequence[ParameterGroup], master: MasterWeights | None) -> Optimizer:
    return Automagic([{"params": [*part.parameters.values()], "scale": part.lr_scale} for part in parts], settings)


@build.register
def _prodigy(settings: ProdigySettings, parts: Sequence[ParameterGroup], master: MasterWeights | None) -> Optimizer:
    from prodigyopt import Prodigy

    with redirect_stdout(io.StringIO()):  # it prints to stdout
        prodigy: Optimizer = Prodigy(
            lr_groups(settings.lr, parts), **_plain(settings), d0=settings.d0, d_coef=settings.d_coef)
    return prodigy


def _by_factor(group: ParameterGroup, ratio: float) -> list[ParameterGroup]:
    """LoRA+: a separate group for B, at `ratio` times the lr."""
    if ratio == 1.0:
        return [group]
    up = {name: p for name, p in group.parameters.items() if name.endswith(".up")}
    rest = {name: p for name, p in group.parameters.items() if name not in up}
    parts = [ParameterGroup(rest, group.lr_scale), ParameterGroup(up, group.lr_scale * ratio)]
    return [part for part in parts if part.parameters]


def make_schedule(settings: ScheduleSettings, optimizer: Optimizer, steps: int) -> Any:
    """The lr schedule of diffusers by name, over the number of `steps` that this optimizer takes."""
    from diffusers.optimization import get_scheduler

    options: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": settings.cycles}, "polynomial": {"power": settings.power}}
    return get_scheduler(
        settings.name, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=steps,
        **options.get(settings.name, {}),
    )


@dataclass
class ScheduledOptimizer:
    """An optimizer and its lr schedule, which steps with it."""

    optimizer: Optimizer
    lr_schedule: Any
    _untried: Path | None = None  # the checkpoint of a state with which no step was taken yet

    @property
    def kind(self) -> str:
        """The kind of optimizer; another kind cannot use its state."""
        return type(self.optimizer).__name__

    @property
    def lr(self) -> Tensor | float:
        """The lr to log."""
        return current_lr(self.optimizer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that it steps."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update the parameters, then the lr.

        Raises:
            UserError: the first step after `restore` fails. What is in the state of each tensor is known to the
                optimizer alone, which takes anything when it is loaded.
        """
        with nullcontext() if self._untried is None else library_reads("the optimizer's state", self._untried):
            self.optimizer.step()
            self.lr_schedule.step()
        self._untried = None

    def restore(
        self, saved: Mapping[str, Any], saved_schedule: Mapping[str, Any], checkpoint: Path, keep_hyperparameters: bool
    ) -> None:
        """Load the state of optimizer and schedule.

        Args:
            checkpoint: that they are from.
            keep_hyperparameters: keep those of this run instead of the saved ones.

        Raises:
            ValueError: a value of the schedule or a hyperparameter has another type, or a tensor another shape; torch
                would take it and fail in the next step.
        """
        optimizer, schedule = self.optimizer, self.lr_schedule
        _check_kinds(schedule.state_dict(), saved_schedule, "the lr schedule")
        for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            _check_kinds({k: v for k, v in group.items() if k != "params"}, saved_group, "the optimizer")
        parameters = self.parameters
        for index, values in saved["state"].items():
            for key in _ELEMENTWISE & values.keys():
                if values[key].shape != parameters[index].shape:
                    raise ValueError(f"'{key}' of the optimizer has shape {list(values[key].shape)}, its tensor "
                                     f"{list(parameters[index].shape)}")
        self._untried = checkpoint
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        base_lrs = list(schedule.base_lrs)
        optimizer.load_state_dict(dict(saved))
        for group, before in zip(optimizer.param_groups, hyperparameters, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)  # that an older optimizer did not save
        schedule.load_state_dict(dict(saved_schedule))
        if keep_hyperparameters:
            for group, current in zip(optimizer.param_groups, hyperparameters, strict=True):
                group.update(current)
            schedule.base_lrs = base_lrs
            for group, base, factor in zip(optimizer.param_groups, base_lrs, schedule.lr_lambdas, strict=True):
                group["lr"] = base * factor(schedule.last_epoch)


def _check_kinds(values: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> None:
    for key, value in values.items():
        if key in saved and not _same_kind(value, saved[key]):
            raise ValueError(f"'{key}' of {what} is {reprlib.repr(saved[key])}")


def _same_kind(value: Any, saved: Any) -> bool:
    """Whether both are numbers, or lists of equal length, or of one class; None is a flag that is not set."""
    if value is None:
        return saved is None or isinstance(saved, bool)
    if isinstance(value, list | tuple):
        return isinstance(saved, list | tuple) and len(saved) == len(value) and all(map(_same_kind, value, saved))
    if isinstance(value, int | float | Tensor):  # lr is a tensor for some optimizers
        number = isinstance(saved, int | float) or (isinstance(saved, Tensor) and saved.numel() == 1)
        return number and (float(saved) == float(value) or abs(float(saved)) < _LARGEST)  # Prodigy has an inf
    return isinstance(saved, type(value))


@runtime_checkable
class OwnLr(Protocol):
    """An optimizer whose elements have their own lrs."""

    def mean_lr(self) -> Tensor:
        """The mean lr over all elements."""


def current_lr(optimizer: Optimizer) -> Tensor | float:
    """The lr to log: that of the first group; for Automagic the mean over elements, for Prodigy lr·d."""
    if isinstance(optimizer, OwnLr):
        return optimizer.mean_lr()
    first = optimizer.param_groups[0]
    return float(first["lr"]) * float(first.get("d", 1.0))


def describe_optimizer(settings: OptimizerSettings, schedule: ScheduleSettings) -> str:
    """What determines the lr, in one line; defaults beside the lr are left out."""
    text = settings.describe()
    if settings.up_lr_scale != 1:
        text += f", B at {settings.up_lr_scale:g} times the lr"
    if schedule.changes:
        text += f", {schedule.name}"
        text += f", {schedule.warmup_steps} warm-up steps" if schedule.warmup_steps else ""
    return text


def ratio_line(high: OptimizerSettings, low: OptimizerSettings) -> str:
    """The expected LR ratio, at several sign agreements where these matter."""
    pairs = [(p, high.predicted_lr(p), low.predicted_lr(p)) for p in AGREEMENTS]
    known = [(p, a / b) for p, a, b in pairs if a is not None and b is not None]
    if not known:
        return "LR ratio high / low: not known before the run (prodigy)"
    if len({round(ratio, 6) for _, ratio in known}) == 1:
        return f"LR ratio high / low: {known[0][1]:.2f}"
    shown = ", ".join(f"{ratio:.2f} at sign agreement {p:.2f}" for p, ratio in known)
    return f"predicted LR ratio high / low: {shown} (set by min and max, not by the bumps)"
