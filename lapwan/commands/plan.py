"""What every training command says before it works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lapwan import console
from lapwan.caching.read import load_index
from lapwan.models.spec import Task
from lapwan.settings.base import RunOptions, Settings, to_toml
from lapwan.settings.train import DataSettings
from lapwan.train.parallel import Distributed, join_processes


def index_task(data: DataSettings) -> Task | None:
    """The task the cache was made for: it decides which `tiny` is meant."""
    task = load_index(data.cache, data.labels).task
    return "i2v" if task == "i2v" else "t2v" if task == "t2v" else None


def print_plan(settings: Settings, lines: Sequence[str], options: RunOptions) -> None:
    """The plan on stderr; under --dry-run also the resolved settings on stdout."""
    for line in lines:
        console.log(line)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        console.log("dry run: everything that can be checked without the work is in order")


@contextmanager
def distributed_run(device: str) -> Iterator[tuple[Distributed, str]]:
    """This process among the run's, and its device; all but the first keep quiet."""
    distributed, own = join_processes(device)
    if not distributed.first:
        console.set_level(console.QUIET)
    try:
        yield distributed, own
    finally:
        distributed.close()
