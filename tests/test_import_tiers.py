"""Packages import only from the tiers before them, and settings, help and planning stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lapwan

ROOT = Path(lapwan.__file__).parent
TIERS = [
    {"errors", "names", "files", "console", "keyed", "processes"},
    {"settings", "spellings"}, {"lora", "losses"}, {"moe"}, {"wan", "data", "rewards"}, {"sampling"}, {"diagnostics"},
    {"train"}, {"tiny"}, {"evaluation"}, {"commands", "api", "weights"}, {"comparison"}, {"cli"},
]
TIER_OF = {name: index for index, names in enumerate(TIERS) for name in names}
# Within one tier: settings and the low-rank packages do not know each other.
FORBIDDEN = [("lora", "settings"), ("losses", "settings"), ("moe", "settings"), ("losses", "lora"), ("lora", "losses"),
             ("data", "wan")]


def imported(path: Path) -> set[str]:
    """Top-level lapwan packages a file imports, inside functions too; not those for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        if isinstance(node, ast.ImportFrom) and node.module == "lapwan":
            names = [f"lapwan.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lapwan.")}
    return found - {"__version__"}


def violations(files: dict[str, set[str]]) -> list[str]:
    """`package: imports` pairs that go against the tiers; files by package name."""
    bad = []
    for package, names in files.items():
        for name in names - {package}:
            late = TIER_OF[name] > TIER_OF[package]
            if late or (package, name) in FORBIDDEN:
                bad.append(f"{package} imports {name}")
    return bad


def packages() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            found.setdefault(part, set()).update(imported(path))
    return found


def test_imports_go_one_way():
    assert violations(packages()) == []


def test_the_check_sees_an_import_against_the_direction(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from lapwan.train.trainer import Trainer\n    from lapwan import settings\n")
    assert violations({"lora": imported(file)}) == ["lora imports train", "lora imports settings"] or set(
        violations({"lora": imported(file)})) == {"lora imports train", "lora imports settings"}


@pytest.mark.parametrize("statement", [
    "import lapwan.cli", "import lapwan", "from lapwan.wan.folder import read_spec",
    "from lapwan.data.cachefile import load_index", "from lapwan.data.labels import label_caption",
])
def test_no_torch(statement):
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
