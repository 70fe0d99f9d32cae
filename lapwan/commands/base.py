"""From the settings' `model` to the base an adapter is trained or used on."""

from __future__ import annotations

from lapwan.commands.model import resolve
from lapwan.lora.assign import assign
from lapwan.settings.train import BaseModelSettings
from lapwan.wan.base import Base
from lapwan.wan.folder import Task


def resolve_base(model: str | BaseModelSettings, task: Task | None = None, generation: bool = False) -> Base:
    """MODEL, or `{model, lora, multiplier}`: stage 1 merged in memory; `generation` as in `resolve`.

    Raises:
        UserError: no such model or LoRA, or a LoRA for the other noise expert.
    """
    if isinstance(model, str):
        return Base(resolve(model, task, generation))
    spec = resolve(model.model, task, generation)
    requests = [(expert.value, path, model.multiplier) for expert, path in model.lora.items()]
    return Base(spec, assign(requests, spec.experts))
