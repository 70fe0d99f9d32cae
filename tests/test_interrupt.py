"""SIGTERM, SIGHUP and Ctrl-C in every command: exit code 130, nothing partial, and a command that goes on."""

from __future__ import annotations

import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import Ran
from every_command import COMMANDS, words
from forkserver import PATIENCE

from lapwan.files import LOCK_FILE
from lapwan.temporaries import is_temporary

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
    return [fault for fault, holds in {
        f"exit code {ran.code}": ran.code not in (0, 130),
        f"a traceback: {ran.err[-1500:]}": "Traceback" in ran.err + ran.out or "Exception ignored" in ran.err,
        f"last line {last!r}": ran.code == 130 and not last.startswith("interrupted"),
        f"left behind: {hidden}": bool(hidden),
        f"temporaries: {hidden}": any(map(is_temporary, hidden)),
    }.items() if holds]


def to_continue(ran: Ran) -> list[str]:
    """The arguments of the command that the last line names."""
    command = re.split(r"(?:continue with|to continue:) lapwan ", ran.err.strip().splitlines()[-1])[-1]
    return shlex.split(command)


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
        moment = draw.uniform(0.1, seconds)
        time.sleep(moment)
        program.send_signal(number)
        ran = program.wait()
        codes.append(ran.code)
        found = faults(ran, folder)
        if not found and ran.code == 130 and "nothing was written" not in ran.err:
            again = Program(to_continue(ran)).wait()
            found = [] if again.code == 0 else [f"{to_continue(ran)}: {again}"]
        wrong += [f"after {moment:.2f} of {seconds:.2f} s: {fault}" for fault in found]
    print(f"{name}: {TRIALS - len(wrong)} of {TRIALS} right; exit codes {codes}")  # noqa: T201
    assert not wrong, "\n".join(wrong)
