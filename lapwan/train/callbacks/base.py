"""What a run does besides its optimizer steps: a `Callback` with hooks, which the trainer calls in the order of its
list.

How to add one: a subclass of `Callback` with the hooks it needs, in a file beside this one, and a line in
`lapwan/train/callbacks/build.py` (or in the recipe of the stage it is for) that makes it from the settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lapwan.names import NoiseExpert

REPEAT_EVERY = 10  # evaluations in a row with a fault, after which its warning is given again


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


@dataclass
class Evaluation:
    """What `Callback.on_step` returns.

    Args:
        figures: to log, by tag.
        stop: why the run must stop with an error; None to continue.
        finished: why the run may end early without an error; None to continue.
        score: what `keep_best` compares checkpoints by; lower is better.
    """

    figures: dict[str, float]
    stop: str | None = None
    finished: str | None = None
    score: float | None = None


class Callback:
    """The hooks of a run; each does nothing unless a subclass overrides it.

    Attributes:
        name: its key in checkpoints; unique in a run.
        every: steps of the run between two calls of `on_step`, which also follows the last step; None: no calls.
        needs_losses: whether `StepResult` must carry losses and sigmas, which waits for the device.
        on_all_processes: whether `on_start` and `on_step` run in every process, not in the first one only: sharded
            weights run a forward only in all processes at once.
        state_type: the pydantic type of what `load_state_dict` takes.
    """

    name: str
    every: int | None = None
    needs_losses = False
    on_all_processes = False
    state_type: Any = dict[str, Any]

    def on_start(self, board: Any) -> None:
        """Before the first step of this process, after the state was loaded; `board` as in `on_step`."""

    def before_turn(self, noise_expert: NoiseExpert) -> None:
        """Before a step of this noise expert, in every process."""

    def after_backward(self, noise_expert: NoiseExpert) -> None:
        """After the last backward of a step, in every process; the gradients are not summed over processes yet."""

    def after_update(self, result: StepResult) -> dict[str, Tensor | float]:
        """Act on the weights that were just updated, in every process, with their gradients still there.

        Part of the training: it is skipped with an update that is dropped. Returns figures to log.
        """
        return {}

    def on_step(self, step: int, board: Any) -> Evaluation:
        """Evaluate the run with the weights that would be saved.

        Args:
            board: the TensorBoard writer, for images; None in processes that write nothing.
        """
        return Evaluation({})

    def lasting(self) -> str | None:
        """What has been wrong for several evaluations in a row up to the last one, for the end of the run."""
        return None

    def before_save(self) -> None:
        """Before a checkpoint is written, in every process."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """The inverse of `state_dict`, for a `state_type`.

        Raises:
            ValueError: a state of another run.
        """
