"""What the three trainings share: learning rate, averaged weights, prefetched batches."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_PREFETCHED = 3


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class Schedule:
    """How far a training is, by its steps or, where they are given, by the seconds since it began."""

    def __init__(self, steps: int, warmup: int, seconds: float | None = None) -> None:
        self.steps, self._warmup, self._seconds = steps, warmup, seconds
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the training began."""
        return time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """0 to 1; 1: `step` is not made any more."""
        return min(1.0, step / self.steps if self._seconds is None else self.elapsed() / self._seconds)

    def lr(self, step: int) -> float:
        """`cosine`; by seconds the steps are as many as the pace until now makes likely."""
        if self._seconds is None:
            return cosine(step, self.steps, self._warmup)
        expected = step / max(self.progress(step), 1e-9)
        return cosine(step, max(round(expected), step + 1, self._warmup + 1), self._warmup)

    def numbers(self) -> Iterator[int]:
        """0, 1, ... until the training is over."""
        for step in count():
            if self.progress(step) >= 1:
                return
            yield step


class Checkpoints:
    """Saves a module's averaged weights every `seconds`."""

    def __init__(self, save: Callable[[], None] | None, seconds: float = 60) -> None:
        self._save, self._seconds, self._last = save, seconds, time.monotonic()

    def after_step(self, average: EmaWeights) -> None:
        """Save if it is time."""
        if self._save is not None and time.monotonic() - self._last >= self._seconds:
            with average.applied():
                self._save()
            self._last = time.monotonic()


class EmaWeights:
    """Exponential moving average of parameters: θ̄ <- d·θ̄ + (1 − d)·θ, d rising to `decay` over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._parameters = list(module.parameters())
        self._average = [p.detach().clone() for p in self._parameters]
        self._decay, self._steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the trained weights for their average for a while."""
        trained = [parameter.detach().clone() for parameter in self._parameters]
        self.copy_to_parameters()
        yield
        with torch.no_grad():
            for parameter, value in zip(self._parameters, trained, strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the trained weights with their average."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)


def prefetch(make: Callable[[int], T], schedule: Schedule) -> Iterator[tuple[int, T]]:
    """(step, make(step)), with the next steps' made in threads meanwhile."""
    with ThreadPoolExecutor(_PREFETCHED) as pool:
        futures = deque(pool.submit(make, step) for step in range(_PREFETCHED))
        for step in schedule.numbers():
            made = futures.popleft().result()
            futures.append(pool.submit(make, step + _PREFETCHED))
            yield step, made
        for future in futures:
            future.cancel()


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's own base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def box_mask(boxes_BT4: Tensor, height: int, width: int, margin: float = 0.02) -> Tensor:
    """[B, T, H, W] 1 where a pixel's centre lies in the frame's box (0..1, x0 y0 x1 y1), grown by `margin`."""
    ys = (torch.arange(height, device=boxes_BT4.device) + 0.5) / height
    xs = (torch.arange(width, device=boxes_BT4.device) + 0.5) / width
    x0, y0, x1, y1 = (boxes_BT4[..., i, None] for i in range(4))
    in_x = (xs >= x0 - margin) & (xs <= x1 + margin)
    in_y = (ys >= y0 - margin) & (ys <= y1 + margin)
    return (in_y[..., :, None] & in_x[..., None, :]).float()
