"""From settings to a preference-alignment run: load the models, choose what is trained, build rollout and trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwan import console
from lapwan.errors import UserError
from lapwan.lora.attach import Group, attach, initial_state
from lapwan.lora.formats import write_lora
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.srpo import SrpoMemory, frozen_recipe
from lapwan.models.base import Base, target_ranks
from lapwan.models.device import pick_dtype
from lapwan.models.spec import ModelSpec
from lapwan.names import Band, NoiseExpert
from lapwan.report.page import VideoRow
from lapwan.rewards.base import Reward, select_frames
from lapwan.settings.callbacks import HealthSettings
from lapwan.settings.rewards import reward_weights
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.callbacks.base import Callback
from lapwan.train.callbacks.build import weight_figures
from lapwan.train.callbacks.run_page import RunPage
from lapwan.train.ema import Ema
from lapwan.train.lora.objective import LORA_GROUP
from lapwan.train.objective import SigmaRule
from lapwan.train.optimizers import MasterWeights, ScheduledOptimizer, make_optimizer, make_schedule
from lapwan.train.parallel import Distributed, full_tensors, is_sharded, shard
from lapwan.train.recipe import RunParts, make_trainer, settings_hash
from lapwan.train.run_folder import PREVIEWS, resume_command
from lapwan.train.sample_order import SampleOrder
from lapwan.train.schedule import interleave
from lapwan.train.srpo.data import FEATURES_FILE, PromptStore, SrpoData, TextFeatures
from lapwan.train.srpo.held_out import FullWeightFigures, HeldOut, HeldOutRule
from lapwan.train.srpo.objective import AlignedNoiseExpert, PreferenceRule, RewardModels, SrpoObjective
from lapwan.train.srpo.plan import (
    intervals,
    loaded_noise_experts,
    rollout_evaluations,
    steps_by_noise_expert,
    trained_noise_experts,
)
from lapwan.train.srpo.rollout import Rollout, RolloutRule
from lapwan.train.trainer import Trainer
from lapwan.train.training_data import DataStream, TrainingData
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.transformer.compile import worth_compiling
from lapwan.wan.vae import decode_frames, load_vae


def preference_rule(settings: SrpoSettings, bands: Mapping[NoiseExpert, Band]) -> PreferenceRule:
    """The constants of the method, from the settings."""
    p = settings.preference
    return PreferenceRule(
        interval=bands, whole=Band(*settings.sigma), reach=settings.reach, branches=p.branches, positive=p.positive,
        negative=p.negative, discount_denoise=p.discount_denoise, discount_inversion=p.discount_inversion,
        margin=p.margin, kl_weight=settings.kl_weight, bins=settings.sigma_bins,
    )


@dataclass(frozen=True)
class FrameDecoder:
    """Decodes latents to the frames that rewards score; `rule` is "all", "first", or a number of frames."""

    vae: Any
    rule: str | int

    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        stride = self.vae.config.scale_factor_temporal
        frames = (latents_BCTHW.shape[2] - 1) * stride + 1
        return decode_frames(self.vae, latents_BCTHW, select_frames(frames, self.rule))


@dataclass
class LoadedParts:
    """The loaded models of a run, on their devices."""

    backbones: dict[NoiseExpert, WanBackbone]
    trained: dict[NoiseExpert, AlignedNoiseExpert]
    offload: NoiseExpertOffload
    vae: Any
    reward_models: RewardModels


def load_parts(
    settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert], data: SrpoData, memory: SrpoMemory,
    rewards: Mapping[str, Reward], device: torch.device, processes: int = 1,
) -> LoadedParts:
    """Load the noise experts, attach LoRAs to the trained ones or unfreeze their weights, and load the VAE.

    Raises:
        UserError: bf16 master weights with a model that computes in fp32.
    """
    dtype = pick_dtype(settings.dtype, device)
    if settings.train == "full" and settings.master_weights == "bf16" and dtype != torch.bfloat16:
        raise UserError("master_weights = \"bf16\" updates the model's tensors directly, but dtype makes them fp32; "
                        "set dtype = \"bf16\", or master_weights = \"fp32\"")
    sharded, spec = settings.train == "full" and processes > 1, base.spec
    offload = NoiseExpertOffload(device, memory.both)
    backbones, trained = {}, {}
    for noise_expert in loaded_noise_experts(settings, base.spec, noise_experts):
        console.log(f"loading the {base.spec.title_of(noise_expert)}")
        load_device = torch.device("cpu") if sharded else offload.load_device
        backbone = backbones[noise_expert] = base.load(
            noise_expert, dtype, load_device, frozen_recipe(settings), device,
            to_host=None if sharded else offload.to_host)
        model = backbone.transformer
        if noise_expert in noise_experts:
            backbone.checkpoint("block" if memory.checkpointing else "off")
            model.requires_grad_(settings.train == "full")
        if sharded:
            shard(backbone, processes, device)
        if noise_expert in noise_experts:
            trained[noise_expert] = _trained(settings, backbone, noise_expert)
        adapter = trained[noise_expert].adapter if noise_expert in trained else None
        if adapter is not None or noise_expert not in trained:
            offload.add(noise_expert, backbone, () if adapter is None else adapter.adapter_tensors())
        if not sharded:
            size = spec.latent_shape(*data.bucket)[1:]
            steps = settings.steps * settings.accumulate * settings.batch_size
            auto = settings.compile == "auto" and (
                worth_compiling(model, size, rollout_evaluations(settings, spec, noise_expert), training=False)
                or (noise_expert in noise_experts and worth_compiling(model, size, steps, training=True)))
            backbone.compile(auto or settings.compile == "on")
    vae = load_vae(base.spec, getattr(torch, settings.vae_dtype), device)
    decoder = FrameDecoder(vae, settings.preference.frames)
    reward_models = RewardModels(rewards, reward_weights(settings.rewards), decoder)
    return LoadedParts(backbones, trained, offload, vae, reward_models)


def _trained(settings: SrpoSettings, backbone: WanBackbone, noise_expert: NoiseExpert) -> AlignedNoiseExpert:
    model = backbone.transformer
    if settings.train == "full":
        return AlignedNoiseExpert(backbone, dict(model.named_parameters()))
    ranks = target_ranks(settings.targets, len(model.blocks))
    state = initial_state(model, ranks, settings.alpha, settings.seed, noise_expert.value)
    adapter = attach(model, [Group(LORA_GROUP, state, trainable=True)])
    parameters = adapter.parameters()
    if settings.master_weights == "bf16":
        for parameter in parameters.values():
            parameter.data = parameter.data.bfloat16()
    return AlignedNoiseExpert(backbone, parameters, adapter)


def optimizers_of(settings: SrpoSettings, objective: SrpoObjective) -> dict[str, torch.optim.Optimizer]:
    """One per noise expert; master weights for bf16 masters, optimizer state on the CPU, or a full fine-tune."""
    master = None
    if settings.train == "full" or settings.master_weights == "bf16" or settings.optimizer_on_cpu:
        master = MasterWeights(settings.master_weights, settings.optimizer_on_cpu, settings.seed)
    return {name: make_optimizer(settings.optimizer, groups, master)
            for name, groups in objective.parameter_groups.items()}


def prepare(
    settings: SrpoSettings, base: Base, data: SrpoData, rewards: Mapping[str, Reward], memory: SrpoMemory,
    device: torch.device, distributed: Distributed | None = None,
) -> Trainer:
    """Load all models and build the trainer.

    Raises:
        UserError: batches of a step that cannot be divided among the processes, or EMA of sharded weights.
    """
    distributed, spec = distributed or Distributed(), base.spec
    distributed.check_accumulate(settings.accumulate)
    noise_experts = trained_noise_experts(settings, spec)
    bands = intervals(settings, spec, noise_experts)
    store = PromptStore(data, spec, encode_prompts(settings, data, spec, device, distributed), device)
    if settings.train == "full" and distributed.count > 1 and settings.ema_decay is not None:
        raise UserError("ema_decay with a full fine-tune on several processes is not supported: the weights are "
                        "sharded; leave ema_decay out")
    loaded = load_parts(settings, base, noise_experts, data, memory, rewards, device, distributed.count)
    writer = AlignedModelWriter(settings, base, len(data.captions), loaded.trained, bands)
    rule = RolloutRule(settings.rollout.steps, settings.rollout.guidance, settings.rollout.flow_shift)
    rollout = None if data.offline else _rollout(rule, spec, loaded, store)
    objective = SrpoObjective(loaded.trained, loaded.reward_models, preference_rule(settings, bands), writer, rollout)
    parts = _run_parts(settings, base, data, objective, store, loaded.offload, distributed, bands)
    callbacks = [*_callbacks(settings, parts, objective, base, data, loaded, store), GatherShards(writer)]
    return make_trainer(settings, parts, callbacks, memory.line)


def encode_prompts(
    settings: SrpoSettings, data: SrpoData, spec: ModelSpec, device: torch.device, distributed: Distributed
) -> TextFeatures:
    """Text features of all prompts, the empty and the negative one; the first process encodes what is missing."""
    features = TextFeatures(settings.prompts.features or settings.output / FEATURES_FILE)
    if data.index is None:
        if distributed.first:
            features.ensure([*data.captions, *data.held_out, "", data.negative], spec, device)
        distributed.barrier()  # the file is complete before any process reads it
    return features


def _rollout(rule: RolloutRule, spec: ModelSpec, loaded: LoadedParts, store: PromptStore) -> Rollout:
    negative = store.negative() if rule.guidance > 1 else None
    return Rollout(spec, rule, loaded.backbones, loaded.offload.activate, negative)


def _run_parts(
    settings: SrpoSettings, base: Base, data: SrpoData, objective: SrpoObjective, store: PromptStore,
    offload: NoiseExpertOffload, distributed: Distributed, bands: Mapping[NoiseExpert, Band],
) -> RunParts:
    schedule = interleave(steps_by_noise_expert(settings, bands), settings.turn)
    optimizers = {
        name: ScheduledOptimizer(optimizer, make_schedule(
            settings.schedule, optimizer, schedule.count(NoiseExpert(name))))
        for name, optimizer in optimizers_of(settings, objective).items()
    }
    buckets = [item.bucket for item in data.items] if data.offline else [data.bucket] * len(data.ids)
    streams = {
        e: DataStream(SampleOrder(buckets, settings.batch_size, settings.seed, e.value), SigmaRule(band=band))
        for e, band in bands.items()
    }
    training_data = TrainingData(
        streams, store.batch, data.ids, settings.seed, settings.accumulate, distributed=distributed)
    identity = data.identity | {f"base.{e.value}": base.fingerprint(e) for e in base.spec.noise_experts}
    ema = None if settings.ema_decay is None else Ema(objective.parameters, settings.ema_decay)
    return RunParts(objective, training_data, optimizers, schedule, identity, offload, "lapwan srpo", distributed, ema)


def _callbacks(
    settings: SrpoSettings, parts: RunParts, objective: SrpoObjective, base: Base, data: SrpoData, loaded: LoadedParts,
    store: PromptStore,
) -> Iterator[Callback]:
    """Figures of the weights and held-out prompts; sharded weights are evaluated in all processes at once."""
    every, sharded = settings.held_out.every, settings.train == "full" and parts.distributed.count > 1
    if settings.train == "lora":
        yield weight_figures(parts, every, HealthSettings())
    else:
        yield FullWeightFigures(
            objective, lambda e: base.load(e, pick_dtype(settings.dtype, parts.offload.device)), every, sharded)
    if data.held_out:
        yield _held_out(settings, parts, objective, base.spec, data, loaded, store, sharded)
        if settings.held_out.images:
            yield _page(settings, parts, base.spec, data)


def _page(settings: SrpoSettings, parts: RunParts, spec: ModelSpec, data: SrpoData) -> RunPage:
    held_out = settings.held_out
    frames, height, width = data.bucket
    samples = {f"{n}": VideoRow(prompt, ()) for n, prompt in enumerate(data.held_out[: held_out.images])}
    shape = (held_out.num_frames or frames, held_out.size or (height, width), spec.defaults.fps)
    return RunPage(settings.output, samples, shape, held_out.every, len(parts.schedule),
                   resume_command(parts.command, settings.output))


def _held_out(
    settings: SrpoSettings, parts: RunParts, objective: SrpoObjective, spec: ModelSpec, data: SrpoData,
    loaded: LoadedParts, store: PromptStore, sharded: bool,
) -> HeldOut:
    held_out = settings.held_out
    frames, height, width = data.bucket
    size = held_out.size or (height, width)
    guidance = settings.rollout.guidance if held_out.guidance is None else held_out.guidance
    rollout_rule = RolloutRule(held_out.steps or settings.rollout.steps, guidance, settings.rollout.flow_shift)
    rule = HeldOutRule(
        held_out.every, held_out.images, held_out.patience,
        spec.latent_shape(held_out.num_frames or frames, *size), spec.defaults.fps, settings.batch_size)
    return HeldOut(
        objective, _rollout(rollout_rule, spec, loaded, store), store.held_out(), loaded.vae, rule,
        settings.output / PREVIEWS, settings.held_out_seed, parts.offload.activate, sharded)


class AlignedModelWriter:
    """Writes a LoRA file per trained noise expert, or its transformer folder after a full fine-tune."""

    def __init__(
        self, settings: SrpoSettings, base: Base, prompts: int, trained: Mapping[NoiseExpert, AlignedNoiseExpert],
        bands: Mapping[NoiseExpert, Band],
    ) -> None:
        self._settings, self._base, self._prompts, self._trained, self._bands = settings, base, prompts, trained, bands
        self._gathered: dict[NoiseExpert, dict[str, Tensor]] = {}

    def gather(self) -> None:
        """Gather sharded weights; must be called in every process before the first one writes."""
        self._gathered = {
            e: {name: value.contiguous() for name, value in full_tensors(dict(trained.parameters)).items()}
            for e, trained in self._trained.items() if any(is_sharded(p) for p in trained.parameters.values())
        }

    def __call__(self, folder: Path, step: int) -> list[Path]:
        paths = []
        for noise_expert, trained in self._trained.items():
            if trained.adapter is None:
                path = folder / noise_expert.component
                self._write_transformer(path, noise_expert)
            else:
                path = folder / f"{self._settings.name}{self._base.spec.file_suffix(noise_expert)}.safetensors"
                metadata = {**self._metadata(noise_expert), "lapwan.step": str(step)}
                write_lora(path, replace(trained.adapter.state(LORA_GROUP), metadata=metadata))
            paths.append(path)
        return paths

    def _write_transformer(self, path: Path, noise_expert: NoiseExpert) -> None:
        """A component folder in diffusers' layout: config, and weights in shards of at most 10 GB."""
        from huggingface_hub import save_torch_state_dict

        transformer = self._trained[noise_expert].backbone.transformer
        path.mkdir(parents=True)
        transformer.save_config(path)
        state = self._gathered.get(noise_expert) or dict(transformer.state_dict())
        save_torch_state_dict(state, path, filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
                              max_shard_size="10GB", metadata={"format": "pt"})

    def _metadata(self, noise_expert: NoiseExpert) -> dict[str, str]:
        band, base = self._bands[noise_expert], self._base
        return {
            **base.metadata(noise_expert), "lapwan.prompts": str(self._prompts),
            "lapwan.rewards": ", ".join(reward_weights(self._settings.rewards)),
            "lapwan.seed": str(self._settings.seed), "lapwan.settings": settings_hash(self._settings),
            "modelspec.timestep_range": f"{1000 * band.low:g},{1000 * band.high:g}",
            "modelspec.title": self._settings.name + base.spec.file_suffix(noise_expert),
        }


class GatherShards(Callback):
    """Gathers sharded weights before the first process writes them."""

    name = "gather_shards"

    def __init__(self, writer: AlignedModelWriter) -> None:
        self._writer = writer

    def before_save(self) -> None:
        self._writer.gather()
