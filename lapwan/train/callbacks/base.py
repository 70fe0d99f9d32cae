"""What a run carries besides its optimizers: callbacks of every step, and callbacks every so many steps.

How to add one: a class with the members of `StepCallback` or `PeriodicCallback` in a file beside this one; put it into
`trainer.step_callbacks` in `lapwan/train/recipe.py`, or into `trainer.callbacks` in `lapwan/train/callbacks/build.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lapwan.names import NoiseExpert


@dataclass(frozen=True)
class StepResult:
    """An optimizer step that was taken.

    Args:
        step: its number in the run, from 1.
        noise_expert_step: its number among the steps of this noise expert, from 1.
        losses: flow loss of every sample of the step; empty unless a callback needs them.
        sigmas: sigma of every sample, in the same order.
    """

    step: int
    noise_expert_step: int
    noise_expert: NoiseExpert
    losses: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()


class StepCallback(Protocol):
    """Part of the training: runs in every process after every update; its state is in the checkpoints."""

    @property
    def needs_losses(self) -> bool:
        """Whether `StepResult` must carry losses and sigmas, which waits for the device."""

    def after_update(self, result: StepResult) -> dict[str, Tensor | float]:
        """Act on the weights that were just updated, with their gradients still there; returns figures to log."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass
class CallbackResult:
    """What a periodic callback returns.

    Args:
        figures: to log, by tag.
        stop: why the run must stop with an error; None to go on.
        finished: why the run may end early without an error; None to go on.
        score: what `keep_best` compares checkpoints by; lower is better.
    """

    figures: dict[str, float]
    stop: str | None = None
    finished: str | None = None
    score: float | None = None


class PeriodicCallback(Protocol):
    """Evaluates the run every so many steps, in the first process, with the weights that would be saved."""

    @property
    def every(self) -> int:
        """Steps of the run between two evaluations."""

    def run(self, step: int, board: Any) -> CallbackResult:
        """Evaluate now; `board` is the TensorBoard writer, for images."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass(frozen=True)
class OnFirstProcess:
    """Stands for a callback of the first process in the others, which wait for its result at the same steps."""

    every: int

    def run(self, step: int, board: Any) -> CallbackResult:
        return CallbackResult({})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The state is the first process's."""
