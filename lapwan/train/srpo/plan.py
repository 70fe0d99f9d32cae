"""What a preference-alignment run is about, checked and said before anything large is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lapwan.memory.srpo import SrpoMemory, plan_memory
from lapwan.models.base import Base, targets_of
from lapwan.models.spec import tensor_shapes, weight_files
from lapwan.names import Band, NoiseExpert
from lapwan.rewards.build import check_rewards
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.optimizers import check_optimizer, describe_optimizer
from lapwan.train.srpo import recipe
from lapwan.train.srpo.data import SrpoData, negative_needed, read_data
from lapwan.train.srpo.rollout import RolloutRule, rollout_steps

_CPU_FLOPS = 2e10  # a second and core, of a transformer in fp32: a rule of thumb
_PATIENCE = 3600.0  # seconds a step may take on a CPU


@dataclass(frozen=True)
class Planned:
    """What a run is about, checked, before anything large is loaded."""

    base: Base
    data: SrpoData
    intervals: dict[NoiseExpert, Band]
    memory: SrpoMemory


def plan_run(settings: SrpoSettings, base: Base, device: torch.device, processes: int = 1) -> Planned:
    """Read prompts and reward files, and settle the intervals and the memory.

    Raises:
        UserError: what cannot work, in one line.
    """
    check_rewards(settings.rewards)
    check_optimizer(settings.optimizer, settings.schedule)
    data = read_data(settings, base.spec)
    noise_experts = recipe.trained_noise_experts(settings, base.spec)
    own = recipe.intervals(settings, base.spec, noise_experts)
    negative_needed(data, (settings.rollout.guidance, settings.held_out.guidance or 1.0))
    loaded = recipe.loaded_noise_experts(settings, base.spec, noise_experts)
    memory = plan_memory(settings, base, noise_experts, loaded, data.bucket, device, processes)
    return Planned(base, data, own, memory)


def describe(
    settings: SrpoSettings, base: Base, data: SrpoData, own: Mapping[NoiseExpert, Band]
) -> list[str]:
    """What `--dry-run` and the start of a run say."""
    frames, height, width = data.bucket
    what = "images" if frames == 1 else f"videos of {frames} frames"
    lines = [
        f"model {base.spec.path} ({base.task}), {len(set(data.captions))} prompts, {len(data.held_out)} held out; "
        f"{what} of {height}x{width}",
        f"a step is {settings.accumulate} x {settings.batch_size} samples, {settings.steps} steps; rewards "
        + ", ".join(f"{one.label} {one.weight:g}" for one in settings.rewards),
    ]
    low, high = settings.sigma
    for noise_expert, band in own.items():
        cut = "" if (band.low, band.high) == (low, high) else f" (asked: [{low:g}, {high:g}], cut to its band)"
        lines.append(f"{noise_expert.value} noise: sigma [{band.low:g}, {band.high:g}]{cut}, reach {settings.reach:g}, "
                     f"{recipe.shares(settings, own)[noise_expert]} steps; "
                     + _trained_line(settings, base) + "; " + describe_optimizer(settings.optimizer, settings.schedule)
                     + f"; masters {settings.master_weights}" + (" on the CPU" if settings.optimizer_on_cpu else ""))
    p = settings.preference
    lines.append(f"branches {p.branches}; discounts at the low and high end: denoise {p.discount_denoise[0]:g}, "
                 f"{p.discount_denoise[1]:g}, inversion {p.discount_inversion[0]:g}, {p.discount_inversion[1]:g}")
    if data.offline:
        lines.append("offline: clean latents of the cache, no rollout")
    else:
        r = settings.rollout
        steps, _ = rollout_steps(base.spec, RolloutRule(r.steps, r.guidance, r.flow_shift))
        counts = ", ".join(f"{sum(s.noise_expert is e for s in steps)} on the {e.value} noise expert"
                           for e in base.spec.noise_experts)
        lines.append(f"rollout: {len(steps)} Euler steps ({counts}), guidance {r.guidance:g}")
    if data.held_out:
        lines.append(f"held-out prompts: {len(data.held_out)} sampled every {settings.held_out.every} steps, "
                     f"{min(settings.held_out.images, len(data.held_out))} shown")
    return lines


def _trained_line(settings: SrpoSettings, base: Base) -> str:
    if settings.train == "full":
        return "all weights"
    ranks = targets_of(settings.targets, base.num_layers)
    return f"LoRA on {len(ranks)} modules of ranks {', '.join(map(str, sorted(set(ranks.values()))))}"


def too_slow(settings: SrpoSettings, base: Base, data: SrpoData, device: torch.device) -> str | None:
    """Why this cannot be done on a CPU, if a step would take hours there."""
    if device.type != "cpu":
        return None
    shapes = tensor_shapes(weight_files(base.spec.component(base.spec.noise_experts[0])))
    numbers = sum(math.prod(shape) for shape in shapes.values())
    seconds = recipe.flops(settings, base.spec, numbers, data.bucket) / (_CPU_FLOPS * (os.cpu_count() or 1))
    if seconds < _PATIENCE:
        return None
    frames, height, width = data.bucket
    return (f"no CUDA device, and a step of {settings.accumulate} x {settings.batch_size} samples of {frames} frames "
            f"{height}x{width} on {numbers / 1e9:.1f} B parameters would take about {seconds / 3600:.0f} hours on this "
            "CPU; use a machine with a GPU, model = \"tiny\", or a smaller size, accumulate and rollout.steps")
