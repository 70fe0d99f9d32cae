"""The settings files of examples/ as they were in 2026-11 pass their checks on the random base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import run_successfully
from net_cases import ARTEFACTS, EXAMPLES

FILES = sorted((ARTEFACTS / EXAMPLES).glob("*.toml"))


def test_they_are_all_there() -> None:
    assert len(FILES) == 9


@pytest.mark.parametrize("example", FILES, ids=lambda path: path.name)
def test_an_old_example_passes_a_dry_run(net: Path, example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    command = re.search(r"lapwan (\S+) --config", text)
    assert command is not None, f"{example} does not say its command in a comment"
    config = net / example.name
    config.write_text(text.replace('model = "tiny"', 'model = "base"'), encoding="utf-8")
    before = sorted(path for path in net.rglob("*") if path.is_file())
    outcome = run_successfully(command[1], "--config", config, "--dry-run", "--overwrite")
    assert "error" not in outcome.err.lower()
    assert sorted(path for path in net.rglob("*") if path.is_file()) == before
