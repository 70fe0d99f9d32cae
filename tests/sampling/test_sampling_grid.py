from __future__ import annotations

import contextlib
import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from lapwan.errors import UserError
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.denoise import Conditions, Guidance, denoise
from lapwan.sampling.scheduler import Grid, SamplerName, Step, make_grid, shifted
from lapwan.wan.backbone import WanBackbone, load_transformer

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
OWN = (1.0, 0.95, 0.86, 0.6, 0.31)


def sigmas(grid: Grid) -> np.ndarray:
    return np.array([step.sigma for step in grid.steps])


@pytest.mark.parametrize(("task", "shift", "high"), [("i2v", 5.0, 15), ("t2v", 12.0, 26), ("t2v", 3.0, 13)])
def test_the_boundary_is_found_after_the_shift(task, shift, high, t2v, i2v) -> None:
    """40 steps: by step index it would be 5 (or 4) whatever the shift."""
    grid = make_grid(t2v if task == "t2v" else i2v, "unipc", 40, shift)
    assert (grid.count(HIGH), grid.count(LOW)) == (high, 40 - high)
    assert [s.noise_expert for s in grid.steps] == [HIGH] * high + [LOW] * (40 - high)


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
@pytest.mark.parametrize(("start", "own"), [(1.0, None), (0.9, None), (1.0, OWN), (0.9, OWN)])
def test_every_sampler_solves_a_straight_path_exactly(sampler, start, own, t2v: ModelSpec) -> None:
    """With v = (x − x0) / σ, the exact velocity of one data point, any consistent solver ends at x0."""
    x0 = torch.linspace(-1, 1, 16).view(1, 1, 1, 4, 4)
    grid = make_grid(t2v, sampler, 8 if own is None else len(own), start=start, sigmas=own)
    if own is not None:
        assert sigmas(grid) == pytest.approx([level for level in own if level <= start], abs=2e-6)
        assert [float(s.timestep) for s in grid.steps] == pytest.approx([1000 * s.sigma for s in grid.steps], abs=1)
    first = grid.steps[0].sigma
    assert first <= start
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = first * noise + (1 - first) * x0
    for step in grid.steps:
        x = grid.scheduler.step((x - x0) / step.sigma, step.timestep, x, return_dict=False)[0]
    assert (x - x0).abs().max() < 1e-5


def test_start_below_the_grid_is_refused(t2v: ModelSpec) -> None:
    with pytest.raises(UserError, match=r"start sigma 0\.1 is below the last sigma of the grid, 0\.\d+; start higher"):
        make_grid(t2v, "unipc", 4, start=0.1)


def test_without_a_boundary_one_transformer_serves_all(t2v: ModelSpec) -> None:
    spec = dataclasses.replace(t2v, boundary=None, noise_experts=(HIGH,))
    assert make_grid(spec, "unipc", 5).count(HIGH) == 5


def test_the_boundary_may_be_another(t2v: ModelSpec) -> None:
    own, other = make_grid(t2v, "unipc", 20), make_grid(t2v, "unipc", 20, boundary=0.6)
    assert [step.noise_expert for step in other.steps] == [HIGH if step.sigma >= 0.6 else LOW for step in other.steps]
    assert (sigmas(own) == sigmas(other)).all() and other.count(HIGH) > own.count(HIGH) > 0 < other.count(LOW)


def test_guidance_acts_per_noise_expert_and_inside_its_interval(t2v: ModelSpec) -> None:
    grid = make_grid(t2v, "unipc", 8)
    guidance = Guidance({HIGH: 1.0, LOW: 4.0})
    assert [guidance.at(s) for s in grid.steps] == [1.0 if s.noise_expert is HIGH else 4.0 for s in grid.steps]
    assert guidance.needed(grid) and not Guidance({HIGH: 1.0, LOW: 1.0}).needed(grid)
    inside = Guidance({HIGH: 4.0, LOW: 4.0}, (0.5, 0.95))
    assert [inside.at(s) > 1 for s in grid.steps] == [0.5 <= s.sigma <= 0.95 for s in grid.steps]


@pytest.mark.parametrize("batched_guidance", [True, False])
def test_guided_steps_evaluate_twice_and_others_once(batched_guidance, t2v: ModelSpec) -> None:
    """Against Euler steps by hand with diffusers' own forward: x += (σ' − σ)·(v_neg + g·(v_text − v_neg))."""
    models = {noise_expert: load_transformer(t2v, noise_expert) for noise_expert in t2v.noise_experts}
    generator = torch.Generator().manual_seed(0)
    text, negative = (torch.randn(1, 12, t2v.text_dim, generator=generator) for _ in range(2))
    x = start = torch.randn(1, 16, 2, 4, 6, generator=generator)
    grid, strength = make_grid(t2v, "euler", 4), {HIGH: 1.0, LOW: 3.0}
    sigmas_to = [step.sigma for step in grid.steps[1:]] + [0.0]
    for step, after in zip(grid.steps, sigmas_to, strict=True):
        with torch.no_grad():
            v, v_negative = (models[step.noise_expert](x, step.timestep[None], side, return_dict=False)[0]
                             for side in (text, negative))
        x = x + (after - step.sigma) * (v_negative + strength[step.noise_expert] * (v - v_negative))

    rows: list[int] = []
    for model in models.values():
        model.proj_out.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    out = denoise(grid, start, Conditions(text, negative), Guidance(strength), lambda e: WanBackbone(models[e]),
                  lambda step: contextlib.nullcontext(), batched_guidance=batched_guidance)
    guided = [2] if batched_guidance else [1, 1]
    assert rows == [1] * grid.count(HIGH) + guided * grid.count(LOW) and 0 < grid.count(LOW) < 4
    assert (out - x).abs().max() < 1e-5


def test_what_is_kept_of_the_prompts_goes_with_a_noise_experts_last_step(t2v: ModelSpec) -> None:
    backbones = {noise_expert: WanBackbone(load_transformer(t2v, noise_expert)) for noise_expert in t2v.noise_experts}
    generator = torch.Generator().manual_seed(0)
    text, negative = (torch.randn(1, 12, t2v.text_dim, generator=generator) for _ in range(2))
    start = torch.randn(1, 16, 2, 4, 6, generator=generator)
    kept: list[list[NoiseExpert]] = []

    def run(stop_after: int = 10) -> None:
        def on_step(step: Step, x0: torch.Tensor) -> None:
            kept.append([e for e, backbone in backbones.items() if backbone._prompts])
            if len(kept) == stop_after:
                raise KeyboardInterrupt

        grid = make_grid(t2v, "euler", 4)
        denoise(grid, start, Conditions(text, negative), Guidance({HIGH: 3.0, LOW: 3.0}), backbones.__getitem__,
                lambda step: contextlib.nullcontext(), on_step)

    run()
    assert kept == [[step.noise_expert] for step in make_grid(t2v, "euler", 4).steps]
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=len(kept) + 1)
    assert not any(backbone._prompts for backbone in backbones.values())
