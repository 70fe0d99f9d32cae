"""A run's checkpoints: `step_000100/` with the adapter files and, apart from them, `state/` for resuming.

Written to a temporary name and renamed, so a killed run leaves whole checkpoints only. The newest adapter files are
hard-linked into the run folder itself.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lapwan import files
from lapwan.console import warn
from lapwan.errors import UserError
from lapwan.train.parallel import local, part_like

_NAME = re.compile(r"^step_(\d+)$")
_TRAINED, _REST, _SCORE = "trained.safetensors", "rest.pt", "score.json"


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of a run, oldest first."""
    found = [(int(match[1]), p) for p in run.glob("step_*") if (match := _NAME.match(p.name)) and p.is_dir()]
    return sorted(found)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last n, and the n of the lowest score; both None: all. `score` is this one's."""

    last: int | None = None
    best: int | None = None
    score: float | None = None


def save(run: Path, step: int, write_adapters: Callable[[Path], list[Path]], parameters: Mapping[str, nn.Parameter],
         rest: dict[str, Any], keep: Keep) -> Path:
    """Write checkpoint `step`, link the run's adapter files to it, drop the checkpoints that need not stay."""
    return begin(run, step, write_adapters, parameters, rest, keep)()


def begin(run: Path, step: int, write_adapters: Callable[[Path], list[Path]], parameters: Mapping[str, nn.Parameter],
          rest: dict[str, Any], keep: Keep) -> Callable[[], Path]:
    """Take down all that changes with the next step; what is returned does the rest, on any thread.

    That rest (the state's files, waiting for the disk, the rename) is most of a checkpoint's time. Until the rename the
    checkpoint does not exist, so a kill in between leaves the older ones.
    """
    folder = run / f"step_{step:06d}"
    with ExitStack() as stack:
        temporary = stack.enter_context(files.atomic_folder(folder))
        adapters = write_adapters(temporary)
        trained = {name: _taken(p).contiguous() for name, p in parameters.items()}
        rest = _taken_tree(rest)
        whole = stack.pop_all()

    def finish() -> Path:
        with whole:
            state = temporary / "state"
            state.mkdir()
            save_file(trained, state / _TRAINED)
            torch.save(rest, state / _REST)
            if keep.score is not None:
                (state / _SCORE).write_text(json.dumps({"validation": keep.score}), encoding="utf-8")
        for adapter in adapters:
            _link(folder / adapter.name, run / adapter.name)
        _prune(run, keep)
        return folder

    return finish


def _taken(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _taken_tree(tree: Any) -> Any:
    """Plain containers with every tensor copied to host memory; the same tensor in two places stays one."""
    seen: dict[int, Tensor] = {}

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return seen.setdefault(id(value), _taken(value)) if id(value) not in seen else seen[id(value)]
        if isinstance(value, dict):
            return type(value)((key, take(one)) for key, one in value.items())
        if isinstance(value, list | tuple):
            return type(value)(take(one) for one in value)
        return value

    return take(tree)


class CheckpointWriter:
    """One checkpoint at a time is written beside the training."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[Path] | None = None

    def start(self, finish: Callable[[], Path]) -> None:
        """Write while the training goes on; waits for the checkpoint before.

        Raises:
            OSError: that one could not be written.
        """
        self.wait()
        self._last = self._pool.submit(finish)

    def wait(self) -> None:
        """Until what was started is on the disk.

        Raises:
            OSError: it could not be written.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _prune(run: Path, keep: Keep) -> None:
    if keep.last is None and keep.best is None:
        return
    found = [folder for _, folder in checkpoints(run)]
    stay = set(found[-(keep.last or 1):])  # the newest stays in any case: it is what --resume needs
    if keep.best is not None:
        scored = sorted(one for f in found if (one := score(f)) is not None and math.isfinite(one))
        limit = scored[: keep.best][-1] if scored else -math.inf
        stay |= {f for f in found if (one := score(f)) is not None and one <= limit}
    for folder in found:
        if folder not in stay:
            shutil.rmtree(folder)


def score(folder: Path) -> float | None:
    """The validation loss a checkpoint was saved with."""
    path = folder / "state" / _SCORE
    return float(json.loads(path.read_text(encoding="utf-8"))["validation"]) if path.is_file() else None


def check_identity(folder: Path, saved: Mapping[str, str], ours: Mapping[str, str], allowed: bool) -> None:
    """Refuse to go on with other clips or another base: paths may differ, contents may not.

    Raises:
        UserError: they differ and that is not allowed.
    """
    changed = sorted(key for key in {*saved, *ours} if saved.get(key) != ours.get(key))
    if not changed:
        return
    text = f"{folder} was trained on other contents of: {', '.join(changed)}"
    if not allowed:
        raise UserError(f"cannot resume: {text}; give the same, start another run, or pass --allow-changed")
    warn(text)


def _link(source: Path, target: Path) -> None:
    """Replace `target` by a hard link to `source` (a copy where the file system has none), in one rename.

    A folder (a whole transformer) is linked file by file; of the old folder what is no longer there goes.
    """
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for file in source.iterdir():
            _link(file, target / file.name)
        for old in {p.name for p in target.iterdir()} - {p.name for p in source.iterdir()}:
            (target / old).unlink()
        return
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
            local(parameter).copy_(part_like(trained[name], parameter))
    return rest
