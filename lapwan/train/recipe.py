"""From settings to a trainer: what the recipes of the stages share (data, schedule, optimizers, the trainer itself)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lapwan import console
from lapwan.caching.families import labels_in_order
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import load_index
from lapwan.checkpoints.fingerprints import json_fingerprint
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.assign import LoraRequest, assign
from lapwan.lora.attach import initial_state
from lapwan.lora.dropout import DropoutRates
from lapwan.lora.formats import KeyRule
from lapwan.lora.merge import plan_terms
from lapwan.lora.state import AdapterState
from lapwan.losses.sigmas import LogitNormal, Shifted, ShiftedBySize, SigmaSampler, Squeezed, Uniform, Weighting
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.training import ModuleRanks, TrainingMemory, Workload
from lapwan.models.base import Base, target_ranks
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import Band, NoiseExpert
from lapwan.settings.base import Settings
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train import NoiseExpertSettings, TrainSettings, split_evenly
from lapwan.train.callbacks.base import Callback
from lapwan.train.callbacks.run_page import RunPage
from lapwan.train.clip_store import ClipStore, cached_bytes, check_cache, sampling_weights, training_items
from lapwan.train.ema import Ema
from lapwan.train.objective import Objective, SigmaRule
from lapwan.train.optimizers import ScheduledOptimizer, make_optimizer, make_schedule
from lapwan.train.parallel import Distributed
from lapwan.train.run_folder import resume_command
from lapwan.train.sample_order import SampleOrder
from lapwan.train.schedule import interleave, one_after_the_other
from lapwan.train.trainer import Trainer
from lapwan.train.trainer_config import TrainerConfig
from lapwan.train.training_data import DataStream, TrainingData
from lapwan.wan.transformer.compile import CompileReport, worth_compiling

FIRST_FRAME = 0.5  # share of draws with a clean first frame, for models that generate with it and without


@dataclass(frozen=True)
class RunData:
    """The clips of a run, checked against the model, and each noise expert's own settings."""

    settings: TrainSettings
    index: CacheIndex
    items: list[CachedItem]
    noise_experts: dict[NoiseExpert, NoiseExpertSettings]

    def orders(self) -> dict[NoiseExpert, SampleOrder]:
        """The order of samples of each noise expert."""
        s = self.settings
        buckets = [item.bucket for item in self.items]
        weights = sampling_weights(self.items, s.data.balance)
        return {e: SampleOrder(buckets, s.batch_size, s.seed, e.value, weights) for e in self.noise_experts}

    @cached_property
    def schedule(self) -> list[NoiseExpert]:
        """The noise expert of every optimizer step."""
        s = self.settings
        if s.phases:
            phases = []
            for phase in s.phases:
                joint = split_evenly(phase.joint, len(self.noise_experts))
                phases.append({e: getattr(phase, e.value) + shared
                               for e, shared in zip(self.noise_experts, joint, strict=True)})
            return one_after_the_other(phases, s.turn)
        windows = {e: (settings.start, settings.stop) for e, settings in self.noise_experts.items()}
        return interleave({e: settings.steps for e, settings in self.noise_experts.items()}, s.turn, windows)

    def identity(self, base: Base) -> dict[str, str]:
        """Hashes of what the run is trained on: the clips with their captions and labels, and the base's weights."""
        items = [[i.id, i.bucket, i.caption, i.label, i.label_weights, i.repeats, i.fingerprints] for i in self.items]
        return {"clips": json_fingerprint(items)} | {f"base.{e.value}": base.fingerprint(e) for e in self.noise_experts}


def read_data(settings: TrainSettings, base: Base, taxonomy: Taxonomy | None = None) -> RunData:
    """Read the index of the cache and resolve the settings of each noise expert; no weights are loaded.

    Args:
        taxonomy: the one whose families labels are numbered by; None if they are not used.

    Raises:
        UserError: a cache that does not fit the model or the taxonomy, or a noise expert that the model does not have.
    """
    settings = for_model(settings, base.spec)
    first_frame_share(settings, base.spec)
    index = load_index(settings.data.cache, settings.data.labels)
    items = training_items(index, settings.data.split)
    if taxonomy is not None:
        items = labels_in_order(index, items, taxonomy)
    check_cache(index, base.spec, items)
    sampling_weights(items, settings.data.balance)  # to refuse clips without labels now, not at the first step
    per_epoch = SampleOrder([i.bucket for i in items], settings.batch_size, settings.seed, "").batches_per_epoch
    steps = max(1, math.ceil((settings.epochs or 1) * per_epoch / settings.accumulate))
    return RunData(settings, index, items, {e: settings.of(e, steps) for e in settings.noise_experts})


def workload(
    data: RunData, base: Base, trained: Mapping[NoiseExpert, Sequence[ModuleRanks]] | None = None,
    frozen: Mapping[NoiseExpert, ModuleRanks] | None = None,
) -> Workload:
    """What the memory plan needs to know of the run.

    Args:
        trained: ranks by module of what is trained, where that is not one LoRA on each noise expert's targets.
        frozen: ranks by module of the frozen LoRAs beside it.
    """
    defaults = {e: [target_ranks(settings.targets, base.num_layers)] for e, settings in data.noise_experts.items()}
    return Workload(
        max((item.bucket for item in data.items), key=math.prod), cached_bytes(data.index, data.items),
        min(data.schedule.count(e) for e in data.noise_experts),
        {e: (trained or {}).get(e) or ranks for e, ranks in defaults.items()}, frozen or {})


def given_loras(paths: Mapping[NoiseExpert, Path], base: Base, rule: KeyRule) -> dict[NoiseExpert, AdapterFile]:
    """LoRAs of the settings by noise expert, checked against the model's headers and for NaN and infinity.

    Args:
        paths: the files.
        base: the model.
        rule: what of a file may be dropped.

    Raises:
        UserError: a file that is not a LoRA, is for the other noise expert or another model, or is not finite.
    """
    requests = [LoraRequest(noise_expert.value, path, 1.0) for noise_expert, path in paths.items()]
    assigned = assign(requests, base.spec.noise_experts, rule, base.spec.one_transformer)
    for noise_expert, loras in assigned.items():
        plan_terms(weight_files(base.spec.component(noise_expert)), loras)
        for file, _ in loras:
            file.check_finite()
    return {noise_expert: file for noise_expert, [(file, _)] in assigned.items()}


def sigma_rule(settings: NoiseExpertSettings, band: Band, patch: int = 2) -> SigmaRule:
    """How a noise expert's sigmas are drawn and its loss is weighted; `patch`: latent pixels along a token's side."""
    s, weighting = settings.sigma, settings.weighting
    sampler: SigmaSampler
    match s.sampler:
        case "uniform":
            sampler = Uniform()
        case "logit_normal":
            sampler = LogitNormal(s.mean, s.std)
        case "sigmoid":
            sampler = LogitNormal(0.0, s.scale)
    if s.shift == "resolution":
        sampler = ShiftedBySize(sampler)
    elif s.shift != 1.0:
        sampler = Shifted(sampler, s.shift)
    if s.band == "squeeze":
        sampler = Squeezed(sampler, band.low, band.high)
    return SigmaRule(sampler, band, s.strata, Weighting(weighting.kind, weighting.gamma), patch)


def fresh_lora(transformer: Any, settings: NoiseExpertSettings, seed: int, *key: str) -> AdapterState:
    """A new LoRA on a noise expert's targets; its A is drawn by (seed, *key)."""
    ranks = target_ranks(settings.targets, len(transformer.blocks))
    return initial_state(transformer, ranks, settings.first_alpha, seed, *key)


def dropout_rates(data: RunData) -> dict[NoiseExpert, DropoutRates]:
    """The dropout rates of each noise expert."""
    return {e: DropoutRates(**settings.dropout.model_dump()) for e, settings in data.noise_experts.items()}


def for_model(settings: TrainSettings, spec: ModelSpec) -> TrainSettings:
    """The settings with the noise experts that the model has: both, the default, are all of them.

    Raises:
        UserError: a noise expert that the model does not have, or settings that one transformer has no use for.
    """
    if set(settings.noise_experts) != set(NoiseExpert) or set(spec.noise_experts) == set(NoiseExpert):
        check_noise_experts(settings.noise_experts, spec)
        return settings
    if keys := settings.keys_of_two():
        raise UserError(f"{' and '.join(keys)}: only for a model of two noise experts, but {spec.family.title} has one "
                        "transformer for all noise; leave it out")
    return settings.model_copy(update={"noise_experts": spec.noise_experts})


def first_frame_share(settings: TrainSettings, spec: ModelSpec) -> float:
    """The share of draws with a clean first frame; 0 where the model takes none.

    Raises:
        UserError: a share for a model that takes none.
    """
    if not spec.clean_first_frame:
        if settings.first_frame is not None:
            raise UserError(f"first_frame = {settings.first_frame:g} is for models that take a clean first frame in "
                            f"their latents (TI2V-5B), not for {spec.family.title}; leave it out")
        return 0.0
    return FIRST_FRAME if settings.first_frame is None else settings.first_frame


def check_noise_experts(noise_experts: Sequence[NoiseExpert], spec: ModelSpec) -> None:
    """Refuse to train a noise expert that the model does not have.

    Raises:
        UserError: one that it does not have.
    """
    for noise_expert in noise_experts:
        if noise_expert not in spec.noise_experts:
            available = [e.value for e in spec.noise_experts]
            raise UserError(f"noise_experts holds '{noise_expert.value}', the model has {available}; set "
                            f"noise_experts = {available}")


def settings_hash(settings: Settings) -> str:
    """sha256 of the resolved settings that decide the result, as 64 hex digits: tells which run made a file."""
    excluded = {"output", "resume", "allow_changed", "device", "memory", "compile", "tracker"}
    plain = settings.model_dump(mode="json", exclude=excluded)
    return json_fingerprint(plain)


def provenance(settings: TrainSettings, base: Base, data: RunData, noise_expert: NoiseExpert) -> dict[str, str]:
    """The metadata of an adapter file: what it was trained on and how."""
    band, trained = base.bands[noise_expert], data.noise_experts[noise_expert]
    lr = trained.optimizer.predicted_lr()
    return {
        **base.metadata(noise_expert),
        "lapwan.clips": str(len({item.id for item in data.items})),
        "lapwan.items": str(len(data.items)),
        "lapwan.seed": str(settings.seed),
        "lapwan.settings": settings_hash(settings),
        # What other tools show.
        "ss_base_model_version": base.spec.family.release,
        "ss_output_name": settings.name,
        "ss_seed": str(settings.seed),
        "ss_num_train_items": str(len(data.items)),
        "ss_max_train_steps": str(data.schedule.count(noise_expert)),
        "ss_optimizer": trained.optimizer.kind,
        "ss_lr_scheduler": trained.schedule.name,
        **({} if lr is None else {"ss_learning_rate": f"{lr:g}"}),
        "modelspec.timestep_range": f"{1000 * band.low:g},{1000 * band.high:g}",
        "modelspec.title": settings.name + base.spec.file_suffix(noise_expert),
    }


@dataclass(frozen=True)
class RunParts:
    """What the recipe of every stage makes from its settings, for callbacks and the trainer.

    Args:
        optimizers: by the names of the objective's parameter groups.
        schedule: the noise expert of every optimizer step.
        identity: hashes of what the run is trained on, checked on resume.
        offload: brings a noise expert to the device.
        command: what the user typed, such as "lapwan train-lora".
    """

    objective: Objective
    data: TrainingData
    optimizers: Mapping[str, ScheduledOptimizer]
    schedule: Sequence[NoiseExpert]
    identity: Mapping[str, str]
    offload: NoiseExpertOffload
    command: str
    distributed: Distributed
    ema: Ema | None = None


def run_parts(
    settings: TrainSettings, base: Base, data: RunData, objective: Objective, store: ClipStore,
    memory: TrainingMemory, offload: NoiseExpertOffload, command: str, distributed: Distributed,
) -> RunParts:
    """The parts of a flow-matching run: its optimizers and data streams follow each noise expert's own settings.

    Raises:
        UserError: batches a step that cannot be divided among the processes.
    """
    distributed.check_accumulate(settings.accumulate, ", or divide = \"tokens\"")
    optimizers = {}
    for name, groups in objective.parameter_groups.items():
        # What both noise experts share is stepped in every turn, with the settings of the run.
        shared = name not in [e.value for e in data.noise_experts]
        source: NoiseExpertSettings | TrainSettings = settings if shared else data.noise_experts[NoiseExpert(name)]
        optimizer = make_optimizer(source.optimizer, groups)
        steps = len(data.schedule) if shared else data.schedule.count(NoiseExpert(name))
        optimizers[name] = ScheduledOptimizer(optimizer, make_schedule(source.schedule, optimizer, max(1, steps)))
    streams = {
        noise_expert: DataStream(
            order, sigma_rule(data.noise_experts[noise_expert], base.bands[noise_expert], base.spec.patch))
        for noise_expert, order in data.orders().items()
    }
    training_data = TrainingData(
        streams, store.batch, [item.id for item in data.items], settings.seed, settings.accumulate,
        memory.micro_batch, settings.caption_dropout, distributed, first_frame_share(settings, base.spec))
    distributed.share_tokens(objective.backbones.values())
    _compile(settings, base, data, objective, distributed)
    ema = None if settings.ema_decay is None else Ema(objective.parameters, settings.ema_decay)
    return RunParts(objective, training_data, optimizers, data.schedule, data.identity(base), offload, command,
                    distributed, ema)


class Onload(Callback):
    """Brings the weights of the noise expert whose turn it is to the device."""

    name = "onload"

    def __init__(self, offload: NoiseExpertOffload) -> None:
        self.offload = offload

    def before_turn(self, noise_expert: NoiseExpert) -> None:
        self.offload.activate(noise_expert)


class CompileTimes(Callback):
    """Logs how long the blocks' graphs took to compile, after the step that compiled them."""

    name = "compile_times"

    def __init__(self) -> None:
        self._report = CompileReport()

    def after_backward(self, noise_expert: NoiseExpert) -> None:
        self._report.log()


def make_trainer(
    settings: TrainSettings | SrpoSettings, parts: RunParts, callbacks: Sequence[Callback], memory_summary: str,
    predicted_peak: int = 0,
) -> Trainer:
    """The trainer of a run.

    Args:
        callbacks: of the stage, besides those that bring weights to the device and log compilations.
        memory_summary: the memory plan in one line.
        predicted_peak: bytes on the device; 0: not predicted.
    """
    config = TrainerConfig(
        run_folder=settings.output, max_grad_norm=settings.max_grad_norm, save_every=settings.save_every,
        log_every=settings.log_every, sigma_bins=settings.sigma_bins, keep_last=settings.keep_last,
        keep_best=settings.keep_best, identity=parts.identity, allow_changed=settings.allow_changed,
        resume_command=resume_command(parts.command, settings.output), memory_summary=memory_summary,
        predicted_peak=predicted_peak, tracker=settings.tracker,
        skip_bad_clips=isinstance(settings, TrainSettings) and settings.data.on_bad_clip == "skip")
    return Trainer(
        parts.objective, parts.data, parts.schedule, parts.optimizers, config,
        [Onload(parts.offload), CompileTimes(), *callbacks], parts.ema, parts.distributed)


def _compile(
    settings: TrainSettings, base: Base, data: RunData, objective: Objective, distributed: Distributed
) -> None:
    """Compile the blocks of each noise expert: as `compile` asks, with "auto" where the run is long enough."""
    largest = max((base.spec.latent_shape(*item.bucket)[1:] for item in data.items), key=math.prod)
    for noise_expert, backbone in objective.backbones.items():
        clips = data.schedule.count(noise_expert) * settings.accumulate * settings.batch_size
        auto = settings.compile == "auto" and worth_compiling(
            backbone.transformer, largest, clips // distributed.context_parallel_size, training=True)
        backbone.compile(auto or settings.compile == "on")


def run_training(trainer: Trainer, settings: TrainSettings | SrpoSettings) -> bool:
    """Resume if asked, then train to the end; False if no step was left."""
    if settings.resume:
        if trainer.resume():
            console.log(f"resuming {settings.output} at step {trainer.step} of {len(trainer.schedule)}")
        else:
            console.log(f"{settings.output} has no checkpoint yet; starting at step 0")
    if trainer.step >= len(trainer.schedule):
        console.log(f"{settings.output} is complete: {trainer.step} steps; nothing to do")
        return False
    trainer.fit()
    page = trainer.callbacks.get(RunPage.name)
    if isinstance(page, RunPage) and trainer.distributed.first:
        page.finish(trainer.step)
    return True
