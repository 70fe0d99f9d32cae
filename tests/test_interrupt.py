"""SIGTERM, SIGHUP and Ctrl-C in every command: exit code 130, nothing partial, and a command that goes on."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran, Started, run_lapwan
from every_command import COMMANDS, words
from forkserver import PATIENCE, fork_server

from lapwan.files import LOCK_FILE, atomic_folder
from lapwan.interrupt import stop_on_signals, stop_requested
from lapwan.temporaries import remove_of_workers, workers_write_in

TRIALS = 5  # of each command, at random moments of its run


class Program:
    """`python -m lapwan ARGUMENTS`, imports and all."""

    def __init__(self, arguments: list[str]) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "lapwan", *arguments], text=True, encoding="utf-8",
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def send_signal(self, number: signal.Signals) -> None:
        """To the process alone, as a scheduler's first step does."""
        self._process.send_signal(number)

    def wait(self) -> Ran:
        """Wait for its end."""
        out, err = self._process.communicate(timeout=PATIENCE)
        return Ran(self._process.returncode, out, err)


def faults(ran: Ran, folder: Path) -> list[str]:
    """What is wrong with an interrupted command's end and with what it left."""
    last = (ran.err.strip().splitlines() or [""])[-1]
    hidden = [path for path in folder.rglob(".*") if path.name != LOCK_FILE]
    if ran.code == -signal.SIGTERM and not ran.err and not list(folder.iterdir()):
        return []  # the interpreter was not up yet
    return [fault for fault, holds in {
        f"exit code {ran.code}": ran.code not in (0, 130),
        f"a traceback: {ran.err[-1500:]}": "Traceback" in ran.err + ran.out or "Exception ignored" in ran.err,
        f"last line {last!r}": ran.code == 130 and not last.startswith("interrupted"),
        f"left behind: {hidden}": bool(hidden),
    }.items() if holds]


def to_continue(ran: Ran) -> list[str]:
    """The arguments of the command that the last line names."""
    command = re.split(r"(?:continue with|to continue:) lapwan ", ran.err.strip().splitlines()[-1])[-1]
    return shlex.split(command)


def wait_for(program: Started, happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert program.poll() is None and time.monotonic() < deadline, program.written()
        time.sleep(0.002)


FIRST_FILES = {"train-lora": "out/step_*", "generate": "out_001*"}  # after which the signal comes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["train-lora", "generate"])
def test_a_signal_in_the_middle_says_how_to_go_on(name, number, inputs, tmp_path) -> None:
    folder = tmp_path / "a folder"  # a name that a shell must have quoted
    folder.mkdir()
    arguments = [*words(name, inputs, folder), *(["--set", "steps=400"] if name == "train-lora" else [])]
    program = Started(*arguments)
    wait_for(program, lambda: list(folder.glob(FIRST_FILES[name])))
    os.kill(program.pid, number)
    ran = program.wait()
    assert ran.code == 130 and not faults(ran, folder), ran
    line = ran.err.strip().splitlines()[-1]
    if name == "train-lora":
        run = folder / "out"
        assert line.startswith("interrupted; state saved at step ")
        assert line.endswith(f"continue with lapwan train-lora --config '{run}/settings.toml' --resume")
    else:
        assert "interrupted after 1 of 3 videos" in line and line.endswith(" --overwrite")
    ran = run_lapwan(*to_continue(ran), "--dry-run")
    assert ran.code == 0, ran


def _stop_twice(folder: Path, started: Any) -> None:
    stop_on_signals()
    with atomic_folder(folder / "out") as temporary, stop_requested():
        (temporary / "x").touch()
        started.set()
        time.sleep(PATIENCE)  # a save that hangs, say


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not(number, tmp_path) -> None:
    context = fork_server()
    started = context.Event()
    process = context.Process(target=_stop_twice, args=(tmp_path, started))
    process.start()
    assert started.wait(PATIENCE)
    for _ in range(2):  # as a launcher and a process group do
        os.kill(process.pid, number)
        time.sleep(0.1)
    process.join(1.5)
    assert process.exitcode is None
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == 130 and not list(tmp_path.iterdir())


_AT_THE_END = """
import os, signal, sys
from lapwan.__main__ import main

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{number}):
        kill(pid, number)

late = Late()  # deleted when the interpreter has given the signals back to the system
sys.argv = ["lapwan", "--version"]
main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_the_interpreter_ends_changes_nothing(number: str) -> None:
    ran = subprocess.run([sys.executable, "-c", _AT_THE_END.format(number=number)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("lapwan ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM], ids=["SIGTERM"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_random_moments(name, number, inputs, tmp_path) -> None:
    (tmp_path / "whole").mkdir()
    started = time.monotonic()
    assert (ran := Program(words(name, inputs, tmp_path / "whole")).wait()).code == 0, ran
    seconds = time.monotonic() - started
    draw = random.Random(name)
    wrong, codes = [], []
    for trial in range(TRIALS):
        folder = tmp_path / str(trial)
        folder.mkdir()
        program = Program(words(name, inputs, folder))
        moment = draw.uniform(0.3, 0.9 * seconds)
        time.sleep(moment)
        program.send_signal(number)
        ran = program.wait()
        codes.append(ran.code)
        found = faults(ran, folder)
        if not found and ran.code == 130 and "nothing was written" not in ran.err:
            again = Program(to_continue(ran)).wait()
            found = [] if again.code == 0 else [f"{to_continue(ran)}: {again}"]
        wrong += [f"after {moment:.2f} of {seconds:.2f} s: {fault}" for fault in found]
    print(f"{name}: {TRIALS - len(wrong)} of {TRIALS} right; exit codes {codes}", *wrong, sep="\n")  # noqa: T201
    assert not wrong, "\n".join(wrong)


_FINALISER = """
import os, signal, time
from lapwan.interrupt import stop_on_signals

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # what is raised in here is lost

stop_on_signals()
try:
    Slow()
    time.sleep(20)
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_signal_in_a_finaliser_is_not_lost():
    started = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", _FINALISER], capture_output=True, text=True, timeout=PATIENCE)
    assert ran.stdout == "stopped\n" and not ran.stderr, ran.stderr
    assert time.monotonic() - started < 15


_LATE = """
import os, signal, sys
from lapwan import cli
from lapwan.__main__ import main

invoke = cli._Commands.invoke

def invoke_and_be_told_late(self, ctx):
    result = invoke(self, ctx)
    type(ctx).exit = lambda self, code=0: os.kill(os.getpid(), signal.SIGINT)
    return result

cli._Commands.invoke = invoke_and_be_told_late
main()
"""


def test_a_signal_after_the_work_says_what_is_written(tmp_path: Path):
    clips = tmp_path / "clips.jsonl"
    clips.write_text('{"caption": "hook cuts"}\n', encoding="utf-8")
    ran = subprocess.run([sys.executable, "-c", _LATE, "label", str(clips), "-o", str(tmp_path / "out.jsonl")],
                         capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 130
    assert ran.stderr.splitlines()[-1].startswith("interrupted; written: ")


_WORKER = """
import sys, time
from pathlib import Path
from lapwan.temporaries import temporary_folder

with temporary_folder(Path(sys.argv[1])):
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_worker_was_writing_is_removed(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", _WORKER, str(tmp_path)], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == b"writing\n"
        workers_write_in(tmp_path)
        remove_of_workers()
        assert list(tmp_path.iterdir())  # it lives: what it writes is its own
        worker.kill()
    remove_of_workers()
    assert not list(tmp_path.iterdir())
