"""A run's folder: whether it may be written, which settings it was made with, and what may differ when it goes on."""

from __future__ import annotations

import shutil
import tomllib
from typing import Any

from lapwan import files
from lapwan.console import warn
from lapwan.errors import UserError
from lapwan.settings.aliases import SETTINGS_VERSION, VERSION_KEY
from lapwan.settings.base import to_toml
from lapwan.settings.load import upgraded
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train import TrainSettings
from lapwan.train.checkpoint import checkpoints
from lapwan.train.metrics import METRICS_FILE

SETTINGS_FILE = "settings.toml"
PREVIEWS = "previews"
# What may differ between a run and its resumption. Model, data and prompts are checked by what they hold, so that they
# may have moved (`checkpoint.check_identity`); the rest changes no number that is trained.
_FREE = ("output", "resume", "allow_changed", "model", "data", "device", "save_every", "keep_last", "keep_best",
         "log_every", "sigma_bins", "memory", "compile", "watch", "validation", "preview", "health", "prompts")


def claim_run(settings: TrainSettings | SrpoSettings, overwrite: bool) -> None:
    """Check the run folder: new, or one to resume with the same settings.

    Raises:
        UserError: it exists and neither --resume nor --overwrite is given, or it was made with other settings.
    """
    run = settings.output
    if not settings.resume:
        if run.is_dir() and checkpoints(run) and not overwrite:
            raise UserError(f"output exists: {run} holds a run; pass --resume to go on with it, or --overwrite")
        files.claim_output(run, overwrite)
        return
    if (run / SETTINGS_FILE).is_file() and (changed := changes(settings)):
        if not settings.allow_changed:
            raise UserError(f"cannot resume {run} with other settings ({changed}); put them back, start another run, "
                            "or pass --allow-changed")
        warn(f"going on with other settings: {changed}")


def changes(settings: TrainSettings | SrpoSettings) -> str:
    """What differs from the settings the run was made with, as `optimizer.lr: 0.0001 -> 0.001; ...`."""
    told = settings.output / SETTINGS_FILE
    before = _leaves(upgraded(tomllib.loads(told.read_text(encoding="utf-8")), told, run=True))
    now = _leaves(tomllib.loads(to_toml(settings)))
    names = sorted(k for k in {*before, *now} if k.split(".")[0] not in _FREE and before.get(k) != now.get(k))
    return "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in names)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def start_folder(settings: TrainSettings | SrpoSettings, overwrite: bool) -> None:
    """Make the run folder and write the resolved settings into it; an older run is removed under --overwrite.

    Settings changed at a resumption replace the old ones, which stay beside them under their step.
    """
    run = settings.output
    if overwrite and not settings.resume and run.is_dir():
        _remove_run(run)
    run.mkdir(parents=True, exist_ok=True)
    told = run / SETTINGS_FILE
    if settings.resume and told.is_file():
        if not changes(settings):
            return
        done = checkpoints(run)
        told.replace(run / f"settings_until_{done[-1][0] if done else 0:06d}.toml")
    header = "The resolved settings of this run; `--config` with this file repeats it."
    plain = settings.model_copy(update={"resume": False, "allow_changed": False})
    files.write_text(told, f"# {header}\n{VERSION_KEY} = {SETTINGS_VERSION}\n{to_toml(plain)}")


def _remove_run(run: Any) -> None:
    """Remove what a run writes and nothing else: the folder may hold the user's own files."""
    for _, folder in checkpoints(run):
        for adapter in folder.glob("*.safetensors"):  # the run's own links to it, whatever it was named
            (run / adapter.name).unlink(missing_ok=True)
        shutil.rmtree(folder)
    for name in ("tensorboard", PREVIEWS):
        shutil.rmtree(run / name, ignore_errors=True)
    for path in (run / METRICS_FILE, *run.glob("settings_until_*.toml")):
        path.unlink(missing_ok=True)
