"""`lapwan train-moe`: a mixture of LoRA experts on both noise experts, with a learned router."""

from __future__ import annotations

from pathlib import Path

import torch

from lapwan import console, keyed
from lapwan.commands.base import resolve_base
from lapwan.commands.plan import index_task, one_voice, print_plan
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.errors import UserError
from lapwan.lora.assign import assign
from lapwan.lora.attach import Adapter, attach
from lapwan.lora.state import LoraState
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import AdapterSet, LoraUse
from lapwan.settings.run import RunOptions
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train import build
from lapwan.train.checklist import checklist
from lapwan.train.data import ClipStore
from lapwan.train.describe import describe
from lapwan.train.mixture_objective import MixtureObjective, MixtureWeights
from lapwan.train.parking import Parking, plan_memory
from lapwan.train.ranks import Ranks
from lapwan.train.runfolder import claim_run, start_folder
from lapwan.train.trainer import Trainer
from lapwan.train.watchers import add_watchers, check_watching
from lapwan.wan.base import Base
from lapwan.wan.device import pick_device, pick_dtype


def run(settings: TrainMoeSettings, options: RunOptions) -> None:
    """Check everything, then train; `--dry-run` stops after the checks."""
    with one_voice(settings.device) as (ranks, device_name):
        if ranks.first:
            claim_run(settings, options.overwrite)
        base = resolve_base(settings.model, index_task(settings.data))
        data = build.read_data(settings, base)
        taxonomy = load_taxonomy(settings.taxonomy)
        _check_labels(data, taxonomy)
        _base_loras(settings, base)  # a wrong one is refused now rather than after the weights are loaded
        device = pick_device(device_name)
        plan = [*describe(settings, base, data), *_describe(settings, data, taxonomy)]
        plan.append(plan_memory(settings, base, data, device).line)
        plan += check_watching(settings, base, data, labels_needed=True)
        print_plan(settings, [*plan, *map(str, checklist(settings, base, data))], options)
        if options.dry_run:
            return
        if ranks.first:
            start_folder(settings, options.overwrite)
        trainer = prepare(settings, base, data, taxonomy, device, ranks)
        if build.run_training(trainer, settings) and ranks.first:
            console.results.print(str(settings.output / f"{settings.name}.safetensors"))


def prepare(
    settings: TrainMoeSettings, base: Base, data: build.RunData, taxonomy: Taxonomy, device: torch.device,
    ranks: Ranks | None = None,
) -> Trainer:
    """Load the noise experts, put a fresh mixture on them, and wire the trainer."""
    store = ClipStore(data.index, data.items, device, len(taxonomy.families))
    memory = plan_memory(settings, base, data, device)
    parking = Parking(device, memory.both)
    base_loras = _base_loras(settings, base)
    mixture, adapters = _assemble(settings, base, data, taxonomy, base_loras, device, parking)
    first = next(iter(data.experts))
    metadata = build.provenance(settings, base, data, first)
    for key in ("lapwan.noise_expert", "lapwan.base_fingerprint", "modelspec.timestep_range"):
        metadata.pop(key)  # a mixture is for both; its spec holds the fingerprints
    objective = MixtureObjective(
        mixture, adapters, _weights(settings), settings.name, metadata,
        store.empty_text() if settings.caption_dropout else None, build.dropout_of(data),
    )
    trainer = build.make_trainer(settings, base, data, objective, store, "lapwan train-moe", ranks or Ranks())
    trainer.plan.before_turn, trainer.plan.memory = parking.turn, memory.line
    bases = {e: LoraUse(path, state, settings.alpha_base) for e, (path, state) in base_loras.items()}
    add_watchers(trainer, settings, base, data, device, AdapterSet(mixture=mixture, mixture_base=bases))
    return trainer


def _check_labels(data: build.RunData, taxonomy: Taxonomy) -> None:
    families = len(taxonomy.families)
    for item in data.items:
        if item.label_weights is None and item.label is None:
            raise UserError(f"clip {item.id} in {data.index.folder} has no label; run `lapwan label` before "
                            '`lapwan cache`, or give labels = "labels.jsonl" in [data]')
        if item.label_weights is not None and len(item.label_weights) != families:
            raise UserError(f"clip {item.id} has {len(item.label_weights)} label weights, taxonomy {taxonomy.name} has "
                            f"{families} families; label with --taxonomy {taxonomy.name}, or set taxonomy")
        if item.label is not None and item.label >= families:
            raise UserError(f"clip {item.id} has label {item.label}, taxonomy {taxonomy.name} has {families} families; "
                            f"label with --taxonomy {taxonomy.name}, or set taxonomy")
    if data.index.taxonomy not in (None, taxonomy.name) and data.settings.data.labels is None:
        raise UserError(f"{data.index.folder} was labelled with taxonomy {data.index.taxonomy}, the settings say "
                        f"{taxonomy.name}; set taxonomy, or label and cache again")


def _base_loras(settings: TrainMoeSettings, base: Base) -> dict[NoiseExpert, tuple[Path, LoraState]]:
    requests = [(expert.value, path, 1.0) for expert, path in settings.base_lora.items()]
    found = {}
    for expert, [(file, _)] in assign(requests, base.spec.experts).items():
        found[expert] = (file.path.absolute(), file.read())
    return found


def _describe(settings: TrainMoeSettings, data: build.RunData, taxonomy: Taxonomy) -> list[str]:
    counts = dict.fromkeys(taxonomy.keys, 0)
    for item in data.items:
        if (weights := item.label_weights) is not None:
            counts[taxonomy.keys[max(range(len(weights)), key=weights.__getitem__)]] += 1
        elif item.label is not None:
            counts[taxonomy.keys[item.label]] += 1
    with_roi = sum(item.roi is not None for item in data.items)
    roi = f"region loss weight {settings.roi_weight:g}, {with_roi} of {len(data.items)} clips have a region"
    if settings.roi_weight and not with_roi:
        roi = "no clip has a region: the region loss is off"
    return [
        f"{len(counts)} experts: " + ", ".join(f"{family} {n} clips" for family, n in counts.items()),
        f"router {settings.router.kind}, top {settings.router.top_k}, teacher temperature "
        f"{settings.routing_loss.teacher_temperature:g}; {roi}",
    ]


def _assemble(
    settings: TrainMoeSettings, base: Base, data: build.RunData, taxonomy: Taxonomy,
    base_loras: dict[NoiseExpert, tuple[Path, LoraState]], device: torch.device, parking: Parking,
) -> tuple[Mixture, dict[NoiseExpert, Adapter]]:
    spec = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task=base.task, text_dim=base.text_dim,
        bands={expert: (base.bands[expert].low, base.bands[expert].high) for expert in data.experts},
        router=settings.router.kind, router_temperature=settings.router.temperature, top_k=settings.router.top_k,
        knots=settings.timestep_gate.knots, flow_shift=base.spec.flow_shift, steps=base.spec.defaults.steps,
        base={expert: base.fingerprint(expert) for expert in data.experts},
        base_lora={
            expert: {"path": str(path), "fingerprint": state.fingerprint()}
            for expert, (path, state) in base_loras.items() if expert in data.experts
        },
    )
    dtype = pick_dtype(settings.dtype, device)
    transformers = {e: base.load(e, dtype, parking.load_on) for e in data.experts}
    states = {
        expert: {family: build.fresh_lora(transformers[expert], own, settings.seed, expert.value, family)
                 for family in taxonomy.keys}
        for expert, own in data.experts.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed.seed_of(settings.seed, "router"))
        mixture = Mixture(spec, states)
    mixture.to(device)
    adapters = {}
    for expert, transformer in transformers.items():
        if settings.activation_checkpointing:
            transformer.enable_gradient_checkpointing()
        frozen = base_loras[expert][1] if expert in base_loras else None
        adapters[expert] = attach(transformer, mixture.groups(expert, frozen, trainable=True), gates_required=True)
    parking.add(adapters)
    return mixture, adapters


def _weights(settings: TrainMoeSettings) -> MixtureWeights:
    loss = settings.routing_loss
    return MixtureWeights(
        roi=settings.roi_weight, entropy=loss.entropy, balance=loss.balance, teacher_kl=loss.teacher_kl,
        teacher_temperature=loss.teacher_temperature, entropy_floor=loss.entropy_floor, usage_decay=loss.usage_decay,
        alpha_base=settings.alpha_base, router_lr_scale=settings.router.lr_scale,
        gate_lr_scale=settings.timestep_gate.lr_scale,
    )
