"""What the three trainings share: learning rate, averaged weights, prefetched batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


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

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the trained weights with their average."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)


def prefetch(make: Callable[[int], T], steps: int) -> Iterator[tuple[int, T]]:
    """(step, make(step)), with the next step's made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(make, 0)
        for step in range(steps):
            made = future.result()
            if step + 1 < steps:
                future = pool.submit(make, step + 1)
            yield step, made


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
