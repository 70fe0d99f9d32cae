"""The same command on the same inputs writes the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
from command_line import Ran, Started, run_lapwan
from every_command import COMMANDS, words

from lapwan.files import LOCK_FILE

# Times, and what measures this machine: all that may differ. Of files, TensorBoard's have time and process in the name.
TIMES = ("seconds", "clips_per_second", "peak_gib", "pixels_per_second")
QUICK = ("label", "cache", "train-lora", "merge", "merge to a LoRA", "merge --moe")
UMASK = 0o007  # of the first run; the second has the usual one


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its path; its own path within texts counts as the same."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == LOCK_FILE or path.name.startswith("events.out.tfevents"):
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        if path.name in ("metrics.jsonl", "lapwan_index.jsonl"):
            rows = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in row.items() if k not in TIMES} for row in rows]).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return digests


def run_with_umask(umask: int, *arguments: object) -> Ran:
    """Run a command in this process under another umask."""
    before = os.umask(umask)
    try:
        return run_lapwan(*arguments)
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in COMMANDS])
def test_the_same_command_twice_writes_the_same_bytes(name: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    printed = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        arguments = words(name, inputs, tmp_path / part)
        # The second in a process of its own: its hash tables are in another order.
        ran = run_with_umask(UMASK, *arguments) if part == "a" else Started(*arguments).wait()
        assert ran.code == 0, ran
        printed.append(ran.out.replace(str(tmp_path / part), "FOLDER"))
    for path in (tmp_path / "a").rglob("*"):  # hard links to the user's files keep their permissions
        if path.is_dir() or path.stat().st_nlink == 1 or name.startswith("train"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~UMASK, path
    first, second = (contents(tmp_path / part) for part in ("a", "b"))
    assert {path for path in {*first, *second} if first.get(path) != second.get(path)} == set()
    assert first or name == "doctor"
    if name not in ("cache", "doctor", "demo"):  # these print times and free memory
        assert printed[0] == printed[1]
