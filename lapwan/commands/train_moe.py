"""`lapwan train-moe`: a mixture of LoRA experts on both noise experts, with a learned router."""

from __future__ import annotations

import torch

from lapwan import console
from lapwan.commands.plan import index_task, one_voice, print_plan
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.memory.offload import Parking
from lapwan.memory.training import TrainingMemory
from lapwan.models.base import Base
from lapwan.models.device import pick_device
from lapwan.models.resolve import resolve_base
from lapwan.sampling.adapters import AdapterSet, LoraUse
from lapwan.settings.base import RunOptions
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train import recipe
from lapwan.train.callbacks.base import Elsewhere
from lapwan.train.callbacks.build import add_watchers, check_watching
from lapwan.train.callbacks.routing import ExpertGradients, RoutingWatch
from lapwan.train.checklist import checklist, describe
from lapwan.train.clip_store import ClipStore
from lapwan.train.context_parallel import divided
from lapwan.train.moe.objective import MixtureObjective
from lapwan.train.moe.recipe import assemble, base_loras, check_mixture, describe_mixture, plan_mixture, weights_of
from lapwan.train.parallel import Ranks
from lapwan.train.run_folder import claim_run, start_folder
from lapwan.train.trainer import Trainer


def run(settings: TrainMoeSettings, options: RunOptions) -> None:
    """Check everything, then train; `--dry-run` stops after the checks."""
    with one_voice(settings.device) as (ranks, device_name):
        if ranks.first:
            claim_run(settings, options.overwrite)
        base = resolve_base(settings.model, index_task(settings.data))
        ranks = divided(settings, base, ranks)
        data = recipe.read_data(settings, base)
        taxonomy = load_taxonomy(settings.taxonomy)
        check_mixture(settings, base, data, taxonomy)
        frozen = base_loras(settings, base)  # a wrong one is refused now rather than after the weights are loaded
        device = pick_device(device_name)
        plan = [*describe(settings, base, data), *describe_mixture(settings, data, taxonomy)]
        memory = ranks.alike(
            plan_mixture(settings, base, data, taxonomy, frozen, device, options.dry_run, ranks.copies))
        plan.append(memory.line)
        plan += check_watching(settings, base, data, taxonomy)
        print_plan(settings, [*plan, *map(str, checklist(settings, base, data))], options)
        if options.dry_run:
            return
        if ranks.first:
            start_folder(settings, options.overwrite)
        trainer = prepare(settings, base, data, taxonomy, device, ranks, memory)
        if recipe.run_training(trainer, settings) and ranks.first:
            console.results.print(str(settings.output / f"{settings.name}.safetensors"))


def prepare(
    settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy, device: torch.device,
    ranks: Ranks | None = None, memory: TrainingMemory | None = None,
) -> Trainer:
    """Load the noise experts, put a fresh mixture on them, and wire the trainer."""
    families, frozen = len(taxonomy.families), base_loras(settings, base)
    memory = memory or plan_mixture(settings, base, data, taxonomy, frozen, device)
    store = ClipStore(
        data.index, data.items, device, families, settings.roi_fallback == "motion", memory.keep_data)
    parking = Parking(device, memory.both, memory.plan.streamed)
    mixture, adapters = assemble(settings, base, data, taxonomy, frozen, device, parking, memory)
    first = next(iter(data.experts))
    metadata = recipe.provenance(settings, base, data, first)
    for key in ("lapwan.noise_expert", "lapwan.base_fingerprint", "modelspec.timestep_range"):
        metadata.pop(key)  # a mixture is for both; its spec holds the fingerprints
    objective = MixtureObjective(
        mixture, adapters, weights_of(settings, len(data.schedule)), settings.name, metadata,
        store.empty_text() if settings.caption_dropout else None, recipe.dropout_of(data),
    )
    trainer = recipe.make_trainer(settings, base, data, objective, store, "lapwan train-moe", ranks or Ranks())
    recipe.use_memory(trainer, memory, parking)
    trainer.rules["expert_gradients"] = ExpertGradients(adapters, settings.routing_watch.every)
    bases = {e: LoraUse(path, state, settings.alpha_base) for e, (path, state) in frozen.items()}
    add_watchers(trainer, settings, base, data, device, AdapterSet(mixture=mixture, mixture_base=bases), taxonomy)
    every = settings.routing_watch.every
    trainer.watchers["routing"] = RoutingWatch(objective, settings) if trainer.plan.ranks.first else Elsewhere(every)
    return trainer
