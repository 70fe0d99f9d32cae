"""Ctrl-C, SIGTERM (a scheduler's) and SIGHUP (a lost terminal) as one request to stop.

In a command the first raises KeyboardInterrupt (`stop_on_signals`); training finishes its step and saves first
(`stop_requested`). A second one ends the process at once: temporary files are removed, and what is finished is whole.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

INTERRUPTED = 130  # exit code
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A launcher and the process group may each deliver the same one: within this time a second one is not a second request.
_SECONDS_APART = 1.0


@dataclass
class Stop:
    """Whether a signal has asked to stop, and when."""

    requested: bool = False
    time: float = 0.0

    def request(self) -> bool:
        """Note a signal; False for the echo of an earlier one."""
        now = time.monotonic()
        if self.requested and now - self.time < _SECONDS_APART:
            return False
        self.requested, self.time = True, now
        return True


_is_program = False  # signals are this package's to handle; else they are the caller's


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt at the first signal and end the process at a second one.

    For a whole program: a library leaves signals to its caller. A signal that is ignored (nohup) stays so.
    """
    global _is_program
    _is_program = True
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        again = stop.requested
        if stop.request():
            if again:
                _end_at_once()
            raise KeyboardInterrupt

    for number in _SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)


def _end_at_once() -> None:
    """End without waiting for anything: a write in the background, a worker, another library's clean-up."""
    from lapwan.temporaries import remove_live

    remove_live()
    with suppress(OSError):
        os.write(2, b"stopped at once; what was finished before is whole\n")
    os._exit(INTERRUPTED)


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """A scope in which the first signal sets `requested`, and a second one ends the process.

    In a program that uses lapwan as a library the second one raises KeyboardInterrupt.
    """
    from lapwan import console

    stop = Stop()
    before = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        again = stop.requested
        if not stop.request():
            return
        if not again:
            console.log("stopping after this step and saving; press Ctrl-C again to stop at once")
        elif _is_program:
            _end_at_once()
        else:
            raise KeyboardInterrupt

    for number in _SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """A scope in which started processes inherit that Ctrl-C does not reach them, from their first instruction on.

    A terminal sends it to the whole process group, and a worker that is still importing would print a traceback.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
