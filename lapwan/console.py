"""Results, log lines and progress: results go to stdout, everything else to stderr.

On a terminal long work shows a rich progress bar; elsewhere it writes a line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

QUIET, NORMAL, VERBOSE = 0, 1, 2
_SECONDS_BETWEEN_LINES = 15.0
_SPEED_WINDOW = 600.0  # seconds over which the speed is averaged; a step of a large model may take a minute

_level = NORMAL
_busy = False  # a progress bar is active
# soft_wrap: a path or an error must stay on one line when the output is a file or a pipe.
results = Console(soft_wrap=True, highlight=False)
log_console = Console(stderr=True, soft_wrap=True, highlight=False)


def set_level(level: int) -> None:
    """Set how much goes to stderr: QUIET (warnings and errors only), NORMAL, VERBOSE."""
    global _level
    _level = level


def log(message: str) -> None:
    """A line for the user on stderr; silent under -q."""
    if _level >= NORMAL:
        log_console.print(message, markup=False)


def detail(message: str) -> None:
    """A line on stderr that only -v shows."""
    if _level >= VERBOSE:
        log_console.print(message, markup=False)


def warn(message: str) -> None:
    """`warning: ...` on stderr; also under -q, because it may change what the user does."""
    log_console.print(f"warning: {message}", style="yellow", markup=False)


class Bar(Protocol):
    """The progress of long work."""

    def advance(self, amount: float = 1, **figures: object) -> None:
        """Add `amount` of finished work; `figures` (formatted, or numbers) are shown beside the bar."""


class _SilentBar:
    def advance(self, amount: float = 1, **figures: object) -> None:
        """Show nothing."""


def speed(rate: float, unit: str) -> str:
    """`3.20 step/s`; below one per second the inverse: `12.5 s/step`."""
    return f"{rate:.2f} {unit}/s" if rate >= 1.0 or rate <= 0.0 else f"{1.0 / rate:.3g} s/{unit}"


class _SpeedColumn(ProgressColumn):
    """The speed; the unit alone until it is known."""

    def __init__(self, unit: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(self._unit if rate is None else speed(rate, self._unit))


class _RichBar:
    def __init__(self, progress: Progress, task: object) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1, **figures: object) -> None:
        self._progress.update(self._task, advance=amount, figures=_figures(figures))  # type: ignore[arg-type]


class _LineBar:
    def __init__(self, title: str, total: float, done: float, unit: str) -> None:
        self._title, self._total, self._done, self._unit = title, total, done, unit
        self._start_done = done
        self._first: tuple[float, float] | None = None
        self._start = self._last = time.monotonic()

    def advance(self, amount: float = 1, **figures: object) -> None:
        self._done += amount
        now = time.monotonic()
        finished = self._done >= self._total
        first, since = self._first or (self._start_done, self._start)
        self._first = self._first or (self._done, now)  # the first unit includes loading and compiling: not averaged
        if _level < NORMAL or not (finished or now - self._last >= _SECONDS_BETWEEN_LINES):
            return
        self._last = now
        rate = (self._done - first) / max(now - since, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        eta = "" if finished else f", {left:.0f} s left"
        log(f"{self._title}: {self._done:g}/{self._total:g} {self._unit}, {speed(rate, self._unit)}{eta} "
            f"{_figures(figures)}".rstrip())


def _figures(figures: dict[str, object]) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items())


@contextmanager
def progress(title: str, total: float, unit: str = "step", done: float = 0) -> Iterator[Bar]:
    """A progress bar with speed and ETA for `total` units of work, of which `done` are finished.

    A bar inside another one is silent: a terminal shows one at a time.
    """
    global _busy
    if _busy:
        yield _SilentBar()
        return
    _busy = True
    try:
        with _bar(title, total, unit, done) as bar:
            yield bar
    finally:
        _busy = False


@contextmanager
def _bar(title: str, total: float, unit: str, done: float) -> Iterator[Bar]:
    if not (sys.stderr.isatty() and _level >= NORMAL):
        yield _LineBar(title, total, done, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _SpeedColumn(unit),
               TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=log_console, transient=False, speed_estimate_period=_SPEED_WINDOW) as bar:
        yield _RichBar(bar, bar.add_task(title, total=total, completed=int(done), figures=""))
