"""Two processes that share a run beside the test's own: no port to lose to another test, and none left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch
from forkserver import PATIENCE, fork_server, take_environment
from torch.distributed import TCPStore


def _as_rank(rank: int, port: int, environment: Mapping[str, str], work: Callable[..., None],
             arguments: tuple[Any, ...]) -> None:
    take_environment(environment)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    work(rank, *arguments)


@contextmanager
def two_processes(work: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run work(rank, *arguments) in two processes while the body runs; at its end both must have succeeded.

    They meet at a store of this process, as with torchrun at its agent's: its port is the system's choice and taken at
    once, where a port that was merely seen to be free may be another test's by the time it is used. When one fails, or
    the body does, the other is ended instead of waiting for it.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = fork_server()
    processes = [context.Process(target=_as_rank, args=(rank, store.port, dict(os.environ), work, arguments))
                 for rank in range(2)]
    try:
        for process in processes:
            process.start()
        yield
        while running := [process for process in processes if process.is_alive()]:
            assert wait([process.sentinel for process in running], PATIENCE), f"still running after {PATIENCE} seconds"
            ended = [process.exitcode for process in processes if not process.is_alive()]
            assert not any(ended), f"exit codes {ended}; what they said is among the captured output"
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
