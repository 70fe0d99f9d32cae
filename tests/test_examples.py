"""The research programs in examples/ run from a checkout's root, and the library does not know them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_library_does_not_import_the_examples() -> None:
    importers = []
    for path in (ROOT / "lapwan").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            importers += [path.name for name in names if name.split(".")[0] == "examples"]
    assert importers == []


@pytest.mark.parametrize(("arguments", "expected"), [
    (["examples.comparison", "examples/comparison/comparison.toml", "-o", "{out}", "--dry-run"], "scenes train"),
    (["examples.pretrain", "--help"], "--work"),
])
def test_programs_run_as_modules_from_the_root(arguments, expected, tmp_path) -> None:
    command = [sys.executable, "-m", *(argument.format(out=tmp_path / "out") for argument in arguments)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert expected in done.stdout
