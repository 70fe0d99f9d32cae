"""Faults made on purpose, and what lapwan does about them: the figures of README's promises.

    python tests/bench/faults.py --what inputs,disks,signals,writers,flat,label,fuzz --seed 0 --jobs 16 -o FILE.md

Sections may be run apart: a section of the file that is not run stays as it is. Ctrl-C and --seconds end a section
early, with the figures of what was tried. Faults are listed in full in FILE.txt beside FILE.md, with what repeats them.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from calls import COMMANDS, kinds, make_template, select
from inputs import Result, try_kind
from trial import Server


@dataclass
class Section:
    """The table of one section and the faults behind it.

    Args:
        rows: of the table, a header first.
        faults: one line each.
    """

    title: str
    rows: list[list[str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The section of the file."""
        lines = [f"## {self.title}", ""]
        lines += [f"{note}\n" for note in self.notes]
        if self.rows:
            head, *rows = self.rows
            lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(lines) + "\n"


@dataclass
class Context:
    """What every section needs."""

    server: Server
    template: Path
    root: Path
    seed: int
    jobs: int
    seconds: float
    share: int | None
    real: int
    only: str

    def many(self, items: Sequence[Any], work: Callable[[int, Any], Any], what: str) -> Iterator[Any]:
        """Results of `work(index, item)` as they come, `jobs` at a time, until time is up or Ctrl-C."""
        deadline = time.monotonic() + self.seconds
        waiting: set[Future[Any]] = set()
        rest = iter(enumerate(items))
        done, last = 0, time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    while len(waiting) < self.jobs and time.monotonic() < deadline and (
                            pair := next(rest, None)) is not None:
                        waiting.add(pool.submit(work, *pair))
                    if not waiting:
                        return
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done += 1
                        yield future.result()
                    if time.monotonic() - last > 15:
                        last = time.monotonic()
                        print(f"{what}: {done} of {len(items)}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                print(f"{what}: interrupted after {done} of {len(items)}", file=sys.stderr)
                wait(waiting)


def bad_inputs(context: Context) -> Section:
    """Bad input: exit code 2, one line, within 10 s of CPU and 1 GiB, nothing left, nothing changed, no code run."""
    chosen = [kind for kind in kinds() if context.only in kind.name]
    if context.share is not None:
        chosen = select(chosen, context.share, context.seed)
    real = set(range(0, len(chosen), max(1, len(chosen) // context.real))) if context.real else set()

    def work(index: int, kind: Any) -> tuple[Result, bool]:
        own = index in real and not kind.limits
        return try_kind(None if own else context.server, context.template, context.root / f"i{index}", kind,
                        context.seed), own

    right, refused, programs = Counter[str](), Counter[str](), 0
    all_of, seconds, memory = Counter[str](), [0.0], [0.0]
    section = Section("Bad inputs")
    for result, own in context.many(chosen, work, "inputs"):
        command = result.kind.call.command
        all_of[command] += 1
        programs += own
        refused[command] += result.outcome.code == 2
        right[command] += not result.faults
        seconds.append(result.outcome.cpu)
        memory.append(result.outcome.rss_mib)
        if result.faults:
            section.faults.append(result.line)
    section.notes = [
        f"{sum(right.values())} of {sum(all_of.values())} kinds right ({len(kinds())} kinds in all); {programs} of "
        f"them as programs of their own, the others forked. Right: exit code 2 and one line (success where the damage "
        f"is in what is not read), at most 10 s of CPU and 1 GiB, old output and other files unchanged, no temporary "
        f"file, no code executed. Largest: {max(seconds):.1f} s of CPU, {max(memory):.0f} MiB."]
    section.rows = [["command", "kinds", "refused", "right"]]
    section.rows += [[command, str(all_of[command]), str(refused[command]), str(right[command])] for command in COMMANDS
                     if all_of[command]]
    return section


SECTIONS: dict[str, Callable[[Context], Section]] = {"inputs": bad_inputs}


def merge(path: Path, sections: Sequence[Section], head: str) -> None:
    """Write the sections into the file; others that it has stay."""
    kept: dict[str, str] = {}
    if path.is_file():
        for part in re.split(r"(?m)^(?=## )", path.read_text(encoding="utf-8"))[1:]:
            kept[part.splitlines()[0].removeprefix("## ")] = part.rstrip() + "\n"
    kept |= {section.title: section.markdown() for section in sections}
    path.write_text(head + "\n" + "\n".join(kept.values()), encoding="utf-8")


def main() -> None:
    """Run the sections and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=1800, help="of each section, at most")
    parser.add_argument("--share", type=int, help="inputs: only so many kinds, evenly over calls and kinds of damage")
    parser.add_argument("--real", type=int, default=40, help="inputs: so many as programs of their own")
    parser.add_argument("--only", default="", help="only what has this text in its name")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    done: list[Section] = []
    with tempfile.TemporaryDirectory(prefix="lapwan-faults-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        server = Server({"LAPWAN_CACHE_DIR": str(root / "cache")})
        context = Context(server, make_template(root / "template"), root, given.seed, given.jobs, given.seconds,
                          given.share, given.real, given.only)
        try:
            for what in given.what.split(","):
                started = time.monotonic()
                section = SECTIONS[what](context)
                section.notes.append(f"{time.monotonic() - started:.0f} s, {given.jobs} at a time, seed {given.seed}.")
                done.append(section)
                print(section.markdown() + "".join(f"- {line}\n" for line in section.faults), flush=True)
        finally:
            if given.output and done:
                head = (f"# Faults made on purpose\n\n`python tests/bench/faults.py`, {platform.machine()}, "
                        f"{os.cpu_count()} cores, Python {platform.python_version()}\n")
                merge(given.output, done, head)
                lines = [f"{section.title}: {line}\n" for section in done for line in section.faults]
                given.output.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
            server.close()


if __name__ == "__main__":
    main()
