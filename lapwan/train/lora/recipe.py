"""From settings to a stage-1 run: the memory plan, the noise experts, a LoRA on each, the trainer."""

from __future__ import annotations

import torch
from torch import nn

from lapwan.lora.attach import Adapter, Group, attach
from lapwan.memory.offload import Parking
from lapwan.memory.training import TrainingMemory, plan_training
from lapwan.models.base import Base
from lapwan.names import NoiseExpert
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train import recipe
from lapwan.train.callbacks.build import add_watchers
from lapwan.train.clip_store import ClipStore
from lapwan.train.lora.objective import LORA_GROUP, LoraObjective
from lapwan.train.parallel import Ranks
from lapwan.train.trainer import Trainer


def prepare(
    settings: TrainLoraSettings, base: Base, data: recipe.RunData, device: torch.device, ranks: Ranks | None = None,
    memory: TrainingMemory | None = None,
) -> Trainer:
    """Load the noise experts, put a LoRA on each, and wire the trainer."""
    memory = memory or plan_lora(settings, base, data, device)
    store = ClipStore(data.index, data.items, device, motion_regions=settings.roi_fallback == "motion",
                      keep_on_device=memory.keep_data)
    parking = Parking(device, memory.both, memory.plan.streamed)
    adapters = {}
    for expert in data.experts:
        transformer = memory.load(settings, base, expert, parking.load_on, device)
        adapters[expert] = _adapter(settings, base, data, expert, transformer)
        parking.add({expert: adapters[expert]})
    objective = LoraObjective(
        adapters, settings.name, recipe.metadata_of(settings, base, data), settings.roi_weight,
        store.empty_text() if settings.caption_dropout else None, recipe.dropout_of(data), settings.one_file,
    )
    trainer = recipe.make_trainer(settings, base, data, objective, store, "lapwan train-lora", ranks or Ranks())
    recipe.use_memory(trainer, memory, parking)
    add_watchers(trainer, settings, base, data, device)
    return trainer


def plan_lora(
    settings: TrainLoraSettings, base: Base, data: recipe.RunData, device: torch.device, look: bool = False,
    processes: int = 1,
) -> TrainingMemory:
    """The memory plan; a LoRA that is gone on with brings its own modules and ranks."""
    given = recipe.initial_loras(settings.init_lora, base)
    ranks = {expert: [{path: module.rank for path, module in file.modules.items()}] for expert, file in given.items()}
    return plan_training(settings, base, recipe.workload(data, base, ranks), device, look, processes)


def _adapter(
    settings: TrainLoraSettings, base: Base, data: recipe.RunData, expert: NoiseExpert, transformer: nn.Module
) -> Adapter:
    if (file := recipe.initial_loras(settings.init_lora, base).get(expert)) is not None:
        state = file.read()
        state.metadata = {}
    else:
        state = recipe.fresh_lora(transformer, data.experts[expert], settings.seed, expert.value)
    return attach(transformer, [Group(LORA_GROUP, state, trainable=True)])
