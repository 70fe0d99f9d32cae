"""What a checkpoint holds besides the trained tensors (`state/rest.pt`), with the type of every value.

A checkpoint may come from anywhere: a value of another type must be refused when the run is resumed, not taken over and
fail in a later step. What belongs to a callback or an objective is of its `state_type`; what belongs to an optimizer is
checked by the optimizer.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Steps = Annotated[int, Field(ge=0, le=2**53)]


class SavedState(BaseModel):
    """A part of the state: plain values and tensors. Keys that it does not have are ignored."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


class DroppedState(SavedState):
    """Numbers of dropped steps, and how often each clip was in one."""

    steps: list[Steps] = []
    times: dict[str, Steps] = {}


class EmaState(SavedState):
    """Running means and their counts, by tensor."""

    means: dict[str, Tensor]
    updates: dict[str, Steps]


class RunState(SavedState):
    """The whole. The keys are part of the file format.

    Attributes:
        skipped: dropped steps; `dropped` is missing in checkpoints of 2026-11 and older.
        tracks: epoch, index and steps of each noise expert.
        rules, watchers: of the callbacks that act on every step, and of those that are called now and then.
    """

    skipped: Steps
    dropped: DroppedState | None = None
    tracks: dict[str, tuple[Steps, Steps, Steps]]
    identity: dict[str, str]
    lr_schedules: dict[str, dict[str, Any]]
    optimisers: dict[str, dict[str, Any]]
    kinds: dict[str, str]
    objective: dict[str, Any]
    ema: EmaState | None
    rules: dict[str, dict[str, Any]]
    watchers: dict[str, dict[str, Any]]


def as_saved(name: str, value: Tensor, like: Tensor) -> Tensor:
    """`value` of a checkpoint, which takes the place of `like`.

    Raises:
        ValueError: it has another shape.
    """
    if value.shape != like.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, this run's {list(like.shape)}")
    return value.to(like)
