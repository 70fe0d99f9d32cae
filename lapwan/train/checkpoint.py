"""A run's checkpoints: `step_000100/` with the adapter files and, apart from them, `state/` for resuming.

Written to a temporary name and renamed, so a killed run leaves whole checkpoints only. The newest adapter files are
hard-linked into the run folder itself.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lapwan import files
from lapwan.errors import UserError
from lapwan.train.objective import Objective

_NAME = re.compile(r"^step_(\d+)$")
_TRAINED, _REST = "trained.safetensors", "rest.pt"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of a run, oldest first."""
    found = [(int(match[1]), p) for p in run.glob("step_*") if (match := _NAME.match(p.name)) and p.is_dir()]
    return sorted(found)


def save(run: Path, step: int, objective: Objective, parameters: Mapping[str, nn.Parameter], rest: dict[str, Any],
         keep_last: int | None) -> Path:
    """Write checkpoint `step`, link the run's adapter files to it, drop checkpoints before the last `keep_last`."""
    folder = run / f"step_{step:06d}"
    with files.atomic_folder(folder) as temporary:
        adapters = objective.save(temporary, step)
        state = temporary / "state"
        state.mkdir()
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, state / _TRAINED)
        torch.save(rest, state / _REST)
    for adapter in adapters:
        _link(folder / adapter.name, run / adapter.name)
    if keep_last is not None:
        for _, old in checkpoints(run)[:-keep_last]:
            shutil.rmtree(old)
    return folder


def _link(source: Path, target: Path) -> None:
    """Replace `target` by a hard link to `source` (a copy where the file system has none), in one rename."""
    temporary = target.with_name(f".lapwan-tmp-link-{target.name}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy2(source, temporary)
    temporary.replace(target)


def load(folder: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Put a checkpoint's trained tensors into `parameters`, bit for bit, and return the rest.

    Raises:
        UserError: the checkpoint does not hold exactly these tensors, or is damaged.
    """
    state = folder / "state"
    try:
        trained = load_file(state / _TRAINED)
        # weights_only: a checkpoint is data, never code.
        rest: dict[str, Any] = torch.load(state / _REST, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot resume from {folder}: {error}; remove it to resume from an older one") from None
    missing, extra = sorted(set(parameters) - set(trained)), sorted(set(trained) - set(parameters))
    if missing or extra:
        raise UserError(f"cannot resume from {folder}: its tensors are not this run's (missing {missing[:3]}, "
                        f"extra {extra[:3]}); were targets or experts changed?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != trained[name].shape:
                raise UserError(f"cannot resume from {folder}: '{name}' has shape {list(trained[name].shape)}, this "
                                f"run's {list(parameter.shape)}; was a rank changed?")
            parameter.copy_(trained[name])
    return rest
