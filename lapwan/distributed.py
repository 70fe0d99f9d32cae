"""Several processes on one piece of work (accelerate launch, torchrun): who takes what, and waiting for each other;
and workers of one process.

Importing this loads no torch; only more than one process needs it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from lapwan.errors import UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # the others wait while the first process plans, validates, samples or saves


class Processes:
    """This process among those that share the work; alone by default. `local` is its number on this machine, and so its
    GPU."""

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0) -> None:
        self.rank, self.count, self.local = rank, count, local

    @property
    def first(self) -> bool:
        """True in the one process that plans aloud, writes what is shared, and talks."""
        return self.rank == 0

    def own(self, items: Iterable[T]) -> list[T]:
        """Every `count`-th item: equal shares, also of work sorted by size."""
        return list(items)[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks, in every process."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        self.join()
        found: list[T | None] = [None] * self.count
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The first process's value, everywhere."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        self.join()
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        return flag if self.count == 1 else any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    def join(self, backend: str = "gloo") -> None:
        """Enter the group, once."""
        import torch.distributed as dist

        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=_PATIENCE)

    def close(self) -> None:
        """Leave the group, so that the launcher sees a clean end."""
        if self.count > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


def launched() -> Processes:
    """What the launcher said in its environment; one process without a launcher.

    Raises:
        UserError: a launcher's environment that is not complete.
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
    """Fresh processes for plain functions; spawned, since a fork of what holds CUDA or torch threads is not safe."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_ctrl_c)


def _leave_ctrl_c() -> None:
    """Ctrl-C reaches the whole process group; ending in order is the main process's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's own threads off for a while: on thin matrices they wait for each other longer than they work.

    For work that brings its own threads, one matrix each. Measured on 2 cores: norms of a 400-module pair 1.3 s of
    CPU instead of 1.8.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
