"""`lapwan train-moe`: a mixture of LoRA experts on both noise experts, with a learned router."""

from __future__ import annotations

from lapwan import console
from lapwan.commands.run_setup import distributed_run, index_task, output_lock, print_plan
from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.assign import report
from lapwan.models.device import pick_device
from lapwan.settings.base import RunOptions
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe
from lapwan.train.callbacks.build import check_callbacks
from lapwan.train.checklist import check_rows, checklist, plan_rows
from lapwan.train.moe.recipe import base_loras, check_mixture, mixture_rows, plan_mixture, prepare
from lapwan.train.parallel import choose_parallelism
from lapwan.train.run_folder import RunScope, claim_run


def run(settings: TrainMoeSettings, options: RunOptions) -> None:
    """Check everything, then train; `--dry-run` stops after the checks."""
    lock = output_lock(settings.output, options)
    with (RunScope("lapwan train-moe", settings) as run_folder,
          distributed_run(settings.device, lock) as (distributed, device_name)):
        if distributed.first:
            claim_run(settings, options.overwrite)
        base = resolve_base(settings.model, index_task(settings.data.cache, settings.data.labels))
        distributed = choose_parallelism(settings, base, distributed)
        taxonomy = load_taxonomy(settings.taxonomy)
        data = recipe.read_data(settings, base, taxonomy)
        check_mixture(settings, base, data, taxonomy)
        frozen = base_loras(settings, base)  # now, so that a wrong file is refused before the weights are loaded
        for loras in (settings.base_lora, settings.init_lora):
            report(recipe.given_loras(loras, base, settings.key_rule).values())
        device = pick_device(device_name)
        plan = [*plan_rows(settings, base, data), *mixture_rows(settings, data, taxonomy)]
        memory = distributed.agree(plan_mixture(
            settings, base, data, taxonomy, frozen, device, options.dry_run, distributed.context_parallel_size))
        plan += check_callbacks(settings, base, data, taxonomy)
        checks = check_rows(checklist(settings, base, data))
        print_plan(settings, [*plan, *memory.rows(len(data.schedule)), *checks], options)
        if options.dry_run:
            return
        if distributed.first:
            run_folder.start(options.overwrite)
        trainer = prepare(settings, base, data, taxonomy, device, distributed, memory)
        if recipe.run_training(trainer, settings) and distributed.first:
            console.results.print(str(settings.output / f"{settings.name}.safetensors"))
