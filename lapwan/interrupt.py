"""Ctrl-C, SIGTERM (a scheduler's) and SIGHUP (a lost terminal) as one request to stop.

In a command the first raises KeyboardInterrupt (`stop_on_signals`); training finishes its step and saves first
(`stop_requested`). A second one ends the process at once: temporary files are removed, and what is finished is whole.
"""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

INTERRUPTED = 130  # exit code
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A launcher and the process group may each deliver the same one: within this time a second one is not a second request.
_SECONDS_APART = 1.0
_IMPORT_SECONDS = 5.0  # that an import may take after a signal
_POLL_SECONDS = 0.02  # between two looks whether an import has ended


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
_postponing = 0  # scopes that must not be interrupted
_raised = False  # a KeyboardInterrupt, in this command
_waiting = False  # an interrupt that came in such a scope


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt at the first signal and end the process at a second one.

    For a whole program: a library leaves signals to its caller.
    """
    global _is_program, _raised
    _is_program, _raised = True, False
    stop = Stop()
    words = sys.argv[1:]

    def on_signal(number: int, frame: FrameType | None) -> None:
        again = stop.requested
        if stop.request():
            if again:
                _end_at_once()
            _interrupt(frame, words, stop.time)

    def on_unraisable(error: sys.UnraisableHookArgs) -> None:
        if _raised and issubclass(error.exc_type, KeyboardInterrupt):
            _interrupt_soon(words, stop.time)
        else:
            sys.__unraisablehook__(error)

    _handle(on_signal)
    # Raised into a finaliser or a weak reference's callback it would be lost, with a traceback on the terminal.
    sys.unraisablehook = on_unraisable


def end_on_signals(code: int) -> None:
    """The work is done, and its exit code decided: a signal while the interpreter ends must not change it.

    The workers of an interrupted command are killed: the interpreter would wait for what they are doing. What it was
    about to write is removed, also where the interrupt came between a temporary folder and the block that removes it.
    """
    if code == INTERRUPTED:
        if (remove_live := _of_temporaries("remove_live")) is not None:
            remove_live()
        if "multiprocessing" in sys.modules:
            for child in (children := sys.modules["multiprocessing"].active_children()):
                child.kill()
            for child in children:
                child.join()
        if (remove_of_workers := _of_temporaries("remove_of_workers")) is not None:
            remove_of_workers()
        sys.unraisablehook = lambda error: None  # an executor that wakes a queue which its thread has just closed
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    _handle(lambda number, frame: os._exit(code))


def ignore_signals_at_exit() -> None:
    """Ignore signals once the exit handlers registered later have run.

    The interpreter then puts the system's handlers in the place of its own: a signal would change the exit code.
    """
    atexit.register(_handle, signal.SIG_IGN)


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> dict[int, Any]:
    """Set the handler of every signal that asks to stop; the handlers before. One that is ignored (nohup) stays so."""
    return {number: signal.signal(number, handler) for number in _SIGNALS
            if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN}


def _interrupt(frame: FrameType | None, words: Sequence[str], since: float) -> None:
    """Raise KeyboardInterrupt, but not into an import: libraries catch it there and go on with half a module.

    Before the first write the process ends there and then; later it waits some seconds for the end of the import.
    """
    global _waiting
    if _postponing:
        _waiting = True
        return
    if not _is_importing(frame):
        _raise()
    untouched = _of_temporaries("is_untouched")
    if untouched is None or untouched():
        _end_at_once(f"interrupted; no output was written; to continue: {command_line(words)}")
    if time.monotonic() - since > _IMPORT_SECONDS:
        _end_at_once(f"interrupted; what was finished is whole; to continue: {command_line(words)}")
    _interrupt_soon(words, since)


def _interrupt_soon(words: Sequence[str], since: float) -> None:
    signal.signal(signal.SIGALRM, lambda number, frame: _interrupt(frame, words, since))
    signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def command_line(words: Sequence[str], more: str = "") -> str:
    """`lapwan WORDS` as a shell takes it, with an option more unless it is there."""
    return shlex.join(["lapwan", *words, *([more] if more and more not in words else [])])


def _of_temporaries(name: str) -> Any:
    """A function of `lapwan.temporaries`; None while that is not imported. A handler may run in the middle of it."""
    return getattr(sys.modules.get("lapwan.temporaries"), name, None)


def _end_at_once(message: str = "interrupted at once; what was finished is whole") -> None:
    """End without waiting for anything: a write in the background, a worker, another library's clean-up."""
    if (remove_live := _of_temporaries("remove_live")) is not None:
        remove_live()
    with suppress(OSError):
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))
    os._exit(INTERRUPTED)


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """A scope in which the first signal sets `requested`, and a second one ends the process.

    In a program that uses lapwan as a library the second one raises KeyboardInterrupt.
    """
    from lapwan import console

    stop = Stop()

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

    before = _handle(on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def starting_workers() -> Iterator[None]:
    """A scope that starts processes: it is not interrupted half-way, and Ctrl-C never reaches them.

    A terminal sends Ctrl-C to the whole process group. A worker that is still importing, or is told only half of what
    to do, would print a traceback.
    """
    before = None if sys.platform == "win32" else signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with postponed():
            yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def postponed() -> Iterator[None]:
    """A short scope that a command's KeyboardInterrupt waits for, in the main thread; others are not interrupted."""
    global _postponing
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _postponing += 1
    try:
        yield
    finally:
        _postponing -= 1
        if _waiting and not _postponing:
            _raise()


def _raise() -> None:
    global _waiting, _raised
    _waiting, _raised = False, True
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a KeyboardInterrupt was raised, which another library may have turned into an error of its own."""
    return _raised
