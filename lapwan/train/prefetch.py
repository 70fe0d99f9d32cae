"""The clips and draws of a step, made while the device still works on the step before.

Draws are keyed, so it does not matter when they are made. A CPU takes milliseconds (noise of 480x832: 20 ms), which
would otherwise pass between one step's end, where the trainer waits for the gradient's norm, and the next one's start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lapwan.caching.batch import Batch
from lapwan.names import NoiseExpert
from lapwan.train.objective import Draws


@dataclass(frozen=True)
class StepData:
    """Batches of one optimizer step with their draws; `samples` counts those of all processes."""

    batches: list[Batch]
    drawn: list[Draws]
    samples: int
    after: tuple[int, int]


Place = tuple[NoiseExpert, tuple[int, int]]


class Ahead:
    """`make` of a noise expert and its position, done before it is asked for where that was foreseen."""

    def __init__(self, make: Callable[[NoiseExpert, tuple[int, int]], StepData]) -> None:
        self._make = make
        self._ready: tuple[Place, StepData] | None = None

    def foresee(self, noise_expert: NoiseExpert, position: tuple[int, int]) -> None:
        """Make it now."""
        self._ready = (noise_expert, position), self._make(noise_expert, position)

    def take(self, noise_expert: NoiseExpert, position: tuple[int, int]) -> StepData:
        """What was foreseen, if it was this; else made now."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] == (noise_expert, position):
            return ready[1]
        return self._make(noise_expert, position)
