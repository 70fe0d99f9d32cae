"""The same command on the same inputs writes the same bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from command_line import Started, run_lapwan
from every_command import COMMANDS, words

from lapwan.files import LOCK_FILE

# Times, and what measures this machine: all that may differ. Of files, TensorBoard's have time and process in the name.
TIMES = ("seconds", "clips_per_second", "peak_gib")
SLOW = ("demo",)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its path; its own path within texts counts as the same."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == LOCK_FILE or path.name.startswith("events.out.tfevents"):
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in row.items() if k not in TIMES} for row in rows]).encode()
        digests[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return digests


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS])
def test_the_same_command_twice_writes_the_same_bytes(name: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    printed = []
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        arguments = words(name, inputs, tmp_path / part)
        # The second in a process of its own: its hash tables are in another order.
        ran = run_lapwan(*arguments) if part == "a" else Started(*arguments).wait()
        assert ran.code == 0, ran
        printed.append(ran.out.replace(str(tmp_path / part), "FOLDER"))
    first, second = (contents(tmp_path / part) for part in ("a", "b"))
    assert {path for path in {*first, *second} if first.get(path) != second.get(path)} == set()
    assert first or name == "doctor"
    if name not in ("cache", "doctor", "demo"):  # these print times and free memory
        assert printed[0] == printed[1]
