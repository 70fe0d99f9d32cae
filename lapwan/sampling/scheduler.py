"""The sigma grid of a video: the sigma of each step, the noise expert that serves it, and the solver.

The solvers are diffusers'. Each has its usual grid (s: flow shift, N steps):
    shift(t) = s·t / (1 + (s − 1)·t)
    unipc    shift(linspace(1, 1/1000, N + 1)[:-1]), 0 appended, the first lowered by 1e-6, timesteps truncated to
             integers
    euler    the same sigmas, timesteps 1000·sigma as floats
    dpmpp    shift(linspace(0.999, 0, N + 1)[:-1]), 0 appended, timesteps truncated to integers
Given sigmas replace the grid, with timesteps 1000·sigma in the solver's dtype.
How to add a sampler: a name in `SamplerName`, a case in `_scheduler`, its name in `settings.generate`,
`settings.evaluate` and `api`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.faults import library_reads
from lapwan.models.configs import read_object
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert, noise_expert_for

SamplerName = Literal["unipc", "euler", "dpmpp"]
_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class Step:
    """One step: the scheduler's `timestep` (0-d tensor), its `sigma`, and the noise expert to evaluate."""

    timestep: Tensor
    sigma: float
    noise_expert: NoiseExpert


@dataclass(frozen=True)
class Grid:
    """A scheduler and its steps in order. Create a new one for every video: solvers keep history."""

    scheduler: Any
    steps: tuple[Step, ...]

    def count(self, noise_expert: NoiseExpert) -> int:
        """The number of steps of a noise expert."""
        return sum(step.noise_expert is noise_expert for step in self.steps)

    def __str__(self) -> str:
        noise_experts = list(dict.fromkeys(step.noise_expert for step in self.steps))
        parts = ", ".join(f"{self.count(e)} on the {e.value} noise expert" for e in noise_experts)
        if len(self.steps) == 1:
            return f"1 step at sigma {self.steps[0].sigma:.4f}: {parts}"
        return (f"{len(self.steps)} steps from sigma {self.steps[0].sigma:.4f} to "
                f"{self.steps[-1].sigma:.4f}: {parts}")


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """s·t / (1 + (s − 1)·t): a larger shift spends more steps at high noise.

    Source: SD3 (arXiv 2403.03206); diffusers' `flow_shift`.

    Args:
        sigmas: t, noise levels in [0, 1].
        shift: s, above 0.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _scheduler(spec: ModelSpec, sampler: SamplerName, steps: int, shift: float) -> Any:
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    flow: dict[str, Any] = {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": _TRAIN_TIMESTEPS,
        "flow_shift": shift,
    }
    match sampler:
        case "unipc":
            file = spec.path / "scheduler" / "scheduler_config.json"
            config = read_object(file)
            if config.get("_class_name") != "UniPCMultistepScheduler":
                config = {}  # options of another class mean other things
            with library_reads("the scheduler", file):
                scheduler = UniPCMultistepScheduler.from_config({**config, **flow})
                scheduler.set_timesteps(steps)
        case "euler":
            # Shift 1 here: the scheduler would shift the given sigmas again, and its sigma_min twice.
            scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TRAIN_TIMESTEPS, shift=1.0)
            plain = np.linspace(1, 1 / _TRAIN_TIMESTEPS, steps + 1)[:-1]
            scheduler.set_timesteps(sigmas=shifted(plain, shift).tolist())
        case "dpmpp":
            scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **flow)
            scheduler.set_timesteps(steps)
    return scheduler


def _replace(scheduler: Any, sigmas: Sequence[float]) -> None:
    """Replace the sigmas of a scheduler, which has as many steps. The multistep solvers work with log((1 − σ)/σ) and
    integer timesteps."""
    floats = scheduler.timesteps.is_floating_point()
    levels = torch.tensor([*sigmas, 0.0], dtype=scheduler.sigmas.dtype)
    scheduler.timesteps = (_TRAIN_TIMESTEPS * levels[:-1]).to(scheduler.timesteps.dtype)
    scheduler.sigmas = levels if floats else levels.clamp(max=1 - 1e-6)


def make_grid(
    spec: ModelSpec, sampler: SamplerName, steps: int, flow_shift: float | None = None, start: float = 1.0,
    boundary: float | None = None, sigmas: Sequence[float] | None = None,
) -> Grid:
    """The sigma grid of a generation.

    Args:
        spec: the model.
        sampler: the solver.
        steps: their number, before those above `start` are left out.
        flow_shift: None: the checkpoint's.
        start: begin at the first sigma of the grid that is at most this (video-to-video); 1: at pure noise.
        boundary: sigma at and above which the high noise expert is used; None: the model's.
        sigmas: `steps` falling sigmas; None: the solver's grid.

    Raises:
        UserError: no step is left below `start`.
    """
    scheduler = _scheduler(spec, sampler, steps, spec.flow_shift if flow_shift is None else flow_shift)
    if sigmas is not None:
        _replace(scheduler, sigmas)
    sigma = spec.boundary if boundary is None else boundary
    boundary_timestep = None if sigma is None else sigma * _TRAIN_TIMESTEPS
    grid = []
    for timestep, level in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):  # sigmas ends with 0
        # By timestep, after the shift, as diffusers' pipelines decide: for integer boundaries the same as by sigma.
        grid.append(Step(timestep, float(level), noise_expert_for(float(timestep), boundary_timestep)))
    first = 0 if start >= 1.0 else next((i for i, step in enumerate(grid) if step.sigma <= start), len(grid))
    if first == len(grid):
        raise UserError(f"start sigma {start:g} is below the last sigma of the grid, {grid[-1].sigma:.4f}; "
                        "start higher or take more steps")
    scheduler.set_begin_index(first)
    return Grid(scheduler, tuple(grid[first:]))
