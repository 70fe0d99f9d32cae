"""Work that is disturbed while it runs: full and failing disks, signals, two writers. Then it goes on, and the result
is compared byte by byte with that of undisturbed work."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from calls import BASE, HIGH, JUDGE, LORAS, LOW, WEIGHTS, make_work
from inputs import remove
from trial import Outcome, Running, Server, refusal_faults, session_members, temporaries, tree

DISK = "disk"  # the folder, in the work folder, that all output is below
LINES = 20_000  # of `label`, so that it lasts


@dataclass(frozen=True)
class Work:
    """A command that lasts a while.

    Args:
        go_on: what is added to the arguments for the next start, once something is there.
        folder: whether two writers share a folder, which is locked.
        results: suffixes of the files that are compared.
    """

    name: str
    arguments: tuple[str, ...]
    go_on: tuple[str, ...] = ()
    folder: bool = True
    results: tuple[str, ...] = (".safetensors", ".mp4")
    said: str = "interrupted"


_TRAIN = ("--set", "save_every=4", "-o", f"{DISK}/run")
WORKS = (
    Work("split", ("split", "clips", "-o", f"{DISK}/windows.jsonl", "--seconds", "0.05", "--stride", "0.01",
                   "--keep-still", "--keep-black"), ("--overwrite",), False, (".jsonl",)),
    Work("label", ("label", "many.jsonl", "-o", f"{DISK}/labels.jsonl"), ("--overwrite",), False, (".jsonl",)),
    Work("cache", ("cache", "--dataset", "clips/labels.jsonl", *BASE, "--size", "48x32", "--num-frames", "5",
                   "--workers", "1", "--batch-size", "1", "-o", f"{DISK}/cache")),
    Work("train-lora", ("train-lora", "--config", "settings/train_lora.toml", *_TRAIN), ("--resume",)),
    Work("train-moe", ("train-moe", "--config", "settings/train_moe.toml", "--set", "steps=6", *_TRAIN), ("--resume",)),
    Work("srpo", ("srpo", "--config", "settings/srpo.toml", "--set", "steps=8", *_TRAIN), ("--resume",)),
    Work("merge", ("merge", "--model", "base", *LORAS, "-o", f"{DISK}/merged"), ("--overwrite",), False),
    Work("merge file", ("merge", "--dit", f"base/transformer/{WEIGHTS}", "--lora", f"high={HIGH}", "-o",
                        f"{DISK}/dit.safetensors"), ("--overwrite",), False),
    Work("generate", ("generate", *BASE, "--prompt", "吸引", *LORAS, "--steps", "8", "--num-frames", "5", "--size",
                      "48x32", "-o", f"{DISK}/video.mp4"), ("--overwrite",), False),
    Work("evaluate", ("evaluate", "--config", "settings/evaluate.toml", "-o", f"{DISK}/evaluation", "--set",
                      "interval.samples=200"), ("--resume",)),
    Work("train-judge", (*JUDGE, "--steps", "60", "-o", f"{DISK}/judge.safetensors"), ("--overwrite",), False),
    Work("inspect-weights", ("inspect-weights", HIGH, LOW, "--json", f"{DISK}/weights.json", "--plot",
                             f"{DISK}/weights.png"), ("--overwrite",), False, (".json",)),
    Work("demo", ("demo", "-o", f"{DISK}/demo", "--clips", "8", "--steps", "2", "--prompts", "2"), ("--overwrite",),
         results=(".safetensors",)),
    Work("doctor", ("doctor", "--folder", DISK), folder=False, results=()),
)
_NOT_COMPARED = ("lapwan_index.jsonl", "metrics.jsonl")


@dataclass
class Reference:
    """Undisturbed work: how long it takes, how much it writes, and its files' fingerprints."""

    work: Work
    seconds: float
    bytes: int
    files: dict[str, str]
    contents: dict[str, str]


@dataclass
class Disturbed:
    """A trial, and what was wrong with it."""

    name: str
    faults: list[str] = field(default_factory=list)
    finished: bool = False  # before it was disturbed

    @property
    def line(self) -> str:
        """For a list of faults."""
        return f"{self.name}: {'; '.join(self.faults)}"


def _write_many(work: Path) -> None:
    lines = (work / "clips/clips.jsonl").read_text("utf-8").splitlines()
    short = [line for line in lines if len(line) < 2000] or [lines[0]]
    if not (work / "many.jsonl").exists():
        (work / "many.jsonl").write_text("".join(f"{short[n % len(short)]}\n" for n in range(LINES)), encoding="utf-8")


def prepare(template: Path, folder: Path) -> Path:
    """A work folder for one trial."""
    work = make_work(template, folder)
    _write_many(work)
    (work / DISK).mkdir()
    return work


def fingerprints(disk: Path, results: tuple[str, ...]) -> dict[str, str]:
    """By relative path, the sha256 of the files that must be the same whenever the work is done."""
    return {str(path.relative_to(disk)): _fingerprint(path, disk.parent) for path in sorted(disk.rglob("*"))
            if path.suffix in results and path.is_file() and path.name not in _NOT_COMPARED}


def _fingerprint(path: Path, work: Path) -> str:
    """sha256; of a video over its packets and its record, in which the folder of the trial is not compared."""
    if path.suffix != ".mp4":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    import av

    digest = hashlib.sha256()
    with av.open(str(path)) as container:
        digest.update(json.dumps(container.metadata, sort_keys=True).replace(str(work), "WORK").encode())
        for packet in container.demux():
            digest.update(bytes(packet))
    return digest.hexdigest()


def contents(disk: Path) -> dict[str, str]:
    """The same of safetensors files whatever the order of their headers."""
    digests = {}
    for path in sorted(disk.rglob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()
        digests[str(path.relative_to(disk))] = hashlib.sha256(header + data[8 + size :]).hexdigest()
    return digests


def differences(reference: Reference, disk: Path) -> list[str]:
    """Files that are missing or not the same."""
    now = fingerprints(disk, reference.work.results)
    wrong = [name for name, digest in reference.files.items() if now.get(name) != digest]
    # An interrupted run has a checkpoint of that step besides.
    extra = [name for name in now if name not in reference.files and "/step_" not in name]
    faults = []
    if wrong:
        now = contents(disk)
        same = all(reference.contents.get(name) is not None and reference.contents[name] == now.get(name)
                   for name in wrong)
        faults = [f"{len(wrong)} of {len(reference.files)} files differ{' in the order of the header' * same}: "
                  f"{wrong[:2]}"]
    return faults + ([f"files that the reference lacks: {extra[:2]}"] if extra else [])


def measure(server: Server, template: Path, folder: Path, work: Work) -> Reference:
    """Do the work undisturbed, twice; both must give the same bytes.

    Raises:
        RuntimeError: it fails.
    """
    where = prepare(template, folder)
    outcome = server.run(work.arguments, where, timeout=600)
    if outcome.code != 0:
        raise RuntimeError(f"{work.name}: exit code {outcome.code}: {outcome.err[-800:]}")
    disk = where / DISK
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in disk.rglob("*") if path.is_file())
    made = Reference(work, outcome.seconds, size, fingerprints(disk, work.results), contents(disk))
    remove(folder)
    return made


def _again(work: Work, where: Path) -> tuple[str, ...]:
    """The arguments of the next start."""
    return (*work.arguments, *(work.go_on if any((where / DISK).iterdir()) else ()))


def _finish(server: Server, reference: Reference, where: Path) -> list[str]:
    """Start again and compare."""
    outcome = server.run(_again(reference.work, where), where, timeout=600)
    if outcome.code != 0:
        return [f"the next start: exit code {outcome.code}: {outcome.last[:200]!r}"]
    faults = differences(reference, where / DISK)
    if hidden := temporaries(tree(where / DISK)):
        faults.append(f"left after the next start: {hidden[:3]}")
    return faults


# ---- disks


_WRAPPER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <unistd.h>
#include <sys/uio.h>
static long left = -1;
static int fails(int fd, size_t size) {
    const char *prefix = getenv("LAPWAN_FAULT_BELOW");
    if (!prefix || !*prefix) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    if (strncmp(path, prefix, strlen(prefix))) return 0;
    if (left < 0) left = atol(getenv("LAPWAN_FAULT_BYTES"));
    left -= (long) size;
    if (left >= 0) return 0;
    left = 0;
    errno = atoi(getenv("LAPWAN_FAULT_ERRNO"));
    return 1;
}
#define REAL(name) ((__typeof__(name) *) dlsym(RTLD_NEXT, #name))
ssize_t write(int fd, const void *data, size_t size) {
    return fails(fd, size) ? -1 : REAL(write)(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return fails(fd, size) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return fails(fd, size) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    size_t size = 0;
    for (int n = 0; n < count; n++) size += parts[n].iov_len;
    return fails(fd, size) ? -1 : REAL(writev)(fd, parts, count);
}
int fsync(int fd) { return fails(fd, 0) ? -1 : REAL(fsync)(fd); }
"""


def build_wrapper(folder: Path) -> Path | None:
    """A library that makes writes fail with a chosen error; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    source, library = folder / "wrapper.c", folder / "wrapper.so"
    source.write_text(_WRAPPER, encoding="utf-8")
    done = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"],
                          capture_output=True)
    return library if done.returncode == 0 else None


def can_mount() -> bool:
    """Whether a tmpfs can be mounted here."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", name], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", "-l", name], capture_output=True)
        return done.returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[Callable[[], None]]:
    """A tmpfs of so many pages of 4 KiB at `folder`; the function that it yields makes room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages * 4}k", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def levels(reference: Reference, count: int, rng: Random) -> list[int]:
    """Pages of disks that are too small, from one page to nearly enough."""
    whole = max(2, reference.bytes // 4096)
    shares = [rng.uniform(n / count, (n + 0.8) / count) for n in range(count)]
    return sorted({max(1, int(share * whole)) for share in shares} | {1})


def full_disk(server: Server, template: Path, folder: Path, reference: Reference, pages: int) -> Disturbed:
    """The work on a disk of so many pages: one line; with room it goes on."""
    work = reference.work
    made = Disturbed(f"{work.name}, {pages} pages of {reference.bytes // 4096}")
    where = prepare(template, folder)
    try:
        with small_disk(where / DISK, pages) as make_room:
            old = _old_output(work, where)
            outcome = server.run((*work.arguments, *(("--overwrite",) if old else ())), where, timeout=600)
            _check_disk(made, outcome, where, old)
            make_room()
            made.faults += _finish(server, reference, where)
    finally:
        remove(folder)
    return made


def failing_disk(server: Server, template: Path, folder: Path, reference: Reference, after: int) -> Disturbed:
    """The work on a disk whose writes fail with EIO after so many bytes."""
    work = reference.work
    made = Disturbed(f"{work.name}, EIO after {after} bytes")
    where = prepare(template, folder)
    try:
        old = _old_output(work, where)
        outcome = server.run((*work.arguments, *(("--overwrite",) if old else ())), where, timeout=600, environment={
            "LAPWAN_FAULT_BELOW": str((where / DISK).resolve()), "LAPWAN_FAULT_BYTES": str(after),
            "LAPWAN_FAULT_ERRNO": "5"})
        _check_disk(made, outcome, where, old)
        made.faults += _finish(server, reference, where)
    finally:
        remove(folder)
    return made


def _old_output(work: Work, where: Path) -> list[Path]:
    """Files of an old output, for commands that replace a file."""
    names = [word for word in work.arguments if word.startswith(f"{DISK}/") and Path(word).suffix]
    paths = [where / name for name in names] if not work.folder else []
    for path in paths:
        with contextlib.suppress(OSError):
            path.write_text("old", encoding="utf-8")
    return paths


def _check_disk(made: Disturbed, outcome: Outcome, where: Path, old: list[Path]) -> None:
    made.finished = outcome.code == 0
    made.faults += [] if made.finished else refusal_faults(Outcome(
        outcome.code, outcome.out, outcome.err, 0, 0, 0, outcome.orphans))
    if hidden := temporaries(tree(where / DISK)):
        made.faults.append(f"left {hidden[:3]}")
    if not made.finished:
        made.faults += [f"old output {path.name} is not intact" for path in old
                        if not path.is_file() or path.read_bytes() not in (b"old", b"")]


# ---- signals


SIGNALS: Mapping[str, int] = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT, "kill -9": signal.SIGKILL}


def signalled(server: Server, template: Path, folder: Path, reference: Reference, name: str,
              moment: float) -> Disturbed:
    """The work stopped by a signal after `moment` of its time; then it goes on.

    Where it has finished by then, since it is faster than the reference was, it is tried again with an earlier moment.
    """
    for _ in range(4):
        made = _signalled(server, template, folder, reference, name, moment)
        if not made.finished or made.faults:
            break
        moment *= 0.7
    return made


def _signalled(server: Server, template: Path, folder: Path, reference: Reference, name: str,
               moment: float) -> Disturbed:
    work = reference.work
    made = Disturbed(f"{work.name}, {name} at {moment:.3f} of {reference.seconds:.2f} s")
    where = prepare(template, folder)
    try:
        running = server.start(work.arguments, where, timeout=600)
        time.sleep(moment * reference.seconds)
        number = SIGNALS[name]
        # A terminal's Ctrl-C and a killed job reach every process of the group; a scheduler's SIGTERM the first.
        running.signal(number, group=number != signal.SIGTERM)
        outcome = running.wait()
        expected = -9 if number == signal.SIGKILL else 130
        # The interpreter takes a while to end when all is written; what a signal does to that does not matter.
        ended = outcome.code in (-signal.SIGTERM, -signal.SIGINT) and reference.files
        unborn = outcome.code == -number and not outcome.err and not any((where / DISK).iterdir())
        if outcome.code == 0:
            made.finished = True
            made.faults += differences(reference, where / DISK)
        elif ended and not differences(reference, where / DISK):
            made.finished = True
        elif outcome.code != expected and not unborn:  # the interpreter had not begun with the program
            made.faults.append(f"exit code {outcome.code} in place of {expected}: {outcome.last[:160]!r}")
        if number != signal.SIGKILL:
            _check_interrupted(made, outcome, where, work)
        if outcome.orphans:
            made.faults.append(f"left processes: {outcome.orphans}")
        if not made.finished:
            made.faults += _finish(server, reference, where)
    finally:
        remove(folder)
    return made


def _check_interrupted(made: Disturbed, outcome: Outcome, where: Path, work: Work) -> None:
    if "Traceback" in outcome.err and not made.finished:
        made.faults.append(f"traceback: {outcome.last[:160]!r}")
    if outcome.code == 130 and work.said not in outcome.err.lower():
        made.faults.append(f"the last line is {outcome.last[:160]!r}")
    if hidden := temporaries(tree(where / DISK)):
        made.faults.append(f"left {hidden[:3]}")


def killed_decoder(server: Server, template: Path, folder: Path, reference: Reference, moment: float) -> Disturbed:
    """A decoding process of `cache` killed: the command must end well by itself, with the same files."""
    made = Disturbed(f"cache, its decoder killed at {moment:.3f} of {reference.seconds:.2f} s")
    where = prepare(template, folder)
    try:
        running = server.start(reference.work.arguments, where, timeout=600)
        time.sleep(moment * reference.seconds)
        killed = _kill_workers(running)
        outcome = running.wait()
        made.finished = not killed
        if outcome.code != 0:
            made.faults.append(f"exit code {outcome.code}: {outcome.last[:160]!r}")
        if outcome.orphans:
            made.faults.append(f"left processes: {outcome.orphans}")
        made.faults += differences(reference, where / DISK)
    finally:
        remove(folder)
    return made


def _kill_workers(running: Running) -> int:
    killed = 0
    for pid in session_members(running.pid):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if pid != running.pid and b"spawn_main" in line:
                os.kill(pid, signal.SIGKILL)
                killed += 1
    return killed


# ---- two writers


def two_writers(server: Server, template: Path, folder: Path, reference: Reference, delay: float) -> Disturbed:
    """Two processes with one output, the second `delay` of the time after the first."""
    work = reference.work
    made = Disturbed(f"{work.name}, two writers, {delay:.3f} of {reference.seconds:.2f} s apart")
    where = prepare(template, folder)
    outcomes: list[Outcome] = []
    try:
        first = server.start(work.arguments, where, timeout=600)
        time.sleep(delay * reference.seconds)
        second = server.start(work.arguments, where, timeout=600)
        waiting = [threading.Thread(target=lambda r=running: outcomes.append(r.wait())) for running in (first, second)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        codes = sorted(-1 if outcome.code is None else outcome.code for outcome in outcomes)
        if codes not in ([0, 2], [0, 0]):
            made.faults.append(f"exit codes {codes}: {[outcome.last[:120] for outcome in outcomes]}")
        for outcome in outcomes:
            if outcome.code == 2:
                made.faults += refusal_faults(Outcome(2, outcome.out, outcome.err, 0, 0, 0, outcome.orphans))
                if not any(text in outcome.last for text in ("in use by process", "in use by another process",
                                                             "output exists")):
                    made.faults.append(f"refused with {outcome.last[:160]!r}")
        made.faults += differences(reference, where / DISK)
        if hidden := temporaries(tree(where / DISK)):
            made.faults.append(f"left {hidden[:3]}")
    finally:
        remove(folder)
    return made
