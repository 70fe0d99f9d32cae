"""Several processes on one job (accelerate launch, torchrun): ranks, shares of the work, collectives. Also worker
processes and threads of a single process.

Importing this module loads no torch; only several processes need it.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import ParamSpec, TypeVar

from lapwan.errors import UserError
from lapwan.interrupt import starting_workers

P = ParamSpec("P")
T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)  # the other processes wait while the first one plans, validates, samples or saves


class Processes:
    """This process and the group it belongs to; a single process by default.

    Args:
        rank: of this process in the group.
        count: processes in the group (the world size).
        local_rank: of this process on its machine; also the index of its GPU.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank

    @property
    def first(self) -> bool:
        """True in the process of rank 0, which prints the plan, logs, and writes shared files."""
        return self.rank == 0

    def local_items(self, items: Iterable[T]) -> list[T]:
        """This process's share: every `count`-th item, so that shares are equal also if items are sorted by size."""
        return list(items)[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of ranks, in every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        self.join()
        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The first process's value, in every process (a broadcast)."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        self.join()
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """True in every process if `flag` is true in any."""
        return flag if self.count == 1 else any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    def join(self, backend: str = "gloo") -> None:
        """Initialise the process group, once."""
        import torch.distributed as dist

        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=_TIMEOUT)

    def close(self) -> None:
        """Destroy the process group, so that the launcher sees a clean exit."""
        if self.count > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


def launched() -> Processes:
    """The processes described by the launcher's environment; a single process without a launcher.

    Raises:
        UserError: the launcher's environment is incomplete.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count <= 1:
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE = {count}, but {', '.join(missing)} is not set; start with torchrun or "
                        "accelerate, or unset WORLD_SIZE")
    return Processes(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A pool of spawned processes for plain functions; forking a process that holds CUDA or torch threads is unsafe."""
    with starting_workers():
        return _Workers(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


class _Workers(ProcessPoolExecutor):
    """Ctrl-C reaches the whole process group: the main process shuts its workers down."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submit a call; it may start a worker."""
        with starting_workers():
            return super().submit(fn, *args, **kwargs)


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed: nobody else would, and it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="parent").start()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch operations on one thread: on thin matrices its threads wait for each other longer than they work.

    For work that has its own threads, one matrix each. Measured on 2 cores: the norms of a 400-module pair take
    1.3 s of CPU time instead of 1.8 s.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
