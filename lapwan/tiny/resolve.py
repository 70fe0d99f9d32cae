"""Resolve MODEL for commands and Python: as in `lapwan.models`, and `tiny` is the embedded model.

Importing this loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from lapwan.errors import UserError
from lapwan.models import resolve as models
from lapwan.models.spec import ModelSpec, Task, task_named
from lapwan.settings.model import BaseModelSettings, ModelFilesSettings

if TYPE_CHECKING:
    from lapwan.models.base import Base

TINY = "tiny"
Model = TypeVar("Model", str, BaseModelSettings, ModelFilesSettings, str | BaseModelSettings | ModelFilesSettings)


def with_tiny(model: Model, task: Task | None = None) -> Model:
    """`model`, with `tiny` (of `task`, by default t2v), `tiny-t2v` and `tiny-i2v` replaced by the embedded folder.

    Raises:
        UserError: another name that begins with `tiny-`.
    """
    if isinstance(model, BaseModelSettings):
        return model.model_copy(update={"model": with_tiny(model.model, task)})
    if not isinstance(model, str) or not (model == TINY or model.startswith(f"{TINY}-")):
        return model
    from lapwan.tiny.model import tiny_folder  # builds the folder on first use, with torch

    kind = task_named(model.removeprefix(TINY).removeprefix("-") or task or "t2v")
    if kind not in ("t2v", "i2v"):
        raise UserError(f"no embedded model '{model}'; there are tiny, tiny-t2v and tiny-i2v")
    return str(tiny_folder(kind))


def resolve(
    model: str | BaseModelSettings | ModelFilesSettings, task: Task | None = None
) -> ModelSpec:
    """`lapwan.models.resolve.resolve`, with `tiny`; of separate files, and of a base without its LoRAs, too."""
    if isinstance(model, ModelFilesSettings):
        return resolve_base(model, task).spec
    name = model if isinstance(model, str) else model.model
    return models.resolve(with_tiny(name, task), task)


def resolve_base(
    model: str | BaseModelSettings | ModelFilesSettings, task: Task | None = None
) -> Base:
    """`lapwan.models.base.resolve_base`, with `tiny`."""
    from lapwan.models import base

    return base.resolve_base(with_tiny(model, task), task)
