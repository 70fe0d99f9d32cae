"""From the settings' `model` to the base an adapter is trained or used on."""

from __future__ import annotations

from lapwan.commands.model import refuse_generation_only, resolve
from lapwan.files import cache_root
from lapwan.lora.assign import assign
from lapwan.names import NoiseExpert
from lapwan.settings.model_files import BaseModelSettings, ModelFilesSettings
from lapwan.wan.base import Base
from lapwan.wan.folder import ModelSpec, Task, read_spec
from lapwan.wan.separate import make_folder


def resolve_base(
    model: str | BaseModelSettings | ModelFilesSettings, task: Task | None = None, generation: bool = False
) -> Base:
    """MODEL, or `{model, lora, multiplier}`: stage 1 merged in memory; `generation` as in `resolve`.

    Raises:
        UserError: no such model or LoRA, or a LoRA for the other noise expert.
    """
    if isinstance(model, str):
        return Base(resolve(model, task, generation))
    if isinstance(model, ModelFilesSettings):
        made = _from_files(model)
        if not generation:
            refuse_generation_only(made, model.transformer)
        return Base(made)
    spec = resolve(model.model, task, generation)
    requests = [(expert.value, path, model.multiplier) for expert, path in model.lora.items()]
    return Base(spec, assign(requests, spec.experts))


def _from_files(files: ModelFilesSettings) -> ModelSpec:
    given = {NoiseExpert.HIGH: files.high or files.transformer, NoiseExpert.LOW: files.low}
    transformers = {expert: path for expert, path in given.items() if path is not None}
    return read_spec(make_folder(
        cache_root(), transformers, files.vae, files.text_encoder, files.tokenizer, files.boundary, files.flow_shift
    ))
