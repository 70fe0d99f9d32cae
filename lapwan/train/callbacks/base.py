"""What a run can carry besides its optimizer: rules that take part in every step, watchers that look now and then.

How to add one: a class with these members, and its place in `lapwan.train.recipe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lapwan.names import NoiseExpert


@dataclass(frozen=True)
class StepResult:
    """One optimizer step that was taken: its number in the run and among this noise expert's, and every sample's flow
    loss with its sigma (empty unless a rule asks for them)."""

    step: int
    own_step: int
    noise_expert: NoiseExpert
    losses: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()


class StepCallback(Protocol):
    """Part of the training: runs in every process after every update, and its state is the run's."""

    @property
    def needs_losses(self) -> bool:
        """Whether `StepResult` must carry losses, which waits for the device."""

    def after_update(self, seen: StepResult) -> dict[str, Tensor | float]:
        """Act on the weights that were just stepped; figures to log. The gradients are still there."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""


@dataclass
class CallbackResult:
    """What a watcher found: figures to log, and a reason to stop the run if there is one.

    `stop` is a fault the user must hear of; `finished` ends the run as done, early. `score` (lower is better) is what
    the best checkpoints are kept by.
    """

    figures: dict[str, float]
    stop: str | None = None
    finished: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class OnFirstProcess:
    """A watcher of the first process, as the others see it: they wait for its word at the same steps."""

    every: int

    def look(self, step: int, board: Any) -> CallbackResult:
        return CallbackResult({})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The first process has it."""


class PeriodicCallback(Protocol):
    """Looks at the run in the first process, with the weights that would be saved."""

    @property
    def every(self) -> int:
        """Steps of the run between two looks."""

    def look(self, step: int, board: Any) -> CallbackResult:
        """Look now; `board` takes images for TensorBoard."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
