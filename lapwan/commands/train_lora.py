"""`lapwan train-lora`: a LoRA for each noise expert, in one run."""

from __future__ import annotations

from lapwan import console
from lapwan.commands.run_setup import distributed_run, index_task, output_lock, print_plan
from lapwan.lora.assign import report
from lapwan.models.device import pick_device
from lapwan.settings.base import RunOptions
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe
from lapwan.train.callbacks.build import check_callbacks
from lapwan.train.checklist import check_rows, checklist, plan_rows
from lapwan.train.lora.recipe import initial_loras, lora_names, plan_lora, prepare
from lapwan.train.parallel import choose_parallelism
from lapwan.train.run_folder import RunScope, claim_run


def run(settings: TrainLoraSettings, options: RunOptions) -> None:
    """Check everything, then train; `--dry-run` stops after the checks."""
    lock = output_lock(settings.output, options)
    with (RunScope("lapwan train-lora", settings) as run_folder,
          distributed_run(settings.device, lock) as (distributed, device_name)):
        if distributed.first:
            claim_run(settings, options.overwrite)
        base = resolve_base(settings.model, index_task(settings.data.cache, settings.data.labels))
        distributed = choose_parallelism(settings, base, distributed)
        data = recipe.read_data(settings, base)
        continued = initial_loras(settings, base)
        report(continued.values())
        device = pick_device(device_name)
        memory = distributed.agree(
            plan_lora(settings, base, data, device, options.dry_run, distributed.context_parallel_size))
        plan = [*plan_rows(settings, base, data, continued), *check_callbacks(settings, base, data)]
        checks = check_rows(checklist(settings, base, data))
        print_plan(settings, [*plan, *memory.rows(len(data.schedule)), *checks], options)
        if options.dry_run:
            return
        if distributed.first:
            run_folder.start(options.overwrite)
        trainer = prepare(settings, base, data, device, distributed, memory)
        if recipe.run_training(trainer, settings) and distributed.first:
            for name in lora_names(settings, base.spec, list(data.noise_experts)):
                console.results.print(str(settings.output / name))
