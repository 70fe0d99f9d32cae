"""Optimizer steps whose update was dropped for a non-finite loss or gradient: the clips of each, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lapwan import console
from lapwan.console import listed
from lapwan.train.callbacks.base import Callback
from lapwan.train.run_state import DroppedState

_SPOILED_TWICE = 2  # dropped steps from which on a clip counts as the cause


class DroppedSteps:
    """The dropped steps of a run, over its restarts.

    Args:
        skip: leave out a clip that has spoiled its step twice (`data.on_bad_clip = "skip"`).
    """

    def __init__(self, skip: bool = False) -> None:
        self.count = 0
        self._skip = skip
        self._steps: list[int] = []
        self._times: Counter[str] = Counter()

    def add(self, step: int, losses: Sequence[tuple[str, bool]]) -> str:
        """Note a dropped step.

        Args:
            step: its number, from 1.
            losses: (clip, whether its loss is finite) of every sample. If all are finite, the gradient is not, and any
                clip of the step may be why.

        Returns:
            A warning that names the clips.
        """
        bad = sorted({clip for clip, finite in losses if not finite})
        suspects = bad or sorted({clip for clip, _ in losses})
        before = set(self.bad_clips)
        self.count += 1
        self._steps.append(step)
        self._times.update(suspects)
        what = "non-finite loss of" if bad else "non-finite gradient; the step's clips are"
        text = f"step {step}: {what} {listed(suspects)}; update dropped"
        if self._skip and (new := [clip for clip in self.bad_clips if clip not in before]):
            text += f"; {listed(new)} left out from here on, after spoiling {_SPOILED_TWICE} steps"
        return text

    @property
    def bad_clips(self) -> list[str]:
        """Clips that have spoiled their step twice."""
        return sorted(clip for clip, times in self._times.items() if times >= _SPOILED_TWICE)

    @property
    def left_out(self) -> list[str]:
        """Clips that are no longer trained on."""
        return self.bad_clips if self._skip else []

    def summary(self, steps: int) -> str:
        """The dropped ones of `steps` steps, for the end of a run; empty if there are none."""
        if not self.count:
            return ""
        numbers = f" ({listed(self._steps)})" if self._steps else ""
        text = f"{self.count} of {steps} steps dropped{numbers}"
        if not (bad := self.bad_clips):
            return text
        advice = ("they were left out" if self._skip else
                  "look at them, and remove them or set data.on_bad_clip = \"skip\"")
        return f"{text}; spoiled by {listed([f'{clip} ({self._times[clip]} times)' for clip in bad])}: {advice}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"steps": list(self._steps), "times": dict(self._times)}

    def load(self, count: int, state: DroppedState | None) -> None:
        """The inverse of `count` and `state_dict`; older checkpoints have the count alone."""
        state = state or DroppedState()
        self.count, self._steps, self._times = count, state.steps, Counter(state.times)


@contextmanager
def run_summary(dropped: DroppedSteps, callbacks: Sequence[Callback], steps: Callable[[], int]) -> Iterator[None]:
    """Log when a run ends, in any way: its dropped steps, its warnings, and last what has stayed wrong.

    Args:
        callbacks: asked for what has stayed wrong (`Callback.lasting`).
        steps: the number of steps so far, asked for at the end.
    """
    with console.warnings_counted() as warnings:
        try:
            yield
        finally:
            if text := dropped.summary(steps()):
                console.warn(text)
            if count := warnings.total():
                console.log(f"{console.count_text(count, 'warning')} in this run, listed above")
            for fault in filter(None, (callback.lasting() for callback in callbacks)):
                console.warn(f"at the end of the run: {fault}")
