"""`lapwan train-lora`: one LoRA for each noise expert, from one run."""

from __future__ import annotations

import torch

from lapwan import console
from lapwan.commands.base import resolve_base
from lapwan.commands.plan import index_task, print_plan
from lapwan.lora.attach import Adapter, Group, attach
from lapwan.names import NoiseExpert
from lapwan.settings.run import RunOptions
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train import build
from lapwan.train.data import ClipStore
from lapwan.train.device import pick_device, pick_dtype
from lapwan.train.lora_objective import LORA_GROUP, LoraObjective
from lapwan.train.trainer import Trainer
from lapwan.wan.base import Base


def run(settings: TrainLoraSettings, options: RunOptions) -> None:
    """Check everything, then train; `--dry-run` stops after the checks."""
    build.claim_run(settings, options.overwrite)
    base = resolve_base(settings.model, index_task(settings.data))
    data = build.read_data(settings, base)
    device = pick_device(settings.device)
    print_plan(settings, build.describe(settings, base, data), options)
    if options.dry_run:
        return
    build.start_folder(settings, options.overwrite)
    trainer = prepare(settings, base, data, device)
    if build.run_training(trainer, settings):
        for expert in data.experts:
            console.results.print(str(settings.output / f"{settings.name}_{expert.file_suffix}.safetensors"))


def prepare(settings: TrainLoraSettings, base: Base, data: build.RunData, device: torch.device) -> Trainer:
    """Load the noise experts, put a fresh LoRA on each, and wire the trainer."""
    store = ClipStore(data.index, data.items, device)
    adapters = {expert: _adapter(settings, base, data, expert, device) for expert in data.experts}
    objective = LoraObjective(
        adapters, settings.name, build.metadata_of(settings, base, data), settings.roi_weight,
        store.empty_text() if settings.caption_dropout else None,
    )
    return build.make_trainer(settings, base, data, objective, store, "lapwan train-lora")


def _adapter(
    settings: TrainLoraSettings, base: Base, data: build.RunData, expert: NoiseExpert, device: torch.device
) -> Adapter:
    transformer = base.load(expert, pick_dtype(settings.dtype, device), device)
    if settings.activation_checkpointing:
        transformer.enable_gradient_checkpointing()
    state = build.fresh_lora(transformer, data.experts[expert], settings.seed, expert.value)
    return attach(transformer, [Group(LORA_GROUP, state, trainable=True)])
