"""What a preference-alignment run will do, checked and described before anything large is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lapwan.console import PlanRow, count_text
from lapwan.errors import UserError
from lapwan.memory.cost import tokens_of
from lapwan.memory.srpo import SrpoMemory, plan_srpo
from lapwan.models.base import Base, target_ranks
from lapwan.models.spec import ModelSpec, tensor_shapes, weight_files
from lapwan.names import Band, NoiseExpert
from lapwan.report.page import PAGE_FILE
from lapwan.rewards.base import RewardKinds
from lapwan.rewards.build import check_rewards
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.checklist import batch_text
from lapwan.train.metrics import check_tracker
from lapwan.train.optimizers import check_optimizer, describe_optimizer
from lapwan.train.recipe import check_noise_experts
from lapwan.train.srpo.data import SrpoData, check_negative, read_data
from lapwan.train.srpo.rollout import RolloutRule, rollout_steps

_BELOW = 1e-6  # the low-noise expert's band is open at the boundary: sigma equal to it belongs to the high-noise one
_CPU_FLOPS = 2e10  # per second and core, of a transformer in fp32: a rule of thumb
_MAX_CPU_STEP_SECONDS = 3600.0


@dataclass(frozen=True)
class SrpoPlan:
    """A checked run; `intervals` is the sigma range that each trained noise expert draws from."""

    base: Base
    data: SrpoData
    intervals: dict[NoiseExpert, Band]
    memory: SrpoMemory


def plan_run(
    settings: SrpoSettings, base: Base, rewards: RewardKinds, device: torch.device, processes: int = 1,
    predict: bool = True,
) -> SrpoPlan:
    """Read the prompts and check the reward files, then choose the sigma intervals and the memory plan.

    Raises:
        UserError: settings that cannot work with this model, data or device.
    """
    check_rewards(settings.rewards, rewards)
    check_optimizer(settings.optimizer, settings.schedule)
    check_tracker(settings.tracker)
    data = read_data(settings, base.spec)
    noise_experts = trained_noise_experts(settings, base.spec)
    bands = intervals(settings, base.spec, noise_experts)
    check_negative(data, (settings.rollout.guidance, settings.held_out.guidance or 1.0))
    loaded = loaded_noise_experts(settings, base.spec, noise_experts)
    memory = plan_srpo(
        settings, base, noise_experts, loaded, data.bucket, rewards, device, processes, predict=predict)
    return SrpoPlan(base, data, bands, memory)


def trained_noise_experts(settings: SrpoSettings, spec: ModelSpec) -> tuple[NoiseExpert, ...]:
    """The noise experts to train: those of the settings, else the low-noise one (or the model's only one).

    Raises:
        UserError: a noise expert that the model does not have.
    """
    if settings.noise_experts is None:
        return (spec.noise_experts[-1],)
    check_noise_experts(settings.noise_experts, spec)
    return settings.noise_experts


def loaded_noise_experts(
    settings: SrpoSettings, spec: ModelSpec, noise_experts: Sequence[NoiseExpert]
) -> list[NoiseExpert]:
    """The noise experts to load: all of them, or only the trained ones where nothing is sampled."""
    sampled = not settings.rollout.offline or settings.held_out.count > 0
    return [e for e in spec.noise_experts if sampled or e in noise_experts]


def intervals(settings: SrpoSettings, spec: ModelSpec, noise_experts: Sequence[NoiseExpert]) -> dict[NoiseExpert, Band]:
    """The bounds `sigma`, cut to each trained noise expert's band.

    Raises:
        UserError: bounds outside a band, or an interval shorter than `reach`.
    """
    low, high = settings.sigma
    bands = {}
    for noise_expert in noise_experts:
        full = spec.bands[noise_expert]
        top = full.high if full.high in full else full.high - _BELOW
        band = Band(max(low, full.low), min(high, top))
        if band.low >= band.high:
            raise UserError(f"sigma = [{low:g}, {high:g}] lies outside the {spec.title_of(noise_expert)}'s band "
                            f"{full}; choose bounds that overlap it, or set noise_experts")
        if band.high - band.low < settings.reach:
            raise UserError(f"sigma = [{low:g}, {high:g}] leaves [{band.low:g}, {band.high:g}] of the "
                            f"{spec.title_of(noise_expert)}'s band, which is shorter than reach = "
                            f"{settings.reach:g}; widen the bounds or lower reach")
        bands[noise_expert] = band
    return bands


def steps_by_noise_expert(settings: SrpoSettings, bands: Mapping[NoiseExpert, Band]) -> dict[NoiseExpert, int]:
    """Optimizer steps of each noise expert, in proportion to the length of its interval, at least one."""
    total = sum(band.high - band.low for band in bands.values())
    steps = {e: max(1, round(settings.steps * (band.high - band.low) / total)) for e, band in bands.items()}
    last = list(steps)[-1]
    steps[last] = max(1, settings.steps - sum(n for e, n in steps.items() if e is not last))
    return steps


def rollout_evaluations(settings: SrpoSettings, spec: ModelSpec, noise_expert: NoiseExpert) -> int:
    """Velocities of single samples that all rollouts of the run take from a noise expert."""
    rollout = settings.rollout
    if rollout.offline:
        return 0
    steps, _ = rollout_steps(spec, RolloutRule(rollout.steps, rollout.guidance, rollout.flow_shift))
    per_sample = sum(step.noise_expert is noise_expert for step in steps) * (2 if rollout.guidance > 1 else 1)
    return per_sample * settings.steps * settings.accumulate * settings.batch_size


def srpo_plan_rows(
    settings: SrpoSettings, base: Base, data: SrpoData, bands: Mapping[NoiseExpert, Band]
) -> list[PlanRow]:
    """The plan that `--dry-run` and the start of a run print."""
    frames, height, width = data.bucket
    what = "images" if frames == 1 else f"videos of {frames} frames"
    alone = len(settings.rewards) == 1 and settings.rewards[0].weight == 1
    rows = [
        PlanRow("model", f"{base.spec.path} ({base.task})"),
        PlanRow("prompts", f"{count_text(len(set(data.captions)), 'prompt')}, {len(data.held_out)} held out; {what} "
                           f"{height}x{width}"),
        PlanRow("steps", f"{settings.steps}, each of {batch_text(settings, 'sample')}"),
        PlanRow("rewards", ", ".join(reward.label if alone else f"{reward.label} (weight {reward.weight:g})"
                                     for reward in settings.rewards)),
        *(_noise_expert_row(settings, base, bands, noise_expert) for noise_expert in bands),
    ]
    p = settings.preference
    rows.append(PlanRow("preference", f"branches {p.branches}; discounts at the low and high end: denoise "
                                      f"{p.discount_denoise[0]:g}, {p.discount_denoise[1]:g}, inversion "
                                      f"{p.discount_inversion[0]:g}, {p.discount_inversion[1]:g}", detail=True))
    if data.offline:
        rows.append(PlanRow("rollout", "none: the clean latents of the cache (offline)"))
    else:
        r = settings.rollout
        steps, _ = rollout_steps(base.spec, RolloutRule(r.steps, r.guidance, r.flow_shift))
        counts = ", ".join(f"{sum(s.noise_expert is e for s in steps)} on the {base.spec.title_of(e)}"
                           for e in base.spec.noise_experts)
        guidance = f"guidance {r.guidance:g}" if r.guidance > 1 else "without guidance"
        rows.append(PlanRow("rollout", f"{len(steps)} Euler steps ({counts}), {guidance}"))
    if data.held_out:
        rows.append(PlanRow("held out", f"{count_text(len(data.held_out), 'prompt')} sampled every "
                                        f"{settings.held_out.every} steps"
                                        f"{f'; page {PAGE_FILE}' if settings.held_out.images else ''}"))
    return rows


def _noise_expert_row(
    settings: SrpoSettings, base: Base, bands: Mapping[NoiseExpert, Band], noise_expert: NoiseExpert
) -> PlanRow:
    band, (low, high) = bands[noise_expert], settings.sigma
    cut = "" if (band.low, band.high) == (low, high) else f" (sigma = [{low:g}, {high:g}], cut to its band)"
    text = f"sigma [{band.low:.4g}, {band.high:.4g}]{cut}; {_trained_line(settings, base)}; "
    text += describe_optimizer(settings.optimizer, settings.schedule)
    if len(bands) > 1:
        text = f"{steps_by_noise_expert(settings, bands)[noise_expert]} steps; {text}"
    if settings.master_weights == "bf16":
        text += "; bf16 master weights"
    if settings.optimizer_on_cpu:
        text += "; optimizer states in host memory"
    return PlanRow("transformer" if base.spec.one_transformer else f"{noise_expert.value} noise", text)


def _trained_line(settings: SrpoSettings, base: Base) -> str:
    if settings.train == "full":
        return "all weights"
    ranks = target_ranks(settings.targets, base.num_layers)
    return f"LoRA on {len(ranks)} modules of rank {', '.join(map(str, sorted(set(ranks.values()))))}"


def too_slow(settings: SrpoSettings, base: Base, data: SrpoData, device: torch.device) -> str | None:
    """Why the run is not feasible on a CPU; None on a GPU, and where a step takes less than an hour."""
    if device.type != "cpu":
        return None
    shapes = tensor_shapes(weight_files(base.spec.component(base.spec.noise_experts[0])))
    parameters = sum(math.prod(shape) for shape in shapes.values())
    seconds = step_flops(settings, base.spec, parameters, data.bucket) / (_CPU_FLOPS * (os.cpu_count() or 1))
    if seconds < _MAX_CPU_STEP_SECONDS:
        return None
    frames, height, width = data.bucket
    return (f"no CUDA device, and a step of {settings.accumulate} x {settings.batch_size} samples of {frames} frames "
            f"{height}x{width} on {parameters / 1e9:.1f} B parameters would take about {seconds / 3600:.0f} hours on "
            "this CPU; use a machine with a GPU, model = \"tiny\", or a smaller size, accumulate and rollout.steps")


def step_flops(settings: SrpoSettings, spec: ModelSpec, parameters: int, bucket: tuple[int, int, int]) -> float:
    """FLOPs of an optimizer step: 2 per parameter, token and evaluation; a backward counts as two evaluations."""
    rollout = 0 if settings.rollout.offline else settings.rollout.steps * (2 if settings.rollout.guidance > 1 else 1)
    return 2.0 * parameters * tokens_of(spec, bucket) * (rollout + 3) * settings.batch_size * settings.accumulate
