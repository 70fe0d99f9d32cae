"""What several commands do before their work: joining the processes, finding the task, printing the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lapwan import console
from lapwan.caching.read import load_index
from lapwan.console import PlanPart, PlanRow
from lapwan.files import folder_lock
from lapwan.models.spec import Task, task_named
from lapwan.settings.base import RunOptions, Settings, settings_row, to_toml
from lapwan.train.parallel import Distributed, join_processes


def index_task(cache: Path, labels: Path | None = None) -> Task | None:
    """The task that a cache was made for; it selects the model that `tiny` names."""
    return task_named(load_index(cache, labels).task)


def print_plan(settings: Settings, parts: Sequence[PlanPart], options: RunOptions) -> None:
    """Print the plan on stderr, with the settings that differ from the defaults; under --dry-run all on stdout."""
    output = [PlanRow("output", str(path))] if isinstance(path := getattr(settings, "output", None), Path) else []
    console.show_plan([settings_row(settings), *output, *parts])
    if options.dry_run:
        console.show_settings(to_toml(settings))
    else:
        console.detail(to_toml(settings))


def output_lock(folder: Path, options: RunOptions) -> AbstractContextManager[None]:
    """The lock of a command's output folder, to enter; none under --no-lock, and in a dry run: it writes nothing."""
    return folder_lock(folder, options.lock and not options.dry_run)


@contextmanager
def distributed_run(device: str, lock: AbstractContextManager[None] | None = None) -> Iterator[tuple[Distributed, str]]:
    """The processes of this run and this process's device; the first holds the lock, the others are quiet."""
    distributed, local_device = join_processes(device)
    if not distributed.first:
        console.set_level(console.QUIET)
    try:
        with lock if lock is not None and distributed.first else nullcontext():
            yield distributed, local_device
    finally:
        distributed.close()
