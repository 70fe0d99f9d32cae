"""Faults made on purpose, and what lapwan does about them: the figures of README's promises.

    python tests/bench/faults.py --what inputs,disks,signals,writers,flat,label,fuzz --seed 0 --jobs 16 -o FILE.md

Sections may be run apart: a section of the file that is not run stays as it is. Ctrl-C and --seconds end a section
early, with the figures of what was tried. Faults are listed in full in FILE.txt beside FILE.md, with what repeats them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

import fuzz as fuzzing
from calls import COMMANDS, kinds, make_template, make_work, select
from disturb import (
    SIGNALS,
    WORKS,
    Disturbed,
    Reference,
    build_wrapper,
    can_mount,
    failing_disk,
    full_disk,
    killed_decoder,
    levels,
    measure,
    signalled,
    two_writers,
)
from fuzz import READERS
from growth import label_many, watch_training
from inputs import Result, try_kind
from trial import ROOT, Server

_GRACE = 60.0  # seconds for what still runs when a section's time is over


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
    moments: int
    steps: int
    lines: int
    wrapper: bool
    fuzz_seconds: float
    kept: Path
    measured: dict[str, Reference] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # trials that could not be made, of the section that runs
    programs: set[subprocess.Popen[str]] = field(default_factory=set)

    def wants(self, name: str) -> bool:
        """Whether --only lets a name through."""
        return any(text in name for text in self.only.split(","))

    def references(self) -> list[Reference]:
        """Every work undisturbed, as few at a time as are disturbed; measured once."""
        chosen = [work for work in WORKS if self.wants(work.name)]
        missing = [work for work in chosen if work.name not in self.measured]
        made = self.many(missing, lambda index, work: measure(
            self.server, self.template, self.root / f"m{index}", work), "undisturbed")
        self.measured |= {reference.work.name: reference for reference in made}
        return [self.measured[work.name] for work in chosen if work.name in self.measured]

    def disturb(self, what: str, trials: Sequence[tuple[str, str, Callable[[Path], Disturbed]]]) -> dict[
            tuple[str, str], list[Disturbed]]:
        """Make the trials, in an order in which every (row, column) has some before any has all."""
        shuffled = Random(self.seed).sample(list(trials), len(trials))
        tables: dict[tuple[str, str], list[Disturbed]] = {}

        def work(index: int, trial: tuple[str, str, Callable[[Path], Disturbed]]) -> tuple[str, str, Disturbed]:
            row, column, make = trial
            return row, column, make(self.root / f"{what}{index}")

        for row, column, made in self.many(shuffled, work, what):
            tables.setdefault((row, column), []).append(made)
        return tables

    def many(self, items: Sequence[Any], work: Callable[[int, Any], Any], what: str) -> Iterator[Any]:
        """Results of `work(index, item)` as they come, `jobs` at a time, until time is up or Ctrl-C.

        A trial that raises is listed in `failed`.
        """
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
                    finished, waiting = wait(waiting, timeout=5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        done += 1
                        if (error := future.exception()) is None:
                            yield future.result()
                        else:
                            self.failed.append(f"{what}: a trial could not be made: {type(error).__name__}: {error}")
                    if time.monotonic() - last > 15:
                        last = time.monotonic()
                        print(f"{what}: {done} of {len(items)}", file=sys.stderr, flush=True)
                    if time.monotonic() > deadline + _GRACE:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                print(f"{what}: stopped after {done} of {len(items)}", file=sys.stderr, flush=True)
                self.server.stop()
                for program in list(self.programs):
                    program.terminate()
                wait(waiting, timeout=_GRACE)
                self.server.stopped = False


def bad_inputs(context: Context) -> Section:
    """Bad input: exit code 2, one line, within 10 s of CPU and 1 GiB, nothing left, nothing changed, no code run."""
    chosen = [kind for kind in kinds() if context.wants(kind.name)]
    chosen = select(chosen, context.share or len(chosen), context.seed)
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


def _table(section: Section, tables: dict[tuple[str, str], list[Disturbed]], columns: Sequence[str]) -> None:
    """Right of all by row and column; what had finished before the disturbance is counted apart."""
    section.rows = [["command", *columns, "finished before it"]]
    for row in [work.name for work in WORKS]:
        cells, finished = [], 0
        for column in columns:
            made = tables.get((row, column), [])
            finished += sum(trial.finished for trial in made)
            cells.append(f"{sum(not trial.faults for trial in made)} of {len(made)}" if made else "")
            section.faults += [trial.line for trial in made if trial.faults]
        if any(cells):
            section.rows.append([row, *cells, str(finished)])


def disks(context: Context) -> Section:
    """Full disks and failing ones."""
    section = Section("Disks that are full or fail")
    trials: list[tuple[str, str, Callable[[Path], Disturbed]]] = []
    mount, rng = can_mount(), Random(context.seed)
    for reference in context.references():
        if not reference.bytes:
            continue
        if mount:
            trials += [(reference.work.name, "full", lambda folder, r=reference, pages=pages: full_disk(
                context.server, context.template, folder, r, pages))
                for pages in levels(reference, context.moments, rng)]
        if context.wrapper:
            trials += [(reference.work.name, "EIO", lambda folder, r=reference, size=size: failing_disk(
                context.server, context.template, folder, r, size))
                for size in (0, *(rng.randrange(reference.bytes) for _ in range(context.moments - 1)))]
    _table(section, context.disturb("disks", trials), ("full", "EIO"))
    section.notes = [
        "Right: exit code 2 and one line, the old output intact, no temporary file; with room the same command (with "
        "`--resume` or `--overwrite` where something is there) gives the bytes of undisturbed work. Full: "
        + ("a tmpfs of one page to nearly enough." if mount else "not tried, nothing can be mounted here.")
        + (" EIO: every write and fsync below the output fails after some bytes (a library preloaded)."
           if context.wrapper else " EIO: not tried, there is no C compiler.")]
    return section


def signals(context: Context) -> Section:
    """SIGTERM, Ctrl-C and kill -9 at random moments, and killed decoders."""
    section = Section("Signals at random moments")
    trials: list[tuple[str, str, Callable[[Path], Disturbed]]] = []
    rng = Random(context.seed)
    for reference in context.references():
        trials += [(reference.work.name, name, lambda folder, r=reference, name=name, at=rng.random(): signalled(
            context.server, context.template, folder, r, name, at))
            for name in SIGNALS for _ in range(context.moments)]
        if reference.work.name == "cache":
            trials += [("cache", "decoder killed", lambda folder, r=reference, at=rng.random(): killed_decoder(
                context.server, context.template, folder, r, at)) for _ in range(context.moments)]
    _table(section, context.disturb("signals", trials), (*SIGNALS, "decoder killed"))
    section.notes = [
        "Right: exit code 130 and a line (-9 for kill -9), no process left, nothing hidden but the lock file; the same "
        "command, with `--resume` for runs, then gives files that are equal byte for byte to undisturbed work's."]
    return section


def writers(context: Context) -> Section:
    """Two processes with one output."""
    section = Section("Two writers of one output")
    rng = Random(context.seed)
    trials: list[tuple[str, str, Callable[[Path], Disturbed]]] = [
        (reference.work.name, "two writers", lambda folder, r=reference, delay=rng.choice((0.0, rng.random())):
            two_writers(context.server, context.template, folder, r, delay))
        for reference in context.references() if reference.work.folder for _ in range(context.moments)]
    _table(section, context.disturb("writers", trials), ("two writers",))
    section.notes = ["Right: one does the work, the other is refused with one line that says why (or finds the work "
                     "done); the files are those of undisturbed work, byte for byte."]
    return section


def flat(context: Context) -> Section:
    """Memory and descriptors over many steps."""
    section = Section("Memory and descriptors over many steps")
    section.rows = [["command", "steps", "exit code", "MiB after a fifth", "MiB at the end", "MiB a 1000 steps",
                     "descriptors", "seconds"]]

    def work(index: int, command: str) -> tuple[str, Any]:
        folder = make_work(context.template, context.root / f"flat{index}")
        return command, watch_training(context.server, folder, command, context.steps, context.seconds)

    for command, growth in context.many(["train-lora", "train-moe"], work, "flat"):
        section.rows.append([command, str(growth.steps), str(growth.code), f"{growth.first_mib:.1f}",
                             f"{growth.last_mib:.1f}", f"{growth.mib_per_1000:+.2f}",
                             f"{growth.descriptors[0]} to {growth.descriptors[1]}", f"{growth.seconds:.0f}"])
        if growth.code != 0 or not growth.mib_per_1000 < 1 or growth.descriptors[1] - growth.descriptors[0] > 4:
            section.faults.append(f"{command}: {growth}")
    return section


def label(context: Context) -> Section:
    """Memory of `label` on many lines."""
    code, seconds, mib = label_many(context.root, context.lines)
    section = Section("Memory of label")
    section.rows = [["lines", "exit code", "seconds", "MiB"], [f"{context.lines:,}", str(code), f"{seconds:.0f}",
                                                               f"{mib:.0f}"]]
    if code or mib > 200:
        section.faults.append(f"exit code {code}, {mib:.0f} MiB")
    return section


def fuzz(context: Context) -> Section:
    """Readers on damaged files, each in a process of its own."""
    section = Section("Fuzzed readers")
    out = context.kept / "fuzz"
    out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in READERS if context.wants(name)]
    rounds = -(-max(1, len(chosen)) // context.jobs)
    # A process takes some seconds to start, on a busy machine many.
    share = min(context.fuzz_seconds / max(1, len(chosen)), max(1.0, context.seconds / rounds - 25))

    def work(index: int, name: str) -> tuple[str, int, list[dict[str, Any]]]:
        program = [sys.executable, str(Path(fuzzing.__file__)), name, "--seconds", f"{share:.1f}", "--seed",
                   str(context.seed), "--out", str(out)]
        ran = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
            "PYTHONPATH": str(ROOT), **os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
            "LAPWAN_CACHE_DIR": str(context.root / "cache")})
        context.programs.add(ran)
        out_text, err_text = ran.communicate()
        context.programs.discard(ran)
        rows = [json.loads(line) for line in out_text.splitlines() if line.startswith("{")]
        readings = sum(row.get("readings", 0) for row in rows)
        findings = [row for row in rows if "key" in row]
        if ran.returncode:
            findings.append({"key": f"ended with {ran.returncode}", "how": "", "text": err_text[-300:],
                             "file": str(out / f"{name.replace(' ', '_')}-current")})
        return name, readings, findings

    section.rows = [["reader", "readings", "findings"]]
    total = found = 0
    for name, readings, findings in context.many(chosen, work, "fuzz"):
        section.rows.append([name, str(readings), str(len(findings))])
        total, found = total + readings, found + len(findings)
        section.faults += [f"{name}: {row['key']} ({row['how']}): {row['text']!r}; repeat: tests/faults/fuzz.py "
                           f"'{name}' --repeat {row['file']}" for row in findings]
    section.rows[1:] = sorted(section.rows[1:])
    section.notes = [f"{total} readings of {len(section.rows) - 1} readers in {share * (len(section.rows) - 1):.0f} s "
                     f"together, {found} findings: errors that are no line for the user, crashes, more than 2 GiB, "
                     "more than 10 s."]
    return section


SECTIONS: dict[str, Callable[[Context], Section]] = {
    "inputs": bad_inputs, "disks": disks, "signals": signals, "writers": writers, "flat": flat, "label": label,
    "fuzz": fuzz}


def merge(path: Path, sections: Sequence[Section], head: str) -> None:
    """Write the sections into the file; others that it has stay."""
    kept: dict[str, str] = {}
    if path.is_file():
        for part in re.split(r"(?m)^(?=## )", path.read_text(encoding="utf-8"))[1:]:
            kept[part.splitlines()[0].removeprefix("## ")] = part.rstrip() + "\n"
    kept |= {section.title: section.markdown() for section in sections}
    path.write_text(head + "\n" + "\n".join(kept.values()), encoding="utf-8")


def write_faults(path: Path, sections: Sequence[Section]) -> None:
    """List the sections' faults; those of others that are listed there stay."""
    titles = tuple(f"{section.title}: " for section in sections)
    old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in old if not line.startswith(titles)]
    lines += [f"{section.title}: {' '.join(line.split())}" for section in sections for line in section.faults]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Run the sections and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default=",".join(SECTIONS), help="sections, with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=1800, help="of each section, at most")
    parser.add_argument("--share", type=int, help="inputs: only so many kinds, evenly over calls and kinds of damage")
    parser.add_argument("--real", type=int, default=40, help="inputs: so many as programs of their own")
    parser.add_argument("--only", default="", help="only what has one of these texts, "
                        "separated by commas, in its name")
    parser.add_argument("--moments", type=int, default=10, help="disks, signals, writers: so many of each kind")
    parser.add_argument("--steps", type=int, default=5000, help="flat: steps of a run")
    parser.add_argument("--lines", type=int, default=1_000_000, help="label: lines")
    parser.add_argument("--fuzz-seconds", type=float, default=1800, help="fuzz: of all readers together")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    done: list[Section] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="lapwan-faults-", ignore_cleanup_errors=True) as name:
        root = Path(name)
        wrapper = build_wrapper(root)
        server = Server({"LAPWAN_CACHE_DIR": str(root / "cache"),
                         **({"LD_PRELOAD": str(wrapper)} if wrapper is not None else {})})
        context = Context(server, make_template(root / "template"), root, given.seed, given.jobs, given.seconds,
                          given.share, given.real, given.only, given.moments, given.steps, given.lines,
                          wrapper is not None, given.fuzz_seconds,
                          (given.output.parent if given.output else Path.cwd()).resolve())
        try:
            for what in given.what.split(","):
                started = time.monotonic()
                context.failed.clear()
                try:
                    section = SECTIONS[what](context)
                except Exception as error:  # noqa: BLE001  the figures of other sections are worth more
                    section = Section(what, faults=[f"the section ended with {type(error).__name__}: {error}"])
                section.faults += context.failed
                section.notes.append(f"{time.monotonic() - started:.0f} s, {given.jobs} at a time, seed {given.seed}.")
                done.append(section)
                print(section.markdown() + "".join(f"- {line}\n" for line in section.faults), flush=True)
        finally:
            if given.output and done:
                head = (f"# Faults made on purpose\n\n`python tests/bench/faults.py`, {platform.machine()}, "
                        f"{os.cpu_count()} cores, Python {platform.python_version()}\n")
                merge(given.output, done, head)
                write_faults(given.output.with_suffix(".txt"), done)
            server.close()
    sys.exit(any(section.faults for section in done))


if __name__ == "__main__":
    main()
