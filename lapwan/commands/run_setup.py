"""What several commands do before their work: joining the processes, finding the task, printing the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lapwan import console
from lapwan.caching.read import load_index
from lapwan.models.spec import Task, task_named
from lapwan.settings.base import RunOptions, Settings, to_toml
from lapwan.train.parallel import Distributed, join_processes


def index_task(cache: Path, labels: Path | None = None) -> Task | None:
    """The task that a cache was made for; it selects the model that `tiny` names."""
    return task_named(load_index(cache, labels).task)


def print_plan(settings: Settings, lines: Sequence[str], options: RunOptions) -> None:
    """Print the plan on stderr; under --dry-run also the resolved settings on stdout."""
    for line in lines:
        console.log(line)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        console.log("dry run: everything that can be checked without the work is in order")


@contextmanager
def distributed_run(device: str) -> Iterator[tuple[Distributed, str]]:
    """The processes of this run and this process's device; all but the first process are quiet."""
    distributed, local_device = join_processes(device)
    if not distributed.first:
        console.set_level(console.QUIET)
    try:
        yield distributed, local_device
    finally:
        distributed.close()
