"""From settings to optimisers and their lr schedules.

How to add an optimiser: a settings member in `lapwan/settings/train.py` and a case in `make_optimiser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lapwan.settings.train import AdamWSettings, ScheduleSettings
from lapwan.train.objective import ParameterGroup


def make_optimiser(settings: AdamWSettings, groups: Sequence[ParameterGroup]) -> Optimizer:
    """AdamW over the groups, each at `lr · lr_scale`."""
    parameters = [
        {"params": list(group.parameters.values()), "lr": settings.lr * group.lr_scale} for group in groups
    ]
    cuda = any(p.is_cuda for group in groups for p in group.parameters.values())
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay,
        fused=cuda,
    )


def make_schedule(settings: ScheduleSettings, optimiser: Optimizer, steps: int) -> Any:
    """diffusers' lr schedule by name, over the `steps` this optimiser will take."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.name, optimiser, num_warmup_steps=settings.warmup_steps, num_training_steps=steps
    )
