"""From settings to a preference-alignment run: what is loaded, what is trained, the rollout, the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapwan import console
from lapwan.errors import UserError
from lapwan.lora.attach import Group, attach, initial_state
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.srpo import SrpoMemory, recipe_of
from lapwan.models.base import Base, targets_of
from lapwan.models.device import pick_dtype
from lapwan.models.spec import ModelSpec
from lapwan.names import Band, NoiseExpert
from lapwan.rewards.base import Reward
from lapwan.settings.callbacks import HealthSettings
from lapwan.settings.optimizers import AdamWSettings
from lapwan.settings.rewards import reward_weights
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.callbacks.base import OnFirstProcess
from lapwan.train.callbacks.weight_figures import WeightFigures
from lapwan.train.lora.objective import LORA_GROUP
from lapwan.train.master_weights import MasterAdamW
from lapwan.train.objective import ParameterGroup, SigmaRule
from lapwan.train.optimizers import current_lr, make_optimizer, make_schedule
from lapwan.train.parallel import Distributed, shard
from lapwan.train.run_folder import PREVIEWS
from lapwan.train.schedule import SampleOrder, interleave
from lapwan.train.srpo.data import FEATURES_FILE, PromptStore, SrpoData, TextFeatures
from lapwan.train.srpo.held_out import FullWeightFigures, HeldOut, HeldOutRule
from lapwan.train.srpo.objective import AlignedNoiseExpert, Judges, PreferenceRule, SrpoObjective
from lapwan.train.srpo.rollout import Rollout, RolloutRule, rollout_steps
from lapwan.train.srpo.writer import AlignedModelWriter
from lapwan.train.trainer import Track, Trainer, TrainerPlan
from lapwan.wan.transformer.compile import compile_blocks, pays
from lapwan.wan.vae import load_vae
from lapwan.wan.vae_gradient import decode_frames, frame_choice

_BELOW = 1e-6  # the low-noise expert's band is open at the boundary: sigma equal to it is the high one's


def trained_noise_experts(settings: SrpoSettings, spec: ModelSpec) -> tuple[NoiseExpert, ...]:
    """The noise experts to train: as asked, else the low-noise one, else the only one.

    Raises:
        UserError: one that the model does not have.
    """
    if settings.noise_experts is None:
        return (spec.noise_experts[-1],)
    for noise_expert in settings.noise_experts:
        if noise_expert not in spec.noise_experts:
            have = [e.value for e in spec.noise_experts]
            raise UserError(f"experts holds '{noise_expert.value}', the model has {have}; set experts = {have}")
    return settings.noise_experts


def intervals(settings: SrpoSettings, spec: ModelSpec, noise_experts: Sequence[NoiseExpert]) -> dict[NoiseExpert, Band]:
    """The bounds cut to each trained noise expert's band.

    Raises:
        UserError: nothing is left, or less than `reach`.
    """
    low, high = settings.sigma
    found = {}
    for noise_expert in noise_experts:
        band = spec.bands[noise_expert]
        top = band.high - _BELOW if noise_expert is NoiseExpert.LOW else band.high
        own = Band(max(low, band.low), min(high, top))
        if own.low >= own.high:
            raise UserError(f"sigma = [{low:g}, {high:g}] lies outside the {noise_expert.value} noise expert's band {band}; "
                            f"choose bounds that meet it, or set experts")
        if own.high - own.low < settings.reach:
            raise UserError(f"sigma = [{low:g}, {high:g}] leaves [{own.low:g}, {own.high:g}] of the {noise_expert.value} "
                            f"noise expert's band, which is shorter than reach = {settings.reach:g}; widen the bounds "
                            "or lower reach")
        found[noise_expert] = own
    return found


def shares(settings: SrpoSettings, own: Mapping[NoiseExpert, Band]) -> dict[NoiseExpert, int]:
    """Steps by noise expert: in proportion to its part of the bounds, at least one."""
    total = sum(band.high - band.low for band in own.values())
    steps = {e: max(1, round(settings.steps * (band.high - band.low) / total)) for e, band in own.items()}
    last = list(steps)[-1]
    steps[last] = max(1, settings.steps - sum(n for e, n in steps.items() if e is not last))
    return steps


def preference_rule(settings: SrpoSettings, own: Mapping[NoiseExpert, Band]) -> PreferenceRule:
    """The numbers of the method."""
    p = settings.preference
    return PreferenceRule(
        interval=own, whole=Band(*settings.sigma), reach=settings.reach, branches=p.branches, positive=p.positive,
        negative=p.negative, discount_denoise=p.discount_denoise, discount_inversion=p.discount_inversion,
        margin=p.margin, kl_weight=settings.kl_weight, bins=settings.sigma_bins,
    )


@dataclass(frozen=True)
class JudgedFrames:
    """Latents to the frames that rewards look at; `rule` is all, first, or how many."""

    vae: Any
    rule: str | int

    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        stride = self.vae.config.scale_factor_temporal
        frames = (latents_BCTHW.shape[2] - 1) * stride + 1
        return decode_frames(self.vae, latents_BCTHW, frame_choice(frames, self.rule))


@dataclass
class LoadedParts:
    """What a run is made of once it is loaded."""

    transformers: dict[NoiseExpert, Any]
    trained: dict[NoiseExpert, AlignedNoiseExpert]
    offload: NoiseExpertOffload
    vae: Any
    judges: Judges


def loaded_noise_experts(settings: SrpoSettings, spec: ModelSpec, noise_experts: Sequence[NoiseExpert]) -> list[NoiseExpert]:
    """All noise experts that take part: offline without held-out prompts the trained ones alone."""
    needed = not settings.rollout.offline or settings.held_out.count > 0
    return [e for e in spec.noise_experts if needed or e in noise_experts]


def load_parts(
    settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert], data: SrpoData, memory: SrpoMemory,
    rewards: Mapping[str, Reward], device: torch.device, processes: int = 1,
) -> LoadedParts:
    """Load the noise experts, put LoRAs on the trained ones or let their weights be trained, and the judges.

    Raises:
        UserError: bf16 masters of a model that computes in fp32.
    """
    dtype = pick_dtype(settings.dtype, device)
    if settings.train == "full" and settings.master_weights == "bf16" and dtype != torch.bfloat16:
        raise UserError("master_weights = \"bf16\" updates the model's own tensors, but dtype makes them fp32; set "
                        "dtype = \"bf16\", or master_weights = \"fp32\"")
    sharded, spec = settings.train == "full" and processes > 1, base.spec
    offload = NoiseExpertOffload(device, memory.both)
    transformers, trained = {}, {}
    for noise_expert in loaded_noise_experts(settings, base.spec, noise_experts):
        console.log(f"loading the {noise_expert.value} noise expert")
        home = torch.device("cpu") if sharded else offload.load_on
        model = transformers[noise_expert] = base.load(noise_expert, dtype, home, recipe_of(settings), device)
        if noise_expert in noise_experts:
            if memory.checkpointing:
                model.enable_gradient_checkpointing()
            model.requires_grad_(settings.train == "full")
        if sharded:
            shard(model, processes, device)
        if noise_expert in noise_experts:
            trained[noise_expert] = _trained(settings, model, noise_expert)
        adapter = trained[noise_expert].adapter if noise_expert in trained else attach(model, [])
        if adapter is not None:
            offload.add({noise_expert: adapter})
        if not sharded:
            size = spec.latent_shape(*data.bucket)[1:]
            steps = settings.steps * settings.accumulate * settings.batch_size
            auto = settings.compile == "auto" and (
                pays(model, size, evaluations(settings, spec, noise_expert), training=False)
                or (noise_expert in noise_experts and pays(model, size, steps, training=True)))
            compile_blocks(model, auto or settings.compile == "on")
    vae = load_vae(base.spec, getattr(torch, settings.vae_dtype), device)
    frames = JudgedFrames(vae, settings.preference.frames)
    return LoadedParts(transformers, trained, offload, vae, Judges(rewards, reward_weights(settings.rewards), frames))


def _trained(settings: SrpoSettings, model: Any, noise_expert: NoiseExpert) -> AlignedNoiseExpert:
    if settings.train == "full":
        return AlignedNoiseExpert(model, dict(model.named_parameters()))
    ranks = targets_of(settings.targets, len(model.blocks))
    state = initial_state(model, ranks, settings.alpha, settings.seed, noise_expert.value)
    adapter = attach(model, [Group(LORA_GROUP, state, trainable=True)])
    parameters = adapter.parameters()
    if settings.master_weights == "bf16":
        for parameter in parameters.values():
            parameter.data = parameter.data.bfloat16()
    return AlignedNoiseExpert(model, parameters, adapter)


def optimizers_of(settings: SrpoSettings, objective: SrpoObjective) -> dict[str, torch.optim.Optimizer]:
    """One a noise expert; our own AdamW where masters are bf16 or lie on the CPU, or where all weights are trained."""
    found: dict[str, torch.optim.Optimizer] = {}
    own = settings.train == "full" or settings.master_weights == "bf16" or settings.optimizer_on_cpu
    for name, groups in objective.optimised.items():
        if own and isinstance(settings.optimizer, AdamWSettings):
            found[name] = MasterAdamW(_by_factor(groups, settings.optimizer), settings.optimizer,
                                      settings.master_weights, settings.optimizer_on_cpu, settings.seed)
        else:
            found[name] = make_optimizer(settings.optimizer, groups)
    return found


def _by_factor(groups: Sequence[ParameterGroup], optimizer: AdamWSettings) -> list[dict[str, Any]]:
    ratio, parts = optimizer.lora_plus, []
    for group in groups:
        up = [p for n, p in group.parameters.items() if n.endswith(".up")] if ratio != 1 else []
        rest = [p for n, p in group.parameters.items() if ratio == 1 or not n.endswith(".up")]
        parts += [{"params": own, "lr": optimizer.lr * group.lr_scale * factor}
                  for own, factor in ((rest, 1.0), (up, ratio)) if own]
    return parts


def evaluations(settings: SrpoSettings, spec: ModelSpec, noise_expert: NoiseExpert) -> int:
    """How many samples' velocities the run's rollouts ask of a noise expert."""
    own = settings.rollout
    if own.offline:
        return 0
    steps, _ = rollout_steps(spec, RolloutRule(own.steps, own.guidance, own.flow_shift))
    share = sum(step.noise_expert is noise_expert for step in steps) * (2 if own.guidance > 1 else 1)
    return share * settings.steps * settings.accumulate * settings.batch_size


def prepare(
    settings: SrpoSettings, base: Base, data: SrpoData, rewards: Mapping[str, Reward], memory: SrpoMemory,
    device: torch.device, distributed: Distributed | None = None,
) -> Trainer:
    """Load everything and wire the trainer.

    Raises:
        UserError: fewer batches a step than processes.
    """
    distributed, spec = distributed or Distributed(), base.spec
    if settings.accumulate % distributed.count:
        raise UserError(f"accumulate = {settings.accumulate} batches a step cannot be dealt out evenly to "
                        f"{distributed.count} processes; set it to a multiple of {distributed.count}")
    noise_experts = trained_noise_experts(settings, spec)
    own = intervals(settings, spec, noise_experts)
    store = PromptStore(data, spec, encode_prompts(settings, data, spec, device, distributed), device)
    if settings.train == "full" and distributed.count > 1 and settings.ema_decay is not None:
        raise UserError("ema_decay with a full fine-tune on several processes would keep a second copy in parts, which "
                        "is not there; leave ema_decay out")
    parts = load_parts(settings, base, noise_experts, data, memory, rewards, device, distributed.count)
    writer = AlignedModelWriter(settings, base, data, parts.trained, own)
    objective = SrpoObjective(parts.trained, parts.judges, preference_rule(settings, own), writer)
    trainer = Trainer(_plan(settings, base, data, objective, store, distributed, own), objective)
    trainer.plan.before_turn, trainer.plan.memory = parts.offload.turn, memory.line
    trainer.plan.before_save = writer.gather
    trainer.plan.callbacks_on_all_processes = settings.train == "full" and distributed.count > 1
    if not data.offline:
        trainer.plan.complete = _rollout(settings, spec, parts, store)
    _watch(trainer, objective, settings, base, data, parts, store)
    return trainer


def encode_prompts(
    settings: SrpoSettings, data: SrpoData, spec: ModelSpec, device: torch.device, distributed: Distributed
) -> TextFeatures:
    """Text features of all prompts, the empty and the negative one, once; by the first process."""
    features = TextFeatures(settings.prompts.features or settings.output / FEATURES_FILE)
    if data.index is None:
        if distributed.first:
            features.ensure([*data.captions, *data.held_out, "", data.negative], spec, device)
        distributed.any(False)  # the file is there before anybody reads it
    return features


def _rollout(settings: SrpoSettings, spec: ModelSpec, parts: LoadedParts, store: PromptStore) -> Rollout:
    own = settings.rollout
    rule = RolloutRule(own.steps, own.guidance, own.flow_shift)
    return Rollout(spec, rule, parts.transformers, parts.offload.turn, store.negative() if own.guidance > 1 else None)


def _plan(
    settings: SrpoSettings, base: Base, data: SrpoData, objective: SrpoObjective, store: PromptStore, distributed: Distributed,
    own: Mapping[NoiseExpert, Band],
) -> TrainerPlan:
    optimizers = optimizers_of(settings, objective)
    steps = shares(settings, own)
    schedule = interleave(steps, settings.turn)
    lr_schedules = {name: make_schedule(settings.schedule, one, schedule.count(NoiseExpert(name)))
                    for name, one in optimizers.items()}
    buckets = [item.bucket for item in data.items] if data.offline else [data.bucket] * len(data.ids)
    tracks = {
        e: Track(SampleOrder(buckets, settings.batch_size, settings.seed, e.value), SigmaRule(band=band))
        for e, band in own.items()
    }
    identity = data.identity | {f"base.{e.value}": base.fingerprint(e) for e in base.spec.noise_experts}
    return TrainerPlan(
        run=settings.output, schedule=schedule, tracks=tracks, optimizers=optimizers, lr_schedules=lr_schedules,
        load_batch=store.batch, item_ids=data.ids, seed=settings.seed, accumulate=settings.accumulate,
        max_grad_norm=settings.max_grad_norm, ema_decay=settings.ema_decay, save_every=settings.save_every,
        log_every=settings.log_every, sigma_bins=settings.sigma_bins, keep_last=settings.keep_last,
        keep_best=settings.keep_best, resume_command="lapwan srpo --resume", identity=identity,
        changes_allowed=settings.allow_changed, distributed=distributed,
    )


def _watch(
    trainer: Trainer, objective: SrpoObjective, settings: SrpoSettings, base: Base, data: SrpoData, parts: LoadedParts,
    store: PromptStore,
) -> None:
    """Held-out prompts and figures of the weights, in the first process."""
    plan, wanted, spec = trainer.plan, settings.held_out, base.spec
    if not plan.distributed.first and not plan.callbacks_on_all_processes:
        trainer.callbacks["weights"] = OnFirstProcess(wanted.every)
        if data.held_out:
            trainer.callbacks["held_out"] = OnFirstProcess(wanted.every)
        return
    if settings.train == "lora":
        trainer.callbacks["weights"] = WeightFigures(
            objective.adapters, lambda: {e.value: float(current_lr(plan.optimizers[e.value])) for e in parts.trained},
            lambda: {e.value: track.steps for e, track in plan.tracks.items()}, wanted.every, HealthSettings())
    else:
        trainer.callbacks["weights"] = FullWeightFigures(
            objective, lambda e: base.load(e, pick_dtype(settings.dtype, parts.offload.device)), wanted.every)
    if not data.held_out:
        return
    frames, height, width = data.bucket
    size = wanted.size or (height, width)
    guidance = settings.rollout.guidance if wanted.guidance is None else wanted.guidance
    rule = RolloutRule(wanted.steps or settings.rollout.steps, guidance, settings.rollout.flow_shift)
    rollout = Rollout(spec, rule, parts.transformers, parts.offload.turn, store.negative() if guidance > 1 else None)
    trainer.callbacks["held_out"] = HeldOut(
        objective, rollout, store.held_out(), parts.vae,
        HeldOutRule(wanted.every, wanted.images, wanted.patience,
                    spec.latent_shape(wanted.num_frames or frames, *size), spec.defaults.fps, settings.batch_size),
        settings.output / PREVIEWS, settings.held_out_seed, parts.offload.turn)


def flops(settings: SrpoSettings, spec: ModelSpec, parameters: int, bucket: tuple[int, int, int]) -> float:
    """Operations of an optimizer step: 2 a parameter, token and evaluation, of which a backward counts two."""
    _, t, h, w = spec.latent_shape(*bucket)
    patch = spec.pixel_multiple // spec.spatial_stride
    tokens = t * (h // patch) * (w // patch)
    rollout = 0 if settings.rollout.offline else settings.rollout.steps * (2 if settings.rollout.guidance > 1 else 1)
    return 2.0 * parameters * tokens * (rollout + 3) * settings.batch_size * settings.accumulate

