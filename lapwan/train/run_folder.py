"""The folder of a run: whether it may be written, its settings.toml, and which settings may differ on resume."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Self

from lapwan import files
from lapwan.console import warn
from lapwan.diagnostics.run_folder import METRICS_FILE
from lapwan.documents import read_toml
from lapwan.errors import Interrupted, UserError
from lapwan.report.page import PAGE_FILE, is_page
from lapwan.settings.aliases import RUN_HEADER, SETTINGS_VERSION, VERSION_KEY
from lapwan.settings.base import Settings, to_plain, to_toml
from lapwan.settings.load import upgraded
from lapwan.settings.srpo import SrpoSettings
from lapwan.settings.train import TrainSettings
from lapwan.temporaries import discard_folder
from lapwan.train.checkpoint import check_resumable, checkpoints

SETTINGS_FILE = "settings.toml"
PREVIEWS = "previews"
TRACKER_FILE = "tracker_id"  # by which a tracker knows a run that is continued
# What may differ on resume. Model, data and prompts are compared by content, since they may have moved
# (`checkpoint.check_identity`); the others do not change what is trained.
_FREE = ("output", "resume", "allow_changed", "model", "data", "device", "save_every", "keep_last", "keep_best",
         "log_every", "tracker", "sigma_bins", "memory", "compile", "watch", "validation", "preview", "health",
         "prompts")


def claim_run(settings: TrainSettings | SrpoSettings, overwrite: bool) -> None:
    """Check that the run folder is new, or holds a run to resume with the same settings.

    Raises:
        UserError: it exists and neither --resume nor --overwrite is given, it was made with other settings, or its
            checkpoints have lost their state.
    """
    run = settings.output
    if not settings.resume:
        if run.is_dir() and checkpoints(run) and not overwrite:
            raise UserError(f"output exists: {run} holds a run; pass --resume to continue it, or --overwrite")
        files.claim_output(run, overwrite)
        return
    check_resumable(run)
    if (run / SETTINGS_FILE).is_file() and (changed := changes(settings)):
        if not settings.allow_changed:
            raise UserError(f"cannot resume {run} with other settings ({changed}); put them back, start another run, "
                            "or pass --allow-changed")
        warn(f"resuming with other settings: {changed}")


def changes(settings: TrainSettings | SrpoSettings) -> str:
    """What differs from the settings the run was made with, as `optimizer.lr: 0.0001 -> 0.001; ...`.

    A key that the stored settings lack counts only if it is not at its default: the run may be older than the key. A
    key whose default changes what older runs did belongs into `lapwan.settings.aliases.OLD_DEFAULTS`.
    """
    path = settings.output / SETTINGS_FILE
    before = _leaves(upgraded(read_toml(path), path, run=True))
    now, defaults = _leaves(to_plain(settings)), _defaults(settings)
    names = sorted(k for k in {*before, *now} if k.split(".")[0] not in _FREE and before.get(k) != now.get(k)
                   and not (k not in before and k in defaults and now[k] == defaults[k]))
    return "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in names)


def _defaults(section: Settings, default: Any = None, prefix: str = "") -> dict[str, Any]:
    """Default by dotted key, for the sections as they are: an optimizer has the defaults of its type.

    Args:
        default: of the section as a whole; its values are used if it is of the same type.
    """
    leaves: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        same_type = type(default) is type(section)
        usual = getattr(default, name) if same_type else info.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            leaves |= _defaults(value, usual, f"{prefix}{name}.")
        elif not info.is_required():
            leaves |= _leaves(to_plain({name: usual}), prefix)
    return leaves


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def resume_command(command: str, run: Path) -> str:
    """What to type to continue a run, from any working directory: `lapwan train-lora --config RUN/settings.toml ...`.

    Args:
        command: such as "lapwan train-lora".
        run: the run folder.
    """
    return f"{command} --config {shlex.quote(str(run.absolute() / SETTINGS_FILE))} --resume"


class RunScope:
    """A scope around a run: interrupted outside its steps, it says what is kept and how to continue.

    Args:
        command: such as "lapwan train-lora".
    """

    def __init__(self, command: str, settings: TrainSettings | SrpoSettings) -> None:
        self._command, self._settings, self._started = command, settings, False

    def __enter__(self) -> Self:
        return self

    def start(self, overwrite: bool) -> None:
        """`start_folder`; from here on the folder holds this run and can be continued."""
        start_folder(self._settings, overwrite)
        self._started = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self._started:
            run = self._settings.output
            done = checkpoints(run)
            kept = f"state saved at step {done[-1][0]} in {run}" if done else f"no step was saved in {run}"
            raise Interrupted(f"interrupted; {kept}; continue with {resume_command(self._command, run)}") from None


def start_folder(settings: TrainSettings | SrpoSettings, overwrite: bool) -> None:
    """Make the run folder and write the resolved settings into it; --overwrite removes an older run.

    Settings that changed on resume replace the old ones, which are kept as `settings_until_STEP.toml`.
    """
    run = settings.output
    if overwrite and not settings.resume and run.is_dir():
        _remove_run(run)
    run.mkdir(parents=True, exist_ok=True)
    path = run / SETTINGS_FILE
    if settings.resume and path.is_file():
        if not changes(settings):
            return
        done = checkpoints(run)
        until = run / f"settings_until_{done[-1][0] if done else 0:06d}.toml"
        files.write_text(until, path.read_text(encoding="utf-8"))
    plain = settings.model_copy(update={"resume": False, "allow_changed": False})
    files.write_text(path, f"{RUN_HEADER}\n{VERSION_KEY} = {SETTINGS_VERSION}\n{to_toml(plain)}")


def _remove_run(run: Any) -> None:
    """Remove what a run writes and nothing else: the folder may hold other files of the user."""
    for _, folder in checkpoints(run):
        for adapter in folder.glob("*.safetensors"):  # the run folder has a link to each, whatever its name
            (run / adapter.name).unlink(missing_ok=True)
        discard_folder(folder)
    for name in ("tensorboard", PREVIEWS):
        discard_folder(run / name)
    for path in (run / METRICS_FILE, run / TRACKER_FILE, *run.glob("settings_until_*.toml")):
        path.unlink(missing_ok=True)
    if is_page(run / PAGE_FILE):
        (run / PAGE_FILE).unlink()
