"""Checkpoints of a run: `step_000100/` with the adapter files and, apart from them, `state/` for resuming.

Written to a temporary name and renamed, so that a killed run leaves complete checkpoints only. The newest adapter
files are hard-linked into the run folder itself.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from lapwan import files
from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import DAMAGED, check_pickle, save_tensors
from lapwan.console import warn
from lapwan.documents import checked, parse_json, read_text
from lapwan.errors import UserError
from lapwan.temporaries import discard_folder, temporary_folder
from lapwan.train.parallel import local_tensor, shard_like

_NAME = re.compile(r"^step_(\d+)$")
_TRAINED, _REST, _SCORE = "trained.safetensors", "rest.pt", "score.json"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint of a run, oldest first."""
    return sorted(
        (int(match[1]), p) for p in run.glob("step_*") if (match := _NAME.match(p.name)) and p.is_dir())


def newest_resumable(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint with its state; newer ones without are named in a warning. None: the run
    has no checkpoint.

    Raises:
        UserError: as `check_resumable`.
    """
    check_resumable(run)
    for step, folder in reversed(checkpoints(run)):
        if (missing := _missing(folder)) is None:
            return step, folder
        warn(f"{folder} has no state/{missing} and cannot be resumed from: it was copied or removed in part")
    return None


def check_resumable(run: Path) -> None:
    """Refuse to resume a run whose checkpoints have all lost their state: it would begin at step 0 over their files.

    Raises:
        UserError: there are checkpoints, but none with its state.
    """
    folders = [folder for _, folder in checkpoints(run)]
    if folders and None not in map(_missing, folders):
        raise UserError(f"cannot resume {folders[-1]}: it has no state/{_missing(folders[-1])}, and no other "
                        "checkpoint has its state; copy it back, or start anew with --overwrite in place of --resume")


def _missing(folder: Path) -> str | None:
    """The file of its state that a checkpoint lacks."""
    return next((name for name in (_TRAINED, _REST) if not (folder / "state" / name).is_file()), None)


def link_adapters(folder: Path, run: Path) -> None:
    """Make the run folder's adapter files those of a checkpoint: a kill may have come between its rename and them."""
    for adapter in folder.iterdir():
        target = run / adapter.name
        if adapter.name != "state" and not (target.is_file() and target.samefile(adapter)):
            _link(adapter, target)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the `last` n and the n `best` by score; all if both are None.

    Args:
        score: of the checkpoint that is being written; lower is better.
    """

    last: int | None = None
    best: int | None = None
    score: float | None = None


def start_checkpoint(
    run: Path, step: int, write_adapters: Callable[[Path], list[Path]], parameters: Mapping[str, nn.Parameter],
    rest: dict[str, Any], retention: Retention,
) -> Callable[[], Path]:
    """Write the adapter files and copy all that the next step changes; the returned function finishes on any thread.

    It writes the state's files, syncs and renames, which is most of a checkpoint's time, then links the run's adapter
    files to the checkpoint and removes those that are not retained. Until the rename the checkpoint does not exist, so
    a kill in between leaves the older ones.
    """
    folder = run / f"step_{step:06d}"
    with ExitStack() as stack:
        temporary = stack.enter_context(files.atomic_folder(folder))
        adapters = write_adapters(temporary)
        trained = {name: _copy_to_cpu(p).contiguous() for name, p in parameters.items()}
        rest = _copy_tree_to_cpu(rest)
        rename_on_exit = stack.pop_all()

    def finish() -> Path:
        with rename_on_exit:
            state = temporary / "state"
            state.mkdir()
            save_tensors(trained, state / _TRAINED)
            torch.save(rest, state / _REST)
            if retention.score is not None:
                (state / _SCORE).write_text(json.dumps({"validation": retention.score}), encoding="utf-8")
        for adapter in adapters:
            _link(folder / adapter.name, run / adapter.name)
        _prune(run, retention)
        return folder

    return finish


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _copy_tree_to_cpu(tree: Any) -> Any:
    """Plain containers with every tensor copied to host memory; a tensor that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = _copy_to_cpu(value)
            return copies[id(value)]
        if isinstance(value, dict):
            return type(value)((key, copy(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        return value

    return copy(tree)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[Path] | None = None

    def start(self, finish: Callable[[], Path]) -> None:
        """Finish a checkpoint in the background; waits for the previous one.

        Raises:
            OSError: the previous one could not be written.
        """
        self.wait()
        self._last = self._pool.submit(finish)

    def wait(self) -> None:
        """Wait until the checkpoint that was started is on the disk.

        Raises:
            OSError: it could not be written.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _prune(run: Path, retention: Retention) -> None:
    if retention.last is None and retention.best is None:
        return
    folders = [folder for _, folder in checkpoints(run)]
    kept = set(folders[-(retention.last or 1):])  # always with the newest, which --resume needs
    if retention.best is not None:
        scores = {folder: value for folder in folders if (value := score(folder)) is not None}
        finite = sorted(value for value in scores.values() if math.isfinite(value))
        limit = finite[: retention.best][-1] if finite else -math.inf
        kept |= {folder for folder, value in scores.items() if value <= limit}
    for folder in folders:
        if folder not in kept:
            discard_folder(folder)


class CheckpointScore(BaseModel):
    """`state/score.json`; a validation that diverged is NaN."""

    validation: Annotated[float, Field(strict=True)]


def score(folder: Path) -> float | None:
    """The validation loss a checkpoint was saved with."""
    path = folder / "state" / _SCORE
    if not path.is_file():
        return None
    return checked(parse_json(read_text(path), path, non_finite=True), CheckpointScore, path).validation


def check_identity(folder: Path, saved: Mapping[str, str], current: Mapping[str, str], allow_changed: bool) -> None:
    """Refuse to resume with other clips or another base: paths may differ, contents may not.

    Raises:
        UserError: they differ and `allow_changed` is False.
    """
    changed = sorted(key for key in {*saved, *current} if saved.get(key) != current.get(key))
    if not changed:
        return
    text = f"{folder} was trained on different contents of: {', '.join(changed)}"
    if not allow_changed:
        raise UserError(f"cannot resume: {text}; use the same, start another run, or pass --allow-changed")
    warn(text)


def _link(source: Path, target: Path) -> None:
    """Replace `target` by a hard link to `source` (a copy where the file system has no links), in one rename.

    A folder (a transformer) is linked file by file; files that only the old folder has are removed.
    """
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            _link(file, target / file.name)
        for old in {p.name for p in target.iterdir()} - {p.name for p in source.iterdir()}:
            (target / old).unlink()
        return
    with temporary_folder(target.parent) as folder:
        temporary = folder / target.name
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)
        temporary.replace(target)


def load_checkpoint(folder: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Copy a checkpoint's trained tensors into `parameters`, bit for bit, and return the rest of its state.

    Raises:
        UserError: the checkpoint does not hold exactly these tensors, or is damaged.
    """
    state = folder / "state"
    try:
        read_header(state / _TRAINED)
        check_pickle(state / _REST)
        trained = load_file(state / _TRAINED)
        # weights_only: a checkpoint is data, never code.
        rest = checked(torch.load(state / _REST, weights_only=True, map_location="cpu"), dict[str, Any], state / _REST)
    except pickle.UnpicklingError:  # torch's message advises to execute code in the file
        raise UserError(f"cannot resume from {folder}: {_REST} is damaged or holds more than plain values (nothing in "
                        "it is executed); remove it to resume from an older one") from None
    except (UserError, *DAMAGED) as error:
        raise UserError(f"cannot resume from {folder}: {str(error).strip() or type(error).__name__}; remove it to "
                        "resume from an older one") from None
    missing, extra = sorted(set(parameters) - set(trained)), sorted(set(trained) - set(parameters))
    if missing or extra:
        raise UserError(f"cannot resume from {folder}: its tensors are not this run's (missing {missing[:3]}, "
                        f"extra {extra[:3]}); were targets or experts changed?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != trained[name].shape:
                raise UserError(f"cannot resume from {folder}: '{name}' has shape {list(trained[name].shape)}, this "
                                f"run's {list(parameter.shape)}; was a rank changed?")
            local_tensor(parameter).copy_(shard_like(trained[name], parameter))
    return rest
