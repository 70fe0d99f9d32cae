"""The command line as a user types it: in this process, or as a process that can be killed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from forkserver import PATIENCE, fork_server, take_environment

from lapwan import cli, console


class Ran(NamedTuple):
    """A command that has ended: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@contextlib.contextmanager
def _global_state_kept() -> Iterator[None]:
    """What a command may change for its whole process is as it was afterwards."""
    environment, argv, streams = dict(os.environ), sys.argv, (sys.stdin, sys.stdout, sys.stderr)
    random, threads, gradients = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv, (sys.stdin, sys.stdout, sys.stderr) = argv, streams
        console.set_level(console.NORMAL)
        torch.set_rng_state(random)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_lapwan(*arguments: object, cwd: Path | None = None, stdin: str = "", encoding: str = "utf-8",
               environment: Mapping[str, str] | None = None) -> Ran:
    """Run `lapwan ARGUMENTS` in this process.

    A process of its own would import torch, diffusers and transformers and plan memory once more, which takes longer
    than most commands do on the embedded model. What a command does not catch is raised.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    with _global_state_kept(), contextlib.chdir(cwd or Path.cwd()):
        os.environ.update(environment or {})
        sys.argv = ["lapwan", *map(str, arguments)]
        sys.stdin, sys.stdout, sys.stderr = io.StringIO(stdin), out, err
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err)))


def run_successfully(*arguments: object, **how: Any) -> Ran:
    """`run_lapwan` with an exit code of 0."""
    ran = run_lapwan(*arguments, **how)
    assert ran.code == 0, f"{arguments}\n{ran.err}"
    return ran


def _as_program(arguments: list[str], cwd: str, environment: Mapping[str, str], files: tuple[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    take_environment(environment)
    os.chdir(cwd)
    sys.argv = ["lapwan", *arguments]
    try:
        cli.main()
    finally:  # what an interpreter does first at its end; multiprocessing does it after closing the pools' queues
        threading._shutdown()


class Started:
    """`lapwan ARGUMENTS` in a process of its own, the leader of a new session; it can be killed."""

    def __init__(self, *arguments: object, cwd: Path | None = None) -> None:
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  deleted with this object
        paths = tuple(file.name for file in self._files)
        self._process = fork_server().Process(
            target=_as_program, args=([str(a) for a in arguments], str(cwd or Path.cwd()), dict(os.environ), paths))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process itself, without those that it has started."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; minus a signal's number when that ended it; None while it runs."""
        return self._process.exitcode

    def written(self) -> tuple[str, str]:
        """Its stdout and stderr so far."""
        out, err = (Path(file.name).read_text("utf-8") for file in self._files)
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        """To the process and those that it has started; none once it has ended, whose output then says why."""
        if self.poll() is None:
            os.killpg(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> Ran:
        """Wait for its end; it is killed when that takes longer."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            self.send_signal(signal.SIGKILL)
        ran = Ran(-1 if code is None else code, *self.written())
        assert code is not None, f"still running after {seconds} seconds: {ran}"
        return ran
