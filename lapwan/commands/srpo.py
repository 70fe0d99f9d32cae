"""`lapwan srpo`: a noise expert aligned with the preferences of reward models."""

from __future__ import annotations

import torch

from lapwan import console
from lapwan.commands.run_setup import distributed_run, index_task, output_lock, print_plan
from lapwan.errors import UserError
from lapwan.models.device import pick_device
from lapwan.models.resolve import check_components
from lapwan.rewards.base import warn_chinese
from lapwan.rewards.build import build_rewards
from lapwan.settings.base import RunOptions
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS
from lapwan.train.recipe import run_training
from lapwan.train.run_folder import RunScope, claim_run
from lapwan.train.srpo import recipe
from lapwan.train.srpo.plan import SrpoPlan, plan_run, srpo_plan_rows, too_slow


def run(settings: SrpoSettings, options: RunOptions) -> None:
    """Check everything, then train; `--dry-run` stops after the checks."""
    lock = output_lock(settings.output, options)
    with (RunScope("lapwan srpo", settings) as run_folder,
          distributed_run(settings.device, lock) as (distributed, device_name)):
        if distributed.first:
            claim_run(settings, options.overwrite)
        device = pick_device(device_name)
        planned = plan(settings, device, distributed.count, options.dry_run)
        base, data, memory = planned.base, planned.data, planned.memory
        by_gpu = memory.by_gpu if options.dry_run else ()
        rows = srpo_plan_rows(settings, base, data, planned.intervals)
        print_plan(settings, [*rows, *memory.rows, *by_gpu], options)
        slow = too_slow(settings, base, data, device)
        if options.dry_run:
            if slow:
                console.warn(slow)
            return
        if slow:
            raise UserError(slow)
        if distributed.first:
            run_folder.start(options.overwrite)
        rewards = build_rewards(settings.rewards, device, EMBEDDED_REWARD_KINDS)
        if distributed.first:
            warn_chinese(rewards, [*data.captions, *data.held_out])
        trainer = recipe.prepare(settings, base, data, rewards, memory, device, distributed)
        if run_training(trainer, settings) and distributed.first:
            if trainer.finished:
                console.log(f"ended early at step {trainer.step}: {trainer.finished}")
            for path in sorted((settings.output / f"step_{trainer.step:06d}").iterdir()):
                if path.name != "state":
                    console.results.print(str(settings.output / path.name))


def plan(settings: SrpoSettings, device: torch.device, processes: int = 1, predict: bool = True) -> SrpoPlan:
    """`plan_run` on the base that the settings name; prompts without a cache mean text-to-video for `tiny`."""
    task = None if settings.prompts.cache is None else index_task(settings.prompts.cache)
    base = resolve_base(settings.model, task)
    check_components(base.spec)
    return plan_run(settings, base, EMBEDDED_REWARD_KINDS, device, processes, predict)
