"""Ctrl-C and SIGTERM as a request to stop, which the training loop checks after each step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lapwan import console


@dataclass
class Stop:
    """Whether a signal has asked to stop."""

    requested: bool = False


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """A scope in which the first Ctrl-C or SIGTERM sets `requested`, and a second one raises KeyboardInterrupt."""
    stop = Stop()
    before = {}

    def on_signal(number: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        console.log("stopping after this step and saving; press Ctrl-C again to stop at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
