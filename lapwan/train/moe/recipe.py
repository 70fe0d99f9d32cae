"""From settings to a mixture run: checks, the memory plan, the noise experts with a new mixture, the trainer.

`prepare`, at the end, is the entry point.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lapwan import console, rng
from lapwan.console import PlanRow
from lapwan.data.labels import check_label
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError, nearest
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.attach import Adapter, attach
from lapwan.lora.combine import resize
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate, low_rank_only
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.training import TrainingMemory, plan_training
from lapwan.models.base import Base, target_ranks
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.router import router_class
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import AdapterSet, LoraUse
from lapwan.settings.train import NoiseExpertSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train import recipe
from lapwan.train.callbacks.build import make_callbacks
from lapwan.train.callbacks.routing_windows import ExpertGradients, RoutingCallback
from lapwan.train.clip_store import LABEL_FIRST, ClipStore, family_of
from lapwan.train.moe.objective import MixtureObjective, MixtureWeights
from lapwan.train.parallel import Distributed
from lapwan.train.trainer import Trainer
from lapwan.wan.backbone import WanBackbone

ROUTER_LR_LIMIT = 5e-3  # text routers were seen to diverge above it: 10 x 1e-4 is right, 10 x 2e-3 is not
_IMBALANCE = 3.0  # largest over smallest family, from which a warning is given

BaseLoras = Mapping[NoiseExpert, tuple[Path, AdapterState]]


def check_mixture(settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy) -> None:
    """Refuse a mixture that cannot be trained, before any weights are loaded.

    Raises:
        UserError: labels of another taxonomy, a top_k above the number of experts, an unknown family, or an init_lora
            that is merged into the base already or has no low-rank form.
    """
    _check_labels(data, taxonomy)
    experts = len(taxonomy.families)
    if settings.router.top_k > experts:
        raise UserError(f"router.top_k = {settings.router.top_k}, but taxonomy {taxonomy.name} has {experts} families; "
                        f"set router.top_k = {experts} or less")
    for family in settings.expert_targets:
        if family not in taxonomy.keys:
            raise UserError(f"expert_targets.{family} is not a family of {taxonomy.name}"
                            f"{nearest(family, taxonomy.keys)}; it has {', '.join(taxonomy.keys)}")
    for noise_expert, file in initial_loras(settings, base).items():
        merged = {lora.fingerprint() for lora, _ in base.loras.get(noise_expert, ())}
        if file.fingerprint() in merged:
            raise UserError(f"init_lora.{noise_expert.value} = {file.path} is already merged into the model and would "
                            "be applied twice; leave init_lora out, or train on the model without it")


def _check_labels(data: recipe.RunData, taxonomy: Taxonomy) -> None:
    relabel = f"label with --taxonomy {taxonomy.name}, or set taxonomy"
    for item in data.items:
        if item.label_weights is None and item.label is None:
            raise UserError(f"clip {item.id} in {data.index.folder} has no label; {LABEL_FIRST}")
        check_label(f"clip {item.id} has ", item.label_weights, item.label, taxonomy, relabel)
    if data.index.taxonomy not in (None, taxonomy.name) and data.settings.data.labels is None:
        raise UserError(f"{data.index.folder} was labelled with taxonomy {data.index.taxonomy}, but the settings "
                        f"name {taxonomy.name}; set taxonomy, or label and cache again")


def initial_loras(settings: TrainMoeSettings, base: Base) -> dict[NoiseExpert, AdapterFile]:
    """The LoRAs that every expert starts from, by noise expert: of any kind that has a low-rank form.

    Raises:
        UserError: as `recipe.given_loras`, or an update that depends on the model's weights.
    """
    files = recipe.given_loras(settings.init_lora, base, settings.key_rule)
    for noise_expert, file in files.items():
        for path, module in file.modules.items():
            if module.needs_weight:
                raise UserError(f"init_lora.{noise_expert.value} = {file.path}: module '{path}' is a {module.kind}, "
                                "whose update depends on the model's weights and has no low-rank form; train on the "
                                "model with it: model = {model = MODEL, lora = {...}}")
    return files


def base_loras(settings: TrainMoeSettings, base: Base) -> dict[NoiseExpert, tuple[Path, AdapterState]]:
    """The frozen LoRAs beside the experts, with their tensors.

    Raises:
        UserError: as `recipe.given_loras`, or one with other updates than low-rank pairs.
    """
    files = recipe.given_loras(settings.base_lora, base, settings.key_rule)
    for noise_expert, file in files.items():
        low_rank_only(file.modules, f"base_lora.{noise_expert.value} = {file.path}")
    return {noise_expert: (file.path.absolute(), file.read()) for noise_expert, file in files.items()}


def mixture_rows(settings: TrainMoeSettings, data: recipe.RunData, taxonomy: Taxonomy) -> list[PlanRow]:
    """Of the plan: experts and their clips, router, region loss."""
    counts = dict.fromkeys(taxonomy.keys, 0)
    for item in data.items:
        counts[taxonomy.keys[family_of(item) or 0]] += 1
    smallest, largest = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    ratio = counts[largest] / counts[smallest] if counts[smallest] else float("inf")
    text = f"{len(counts)}{' for both noise experts' if settings.shared_experts else ''}, by clips: "
    text += ", ".join(f"{family} {n}" for family, n in counts.items())
    if ratio > 1:
        text += f"; imbalance (largest / smallest) {ratio:.3g}"
    if settings.data.balance:
        text += "; " + ("families are drawn equally often" if settings.data.balance == 1 else
                        f"rare families are drawn more often (data.balance = {settings.data.balance:g})")
    rows = [PlanRow("experts", text)]
    if ratio >= _IMBALANCE and settings.data.balance < 1:
        console.warn(f"{largest} has {counts[largest]} clips, {smallest} {counts[smallest]}: experts of rare families "
                     "learn little and the router learns to avoid them; set data.balance = 1 to draw families evenly")
    router = router_class(settings.router.kind)
    learned = f", top {settings.router.top_k} of {len(counts)}" if router.learned else ""
    rows.append(PlanRow("router", f"{settings.router.kind}{' with sigma' if settings.router.sigma else ''}{learned}"))
    if not settings.roi_weight:
        rows.append(PlanRow("regions", "loss off (roi_weight = 0)"))
    if router.may_diverge and (lr := router_lr(settings)) is not None and lr > ROUTER_LR_LIMIT:
        console.warn(f"the router's lr is lr x router.lr_scale = {lr:g}, above {ROUTER_LR_LIMIT:g}, where routers "
                     f"were seen to diverge; set router.lr_scale = {settings.router.lr_scale * 1e-3 / lr:.2g} or so")
    return rows


def plan_mixture(
    settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy, frozen: BaseLoras,
    device: torch.device, dry_run: bool = False, processes: int = 1,
) -> TrainingMemory:
    """The memory plan of a mixture: one expert for each family on every target, and the frozen LoRA beside them."""
    frozen_ranks = {noise_expert: {path: pair.rank for path, pair in state.low_rank(f"base_lora = {file}").items()}
                    for noise_expert, (file, state) in frozen.items()}
    ranks = {
        noise_expert: [target_ranks(settings.targets_for(family, local_settings.targets), base.num_layers)
                       for family in taxonomy.keys]
        for noise_expert, local_settings in data.noise_experts.items()
    }
    return plan_training(settings, base, recipe.workload(data, base, ranks, frozen_ranks), device, dry_run, processes)


def router_lr(settings: TrainMoeSettings) -> float | None:
    """The largest lr the router can have; None where it cannot be predicted (Prodigy)."""
    lr = settings.optimizer.largest_lr
    return None if lr is None else lr * settings.router.lr_scale


def assemble(
    settings: TrainMoeSettings, base: Base, data: recipe.RunData, taxonomy: Taxonomy, frozen: BaseLoras,
    device: torch.device, offload: NoiseExpertOffload, memory: TrainingMemory,
) -> tuple[Mixture, dict[NoiseExpert, WanBackbone], dict[NoiseExpert, Adapter]]:
    """Load the noise experts, and attach the experts of a new mixture to them."""
    noise_experts = list(data.noise_experts)
    spec = MixtureSpec(
        families=taxonomy.keys, taxonomy=taxonomy.to_dict(), task=base.task, text_dim=base.text_dim,
        bands={e: (base.bands[e].low, base.bands[e].high) for e in noise_experts},
        router=settings.router.kind, router_temperature=settings.router.temperature, top_k=settings.router.top_k,
        knots=settings.timestep_gate.knots, flow_shift=base.spec.flow_shift, steps=base.spec.defaults.steps,
        base={e: base.fingerprint(e) for e in noise_experts},
        base_lora={e: {"path": str(path), "fingerprint": state.fingerprint()}
                   for e, (path, state) in frozen.items() if e in noise_experts},
        router_sigma=settings.router.sigma, gate_ema=settings.router.gate_ema, shared_experts=settings.shared_experts,
    )
    backbones = {e: memory.load(settings, base, e, offload) for e in noise_experts}
    initial = {e: file.read_finite() for e, file in initial_loras(settings, base).items()}
    states = {
        e: {family: _initial_expert(settings, backbones[e].transformer, local_settings, e, family, initial.get(e))
            for family in taxonomy.keys}
        for e, local_settings in data.noise_experts.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.seed_of(settings.seed, "router"))
        mixture = Mixture(spec, states)
    mixture.to(device)
    adapters = {}
    for noise_expert, backbone in backbones.items():
        base_lora = frozen[noise_expert][1] if noise_expert in frozen else None
        groups = mixture.groups(noise_expert, base_lora, trainable=True)
        adapters[noise_expert] = attach(backbone.transformer, groups, gates_required=True)
    if settings.shared_experts:
        _share_parameters(adapters)
    for noise_expert, backbone in backbones.items():
        offload.add(noise_expert, backbone, adapters[noise_expert].adapter_tensors())
    return mixture, backbones, adapters


def _initial_expert(
    settings: TrainMoeSettings, transformer: torch.nn.Module, local_settings: NoiseExpertSettings,
    noise_expert: NoiseExpert, family: str, initial: AdapterState | None,
) -> AdapterState:
    targets = settings.targets_for(family, local_settings.targets)
    # Shared experts have one draw, whichever noise expert they are attached to first.
    key = "shared" if settings.shared_experts else noise_expert.value
    fresh = recipe.fresh_lora(
        transformer, local_settings.model_copy(update={"targets": targets}), settings.seed, key, family)
    return fresh if initial is None else started_from(fresh, initial)


def started_from(fresh: AdapterState, initial: AdapterState) -> AdapterState:
    """`initial` at the modules and ranks of `fresh`: the same ΔW, or its best approximation at a lower rank.

    A higher rank keeps A and B of `initial` and the remaining fresh rows of A, with B = 0. A lower rank keeps the
    largest singular values, as does any rank of a LoKr, LoHa or full delta. Modules that only `initial` has are left
    out, with a warning.
    """
    missing = [path for path in initial.entries if path not in fresh.entries]
    if missing:
        console.warn(f"init_lora has {len(missing)} modules that the experts do not have (such as {missing[0]}); its "
                     "changes there are left out; widen [targets] to keep them")
    entries: dict[str, WeightUpdate] = {}
    starts = _at_most(initial, {path: new.rank for path, new in fresh.low_rank("a fresh LoRA").items()})
    for path, new in fresh.low_rank("a fresh LoRA").items():
        if (old := starts.get(path)) is None:
            entries[path] = new
            continue
        down = torch.cat([old.down.to(new.down), new.down[old.rank :]])
        up = new.up.clone()
        up[:, : old.rank] = old.up.to(new.up) * (old.scale / new.scale)
        entries[path] = LowRank(down, up, new.alpha)
    return AdapterState(entries, dict(fresh.metadata))


def _at_most(initial: AdapterState, ranks: Mapping[str, int]) -> dict[str, LowRank]:
    """The updates at `ranks` as low-rank pairs of at most these ranks."""
    pairs: dict[str, LowRank] = {}
    larger: dict[int, dict[str, WeightUpdate]] = {}
    for path, rank in ranks.items():
        entry = initial.entries.get(path)
        if isinstance(entry, LowRank) and entry.rank <= rank:
            pairs[path] = entry
        elif entry is not None:
            larger.setdefault(rank, {})[path] = entry
    for rank, entries in larger.items():
        for path, pair in resize(AdapterState(entries), rank)[0].low_rank("init_lora").items():
            # Without singular values that are zero: a row of zeros in A and in B would get no gradient.
            sizes = pair.up.norm(dim=0)
            used = sizes > 1e-5 * sizes.max()
            if bool(used.any()):
                pairs[path] = LowRank(pair.down[used], pair.up[:, used], float(used.sum()))
    return pairs


def _share_parameters(adapters: Mapping[NoiseExpert, Adapter]) -> None:
    """Make the trained rows of all adapters the same parameters, those of the first adapter."""
    first, *others = adapters.values()
    for other in others:
        for path, layer in other.layers.items():
            layer.down_RI, layer.up_OR = first.layers[path].down_RI, first.layers[path].up_OR


def weights_of(settings: TrainMoeSettings, steps: int) -> MixtureWeights:
    """The weights of the objective for a run of `steps` steps."""
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
    """Load the noise experts, attach a new mixture to them, and make the trainer."""
    families, frozen = len(taxonomy.families), base_loras(settings, base)
    memory = memory or plan_mixture(settings, base, data, taxonomy, frozen, device)
    store = ClipStore(
        data.index, data.items, device, families, settings.roi_fallback == "motion", memory.keep_data)
    offload = NoiseExpertOffload(device, memory.both, memory.plan.streamed)
    mixture, backbones, adapters = assemble(settings, base, data, taxonomy, frozen, device, offload, memory)
    first = next(iter(data.noise_experts))
    metadata = recipe.provenance(settings, base, data, first)
    for key in ("lapwan.noise_expert", "lapwan.base_fingerprint", "modelspec.timestep_range"):
        metadata.pop(key, None)  # a mixture is for both noise experts; its spec has their fingerprints
    objective = MixtureObjective(
        mixture, backbones, adapters, weights_of(settings, len(data.schedule)), settings.name, metadata,
        store.empty_text() if settings.caption_dropout else None, recipe.dropout_rates(data),
    )
    parts = recipe.run_parts(
        settings, base, data, objective, store, memory, offload, "lapwan train-moe", distributed or Distributed())
    bases = {e: LoraUse(path, state, settings.alpha_base) for e, (path, state) in frozen.items()}
    adapter_set = AdapterSet(mixture=mixture, mixture_base=bases)
    callbacks = [ExpertGradients(adapters, settings.routing_watch.every),
                 *make_callbacks(settings, parts, base, data, device, adapter_set, taxonomy),
                 RoutingCallback(objective, settings)]
    return recipe.make_trainer(settings, parts, callbacks, memory.line, memory.plan.peak)
