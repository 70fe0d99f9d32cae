"""From settings to a LoRA run: the memory plan, the noise experts, a LoRA on each, the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.attach import Adapter, Group, attach
from lapwan.lora.state import low_rank_only
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.training import TrainingMemory, plan_training
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train import recipe
from lapwan.train.callbacks.build import make_callbacks
from lapwan.train.clip_store import ClipStore
from lapwan.train.lora.objective import LORA_GROUP, LoraObjective
from lapwan.train.parallel import Distributed
from lapwan.train.trainer import Trainer


def prepare(
    settings: TrainLoraSettings, base: Base, data: recipe.RunData, device: torch.device,
    distributed: Distributed | None = None, memory: TrainingMemory | None = None,
) -> Trainer:
    """Load the noise experts, attach a LoRA to each, and make the trainer."""
    memory = memory or plan_lora(settings, base, data, device)
    store = ClipStore(data.index, data.items, device, motion_regions=settings.roi_fallback == "motion",
                      keep_on_device=memory.keep_data)
    offload = NoiseExpertOffload(device, memory.both, memory.plan.streamed)
    backbones, adapters = {}, {}
    for noise_expert in data.noise_experts:
        backbone = backbones[noise_expert] = memory.load(settings, base, noise_expert, offload)
        adapters[noise_expert] = _adapter(settings, base, data, noise_expert, backbone.transformer)
        offload.add(noise_expert, backbone, adapters[noise_expert].adapter_tensors())
    metadata = {e: recipe.provenance(settings, base, data, e) for e in data.noise_experts}
    objective = LoraObjective(
        backbones, adapters, metadata, settings.roi_weight,
        store.empty_text() if settings.caption_dropout else None, recipe.dropout_rates(data),
        lora_names(settings, base.spec, list(data.noise_experts)),
    )
    parts = recipe.run_parts(
        settings, base, data, objective, store, memory, offload, "lapwan train-lora", distributed or Distributed())
    callbacks = make_callbacks(settings, parts, base, data, device)
    return recipe.make_trainer(settings, parts, callbacks, memory.line, memory.plan.peak)


def lora_names(settings: TrainLoraSettings, spec: ModelSpec, noise_experts: Sequence[NoiseExpert]) -> list[str]:
    """The files a run saves: one for each noise expert, or one for both."""
    if settings.one_file:
        return [f"{settings.name}.safetensors"]
    return [f"{settings.name}{spec.file_suffix(noise_expert)}.safetensors" for noise_expert in noise_experts]


def initial_loras(settings: TrainLoraSettings, base: Base) -> dict[NoiseExpert, AdapterFile]:
    """The LoRAs to continue from, by noise expert.

    Raises:
        UserError: as `recipe.given_loras`, or one with other updates than low-rank pairs, which cannot be trained.
    """
    files = recipe.given_loras(settings.init_lora, base, settings.key_rule)
    for noise_expert, file in files.items():
        low_rank_only(file.modules, f"init_lora.{noise_expert.value} = {file.path}")
    return files


def plan_lora(
    settings: TrainLoraSettings, base: Base, data: recipe.RunData, device: torch.device, dry_run: bool = False,
    processes: int = 1,
) -> TrainingMemory:
    """The memory plan; with `init_lora`, modules and ranks are those of its files."""
    initial = initial_loras(settings, base)
    ranks = {noise_expert: [file.ranks("init_lora")] for noise_expert, file in initial.items()}
    return plan_training(settings, base, recipe.workload(data, base, ranks), device, dry_run, processes)


def _adapter(
    settings: TrainLoraSettings, base: Base, data: recipe.RunData, noise_expert: NoiseExpert, transformer: nn.Module
) -> Adapter:
    if (file := initial_loras(settings, base).get(noise_expert)) is not None:
        state = replace(file.read_finite(), metadata={})
    else:
        state = recipe.fresh_lora(transformer, data.noise_experts[noise_expert], settings.seed, noise_expert.value)
    return attach(transformer, [Group(LORA_GROUP, state, trainable=True)])
