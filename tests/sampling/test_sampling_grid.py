from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.sampling.denoise import Conditions, Guidance, denoise
from lapwan.sampling.grid import Grid, SamplerName, make_grid, shifted
from lapwan.wan.folder import ModelSpec

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def sigmas(grid: Grid) -> np.ndarray:
    return np.array([step.sigma for step in grid.steps])


@pytest.mark.parametrize(("task", "shift", "high"), [("i2v", 5.0, 15), ("t2v", 12.0, 26), ("t2v", 3.0, 13)])
def test_the_boundary_is_found_after_the_shift(task, shift, high, t2v, i2v) -> None:
    """40 steps: by step index it would be 5 (or 4) whatever the shift."""
    grid = make_grid(t2v if task == "t2v" else i2v, "unipc", 40, shift)
    assert (grid.count(HIGH), grid.count(LOW)) == (high, 40 - high)
    assert [s.expert for s in grid.steps] == [HIGH] * high + [LOW] * (40 - high)


def test_unipc_is_the_checkpoints_own_grid(t2v: ModelSpec) -> None:
    scheduler = UniPCMultistepScheduler.from_pretrained(t2v.path / "scheduler")
    scheduler.set_timesteps(7)
    grid = make_grid(t2v, "unipc", 7)
    assert torch.equal(torch.stack([s.timestep for s in grid.steps]), scheduler.timesteps)
    assert [s.sigma for s in grid.steps] == scheduler.sigmas[:-1].tolist()
    assert all(s.timestep.dtype == torch.int64 for s in grid.steps)


def test_euler_shifts_once(t2v: ModelSpec) -> None:
    expected = shifted(np.linspace(1, 1 / 1000, 9)[:-1], t2v.flow_shift)
    grid = make_grid(t2v, "euler", 8)
    assert np.allclose(sigmas(grid), expected, atol=1e-6)
    assert np.allclose([float(s.timestep) for s in grid.steps], 1000 * expected, atol=1e-3)


def test_dpmpp_shifts_once(t2v: ModelSpec) -> None:
    expected = shifted(np.linspace(0.999, 0, 9)[:-1], t2v.flow_shift)
    assert np.allclose(sigmas(make_grid(t2v, "dpmpp", 8)), expected, atol=1e-6)


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_flow_shift_overrides_the_checkpoint(sampler, t2v: ModelSpec) -> None:
    own, asked = sigmas(make_grid(t2v, sampler, 8)), sigmas(make_grid(t2v, sampler, 8, 3.0))
    assert (asked[1:] < own[1:]).all()
    assert np.allclose(sigmas(make_grid(t2v, sampler, 8, t2v.flow_shift)), own)


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("start", [1.0, 0.9])
def test_every_sampler_solves_a_straight_path_exactly(sampler, start, t2v: ModelSpec) -> None:
    """With v = (x − x0) / σ, the exact velocity of one data point, any consistent solver ends at x0."""
    x0 = torch.linspace(-1, 1, 16).view(1, 1, 1, 4, 4)
    grid = make_grid(t2v, sampler, 8, start=start)
    first = grid.steps[0].sigma
    assert first <= start
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = first * noise + (1 - first) * x0
    for step in grid.steps:
        x = grid.scheduler.step((x - x0) / step.sigma, step.timestep, x, return_dict=False)[0]
    assert (x - x0).abs().max() < 1e-5


def test_start_below_the_grid_is_refused(t2v: ModelSpec) -> None:
    with pytest.raises(UserError, match=r"start sigma 0\.1 lies below the grid's last, 0\.\d+; start higher"):
        make_grid(t2v, "unipc", 4, start=0.1)


def test_without_a_boundary_one_transformer_serves_all(t2v: ModelSpec) -> None:
    spec = dataclasses.replace(t2v, boundary=None, experts=(HIGH,))
    assert make_grid(spec, "unipc", 5).count(HIGH) == 5


def test_guidance_acts_per_noise_expert_and_inside_its_interval(t2v: ModelSpec) -> None:
    grid = make_grid(t2v, "unipc", 8)
    guidance = Guidance({HIGH: 1.0, LOW: 4.0})
    assert [guidance.at(s) for s in grid.steps] == [1.0 if s.expert is HIGH else 4.0 for s in grid.steps]
    assert guidance.needed(grid) and not Guidance({HIGH: 1.0, LOW: 1.0}).needed(grid)
    inside = Guidance({HIGH: 4.0, LOW: 4.0}, (0.5, 0.95))
    assert [inside.at(s) > 1 for s in grid.steps] == [0.5 <= s.sigma <= 0.95 for s in grid.steps]


def test_guided_steps_evaluate_twice_and_others_once(t2v: ModelSpec) -> None:
    calls: list[float] = []

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embedding = torch.nn.Linear(1, 1)
            self.config = SimpleNamespace(patch_size=(1, 2, 2))

        def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
            calls.append(float(timestep[0]))
            return (encoder_hidden_states.mean() * torch.ones_like(hidden_states),)

    grid = make_grid(t2v, "euler", 6)
    conditions = Conditions(torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 1.0))
    x = torch.zeros(1, 1, 1, 2, 2)
    model = Constant()
    out = denoise(grid, x, conditions, Guidance({HIGH: 1.0, LOW: 3.0}), lambda e: model,
                  lambda step: contextlib.nullcontext())
    assert len(calls) == grid.count(HIGH) + 2 * grid.count(LOW)
    # x_end = −Σ v·Δσ with v = 2 (high) and 1 + 3·(2 − 1) = 4 (low)
    turn = next(s.sigma for s in grid.steps if s.expert is LOW)
    assert out.mean().item() == pytest.approx(-(2 * (grid.steps[0].sigma - turn) + 4 * turn), rel=1e-5)
