"""A fresh mixture on a model's noise experts, from the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lapwan import console, rng
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError, nearest
from lapwan.lora.assign import assign
from lapwan.lora.attach import Adapter, attach
from lapwan.lora.combine import resize
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.training import TrainingMemory, plan_training
from lapwan.models.base import Base, targets_of
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import AdapterSet, LoraUse
from lapwan.settings.optimizers import AutomagicSettings, ProdigySettings
from lapwan.settings.train import NoiseExpertSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train import recipe
from lapwan.train.callbacks.base import OnFirstProcess
from lapwan.train.callbacks.build import add_callbacks
from lapwan.train.callbacks.routing import ExpertGradients, RoutingCallback
from lapwan.train.clip_store import ClipStore, family_of
from lapwan.train.moe.objective import MixtureObjective, MixtureWeights
from lapwan.train.parallel import Distributed
from lapwan.train.trainer import Trainer

ROUTER_LR_LIMIT = 5e-3  # above it text routers were seen to diverge: 10 x 1e-4 is right, 10 x 2e-3 is not
_IMBALANCE = 3.0  # largest family over smallest, from which it is worth a warning

BaseLoras = Mapping[NoiseExpert, tuple[Path, LoraState]]


def check_mixture(settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy) -> None:
    """Refuse what cannot be trained, before any weights are loaded.

    Raises:
        UserError: labels of another taxonomy, more experts to act than there are, an unknown family, a LoRA that the
            base has already.
    """
    _check_labels(data, taxonomy)
    experts = len(taxonomy.families)
    if settings.router.top_k > experts:
        raise UserError(f"router.top_k = {settings.router.top_k}, but taxonomy {taxonomy.name} has {experts} families; "
                        f"set router.top_k = {experts} or less")
    for family in settings.expert_targets:
        if family not in taxonomy.keys:
            raise UserError(f"expert_targets.{family} is no family of {taxonomy.name}{nearest(family, taxonomy.keys)}; "
                            f"it has {', '.join(taxonomy.keys)}")
    for noise_expert, file in recipe.initial_loras(settings.init_lora, base).items():
        merged = {lora.fingerprint() for lora, _ in base.loras.get(noise_expert, ())}
        if file.fingerprint() in merged:
            raise UserError(f"init_lora.{noise_expert.value} = {file.path} is merged into the model already, and would act "
                            "twice; leave init_lora out, or train on the model without it")


def _check_labels(data: recipe.RunData, taxonomy: Taxonomy) -> None:
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


def base_loras(settings: TrainMoeSettings, base: Base) -> dict[NoiseExpert, tuple[Path, LoraState]]:
    """The frozen LoRAs beside the experts, read."""
    requests = [(noise_expert.value, path, 1.0) for noise_expert, path in settings.base_lora.items()]
    found = {}
    for noise_expert, [(file, _)] in assign(requests, base.spec.noise_experts).items():
        found[noise_expert] = (file.path.absolute(), file.read())
    return found


def describe_mixture(settings: TrainMoeSettings, data: recipe.RunData, taxonomy: Taxonomy) -> list[str]:
    """Lines of the plan: experts and their clips, router, region loss."""
    counts = dict.fromkeys(taxonomy.keys, 0)
    for item in data.items:
        counts[taxonomy.keys[family_of(item) or 0]] += 1
    least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    ratio = counts[most] / counts[least] if counts[least] else float("inf")
    lines = [f"{len(counts)} experts{' for both noise experts' if settings.shared_experts else ''}: "
             + ", ".join(f"{family} {n} clips" for family, n in counts.items())
             + f"; imbalance {ratio:.3g}, drawn by clips of a family to the power -{settings.data.balance:g}"]
    if ratio >= _IMBALANCE and settings.data.balance < 1:
        console.warn(f"{most} has {counts[most]} clips, {least} {counts[least]}: experts of rare families learn little "
                     "and the router learns to leave them out; set data.balance = 1 to draw families evenly")
    learns = "" if settings.router.kind == "rule" else (
        f", top {settings.router.top_k}, teacher temperature {settings.routing_loss.teacher_temperature:g}")
    region = "" if settings.roi_weight else "; region loss off (roi_weight = 0)"
    lines.append(f"router {settings.router.kind}{' with sigma' if settings.router.sigma else ''}{learns}{region}")
    steep = settings.router.kind not in ("rule", "linear")
    if steep and (rate := router_lr(settings)) is not None and rate > ROUTER_LR_LIMIT:
        console.warn(f"the router's lr is lr x router.lr_scale = {rate:g}, above {ROUTER_LR_LIMIT:g}, where routers "
                     f"were seen to diverge; set router.lr_scale = {settings.router.lr_scale * 1e-3 / rate:.2g} or so")
    return lines


def plan_mixture(
    settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy, frozen: BaseLoras,
    device: torch.device, look: bool = False, processes: int = 1,
) -> TrainingMemory:
    """The memory plan of a mixture: an expert a family on every target, and the LoRA beside them."""
    beside = {noise_expert: {path: entry.down.shape[0] for path, entry in state.entries.items()}
              for noise_expert, (_, state) in frozen.items()}
    ranks = {
        noise_expert: [targets_of(settings.targets_for(family, own.targets), base.num_layers)
                 for family in taxonomy.keys]
        for noise_expert, own in data.noise_experts.items()
    }
    return plan_training(settings, base, recipe.workload(data, base, ranks, beside), device, look, processes)


def router_lr(settings: TrainMoeSettings) -> float | None:
    """The largest lr the router can see; None where only the run can tell (Prodigy)."""
    optimizer = settings.optimizer
    if isinstance(optimizer, ProdigySettings):
        return None
    lr = optimizer.max_lr if isinstance(optimizer, AutomagicSettings) else optimizer.lr
    return lr * settings.router.lr_scale


def assemble(
    settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy, frozen: BaseLoras,
    device: torch.device, offload: NoiseExpertOffload, memory: TrainingMemory,
) -> tuple[Mixture, dict[NoiseExpert, Adapter]]:
    """Load the noise experts, and put the mixture's experts on them."""
    spec = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task=base.task, text_dim=base.text_dim,
        bands={noise_expert: (base.bands[noise_expert].low, base.bands[noise_expert].high) for noise_expert in data.noise_experts},
        router=settings.router.kind, router_temperature=settings.router.temperature, top_k=settings.router.top_k,
        knots=settings.timestep_gate.knots, flow_shift=base.spec.flow_shift, steps=base.spec.defaults.steps,
        base={noise_expert: base.fingerprint(noise_expert) for noise_expert in data.noise_experts},
        base_lora={
            noise_expert: {"path": str(path), "fingerprint": state.fingerprint()}
            for noise_expert, (path, state) in frozen.items() if noise_expert in data.noise_experts
        },
        router_sigma=settings.router.sigma, gate_ema=settings.router.gate_ema, shared_experts=settings.shared_experts,
    )
    transformers = {e: memory.load(settings, base, e, offload.load_on, device) for e in data.noise_experts}
    given = {e: file.read() for e, file in recipe.initial_loras(settings.init_lora, base).items()}
    states = {
        noise_expert: {family: _expert(settings, transformers[noise_expert], own, noise_expert, family, given.get(noise_expert))
                 for family in taxonomy.keys}
        for noise_expert, own in data.noise_experts.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(settings.seed, "router"))
        mixture = Mixture(spec, states)
    mixture.to(device)
    adapters = {}
    for noise_expert, transformer in transformers.items():
        own = frozen[noise_expert][1] if noise_expert in frozen else None
        adapters[noise_expert] = attach(transformer, mixture.groups(noise_expert, own, trainable=True), gates_required=True)
    if settings.shared_experts:
        _share(adapters)
    offload.add(adapters)
    return mixture, adapters


def _expert(
    settings: TrainMoeSettings, transformer: torch.nn.Module, own: NoiseExpertSettings, noise_expert: NoiseExpert, family: str,
    given: LoraState | None,
) -> LoraState:
    targets = settings.targets_for(family, own.targets)
    # Shared experts start from one draw, whichever noise expert they are attached to first.
    side = "shared" if settings.shared_experts else noise_expert.value
    fresh = recipe.fresh_lora(transformer, own.model_copy(update={"targets": targets}), settings.seed, side, family)
    return fresh if given is None else started_from(fresh, given)


def started_from(fresh: LoraState, given: LoraState) -> LoraState:
    """`given` at the modules and ranks of `fresh`: the same ΔW, as far as a lower rank holds it.

    A larger rank takes `given`'s own A and B and keeps fresh rows of A (with B = 0) for the rest; a smaller one its
    largest singular values. Modules that only `given` has are left out, with a warning.
    """
    lost = [path for path in given.entries if path not in fresh.entries]
    if lost:
        console.warn(f"init_lora has {len(lost)} modules that the experts do not (such as {lost[0]}); what it changes "
                     "there is left out: widen [targets] to keep it")
    entries = {}
    for path, new in fresh.entries.items():
        old = given.entries.get(path)
        if old is None:
            entries[path] = new
            continue
        if old.rank > new.rank:
            old = resize(LoraState({path: old}), new.rank)[0].entries[path]
        down = torch.cat([old.down.to(new.down), new.down[old.rank :]])
        up = new.up.clone()
        up[:, : old.rank] = old.up.to(new.up) * (old.scale / new.scale)
        entries[path] = LoraEntry(down, up, new.alpha)
    return LoraState(entries, dict(fresh.metadata))


def _share(adapters: Mapping[NoiseExpert, Adapter]) -> None:
    """Let every adapter's trained rows be the first one's: the same parameters, not copies."""
    first, *others = adapters.values()
    for other in others:
        for path, layer in other.layers.items():
            layer.down_RI, layer.up_OR = first.layers[path].down_RI, first.layers[path].up_OR


def weights_of(settings: TrainMoeSettings, steps: int) -> MixtureWeights:
    """The objective's numbers for a run of so many steps."""
    loss = settings.routing_loss
    return MixtureWeights(
        roi=settings.roi_weight, entropy=loss.entropy, balance=loss.balance, teacher_kl=loss.teacher_kl,
        teacher_kl_end=loss.teacher_kl_end, steps=steps, teacher_temperature=loss.teacher_temperature,
        entropy_floor=loss.entropy_floor, usage_decay=loss.usage_decay, alpha_base=settings.alpha_base,
        router_lr_scale=settings.router.lr_scale, gate_lr_scale=settings.timestep_gate.lr_scale,
        expert_dropout=settings.expert_dropout,
    )


def prepare(
    settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy, device: torch.device,
    distributed: Distributed | None = None, memory: TrainingMemory | None = None,
) -> Trainer:
    """Load the noise experts, put a fresh mixture on them, and wire the trainer."""
    families, frozen = len(taxonomy.families), base_loras(settings, base)
    memory = memory or plan_mixture(settings, base, data, taxonomy, frozen, device)
    store = ClipStore(
        data.index, data.items, device, families, settings.roi_fallback == "motion", memory.keep_data)
    offload = NoiseExpertOffload(device, memory.both, memory.plan.streamed)
    mixture, adapters = assemble(settings, base, data, taxonomy, frozen, device, offload, memory)
    first = next(iter(data.noise_experts))
    metadata = recipe.provenance(settings, base, data, first)
    for key in ("lapwan.noise_expert", "lapwan.base_fingerprint", "modelspec.timestep_range"):
        metadata.pop(key)  # a mixture is for both; its spec holds the fingerprints
    objective = MixtureObjective(
        mixture, adapters, weights_of(settings, len(data.schedule)), settings.name, metadata,
        store.empty_text() if settings.caption_dropout else None, recipe.dropout_of(data),
    )
    trainer = recipe.make_trainer(settings, base, data, objective, store, "lapwan train-moe", distributed or Distributed())
    recipe.use_memory_plan(trainer, memory, offload)
    trainer.rules["expert_gradients"] = ExpertGradients(adapters, settings.routing_watch.every)
    bases = {e: LoraUse(path, state, settings.alpha_base) for e, (path, state) in frozen.items()}
    add_callbacks(trainer, settings, base, data, device, AdapterSet(mixture=mixture, mixture_base=bases), taxonomy)
    every = settings.routing_watch.every
    trainer.callbacks["routing"] = RoutingCallback(objective, settings) if trainer.plan.distributed.first else OnFirstProcess(every)
    return trainer
