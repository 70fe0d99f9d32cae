"""Results, log lines and progress: results go to stdout, everything else to stderr.

On a terminal long work shows a rich progress bar; elsewhere it writes a line every few seconds.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from rich.cells import cell_len
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

from lapwan.errors import printable

QUIET, NORMAL, VERBOSE = 0, 1, 2
_SECONDS_BETWEEN_LINES = 15.0
_FIRST_SECONDS, _SECONDS_BETWEEN_FIRST_LINES = 60.0, 5.0  # of short work a file tells more
_PLAN_WIDTH = 100  # columns of a plan, at most
_NAME_WIDTH = 12  # columns of the names in a plan
NO_BREAK = "\u00a0"  # a space in a plan's text at which no line ends
_SPEED_WINDOW = 600.0  # seconds over which the speed is averaged; a step of a large model may take a minute

_level = NORMAL
_counters: list[Counter[str]] = []
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
        log_console.print(_shown(message), markup=False)


def detail(message: str) -> None:
    """A line on stderr that only -v shows."""
    if _level >= VERBOSE:
        log_console.print(_shown(message), markup=False)


def _shown(message: str) -> str:
    """A message without what a terminal would act on in a value from a file; the lines are ours."""
    return "\n".join(map(printable, message.split("\n")))


def warn(message: str) -> None:
    """`warning: ...` on stderr; also under -q, because it may change what the user does."""
    for counted in _counters:
        counted[message] += 1
    log_console.print(f"warning: {_shown(message)}", style="yellow", markup=False)


@contextmanager
def warnings_counted() -> Iterator[Counter[str]]:
    """The warnings of a scope and how often each was given."""
    counted: Counter[str] = Counter()
    _counters.append(counted)
    try:
        yield counted
    finally:
        _counters.remove(counted)


class PlanRow(NamedTuple):
    """A line of what a command will do. `detail`: only -v shows it; `warning`: also shown under -q."""

    name: str
    text: str
    detail: bool = False
    warning: bool = False


class PlanTable(NamedTuple):
    """Figures of a plan; cells that start with a digit are aligned to the right."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


PlanPart = PlanRow | PlanTable


def show_plan(parts: Sequence[PlanPart]) -> None:
    """Names and texts in two columns on stderr, tables below them.

    Texts wrap at the terminal's width, at 100 columns at most; a word longer than that is never broken.
    """
    for part in parts:
        if isinstance(part, PlanTable):
            if _level >= NORMAL:
                _show_table(part)
        elif _level >= (VERBOSE if part.detail else QUIET if part.warning else NORMAL):
            _show_row(part)


def _plan_width() -> int:
    return min(log_console.width, _PLAN_WIDTH) if log_console.is_terminal else _PLAN_WIDTH


def _show_row(row: PlanRow) -> None:
    name, style = (f"{row.name}:", "yellow") if row.warning else (row.name, "bold")
    for line in _wrap(row.text, _plan_width() - _NAME_WIDTH):
        log_console.print(Text.assemble((f"{name:{_NAME_WIDTH}}", style), (line, style if row.warning else "")))
        name = ""


def _show_table(table: PlanTable) -> None:
    """Columns as wide as their cells; a text in the last one wraps."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    figures = [all(cell[:1].isdigit() for cell in cells if cell) for _, *cells in columns]
    before = _NAME_WIDTH + sum(widths[:-1]) + 2 * len(widths[:-1])
    widths[-1] = min(widths[-1], max(_plan_width() - before, 20))
    for number, row in enumerate((table.headings, *table.rows)):
        for rest, last in enumerate(_wrap(row[-1], widths[-1])):
            cells = [*(row[:-1] if not rest else [""] * len(row[:-1])), last]
            shown = [f"{cell:>{width}}" if right else f"{cell:{width}}"
                     for cell, width, right in zip(cells, widths, figures, strict=True)]
            line = " " * _NAME_WIDTH + "  ".join(shown).rstrip()
            log_console.print(Text(line, "bold" if not number else ""))


def _wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` columns; a word that is longer, such as a path, stays whole."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line.strip() and cell_len(line) + cell_len(word) >= width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
    return [line.replace(NO_BREAK, " ") for line in lines]


def show_settings(toml: str) -> None:
    """The resolved settings of a dry run on stdout, complete for a file, a pipe and -v.

    On a terminal they would push the plan off the screen, which names those that differ from the defaults.
    """
    if results.is_terminal and log_console.is_terminal and _level == NORMAL:
        log("-v prints all settings")
    else:
        results.print(toml.rstrip("\n"), markup=False)
    log("dry run: everything that can be checked without the work is in order")


def count_text(count: int, noun: str) -> str:
    """`1 clip`, `4 clips`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[object], shown: int = 5, between: str = ", ") -> str:
    """`a, b, c and 3 more`."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return between.join(map(str, items[:shown])) + more


def duration_text(seconds: float) -> str:
    """Seconds in a readable unit: s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
        # The first call's unit, or part of a unit, includes loading and compiling: not averaged.
        self._first = self._first or (self._done, now)
        between = _SECONDS_BETWEEN_FIRST_LINES if now - self._start < _FIRST_SECONDS else _SECONDS_BETWEEN_LINES
        if _level < NORMAL or not (finished or now - self._last >= between):
            return
        self._last = now
        rate = (self._done - first) / max(now - since, 1e-9)
        shown = f", {speed(rate, self._unit)}" if rate > 0 else ""
        if rate > 0 and not finished:
            shown += f", {(self._total - self._done) / rate:.0f} s left"
        log(f"{self._title}: {self._done:g}/{self._total:g} {self._unit}{shown} {_figures(figures)}".rstrip())


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
