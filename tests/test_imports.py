"""The house: packages import only what lies below them, modules have no circles, a class or type alias has a name of
its own, and settings, help and planning stay free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import lapwan

ROOT = Path(lapwan.__file__).parent
# From the bottom up: a package imports its own level and those before it.
LEVELS = (
    "errors documents faults names console files temporaries interrupt rng distributed",
    "settings losses checkpoints report", "lora", "moe", "models wan data rewards", "memory", "caching sampling",
    "diagnostics", "train", "evaluation", "tiny", "api weights", "commands", "cli cli_aliases __main__",
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
# Numbers in, numbers out: settings stop at whoever calls these.
FORBIDDEN = {("lora", "settings"), ("losses", "settings"), ("moe", "settings"), ("losses", "lora"), ("lora", "losses")}
POSIX_ONLY = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
LARGEST_ROOM, LARGEST_PACKAGE = 26, 312

Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, ast.Module]:
    """Syntax trees by dotted name below `lapwan`; a package by its own name."""
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): ast.parse(path.read_text(encoding="utf-8"))
            for path, name in names.items()}


def imported(tree: ast.Module, known: Iterable[str]) -> Iterator[str]:
    """lapwan's modules that a tree imports, inside functions too; not those for type checking only."""
    skipped = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and
               "TYPE_CHECKING" in ast.dump(block.test) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lapwan":
            base = (node.module or "").removeprefix("lapwan").removeprefix(".")
            for alias in node.names:
                module = f"{base}.{alias.name}".removeprefix(".")
                yield module if module in known else base
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lapwan.") for alias in node.names if alias.name.startswith("lapwan."))


def graph(trees: Mapping[str, ast.Module]) -> Graph:
    """What each module imports of the others."""
    return {name: {other for other in imported(tree, trees) if other not in ("", name)}
            for name, tree in trees.items() if name}


def upward(imports: Graph) -> list[str]:
    """Imports against the direction, or of what a package must not know."""
    bad = []
    for module, others in imports.items():
        package = module.split(".")[0]
        for other in others:
            below = other.split(".")[0]
            if LEVEL_OF[below] > LEVEL_OF[package] or (package, below) in FORBIDDEN:
                bad.append(f"{module} imports {other}")
    return sorted(bad)


def circles(imports: Graph) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    reached: Graph = {}
    for module in imports:
        seen: set[str] = set()
        waiting = list(imports[module])
        while waiting:
            if (other := waiting.pop()) not in seen:
                seen.add(other)
                waiting += imports.get(other, ())
        reached[module] = seen
    groups = {tuple(sorted(other for other in reached if other in reached[module] and module in reached[other]))
              for module in reached if module in reached[module]}
    return sorted(map(list, groups))


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return modules(ROOT)


def test_imports_point_down(trees) -> None:
    assert upward(graph(trees)) == []


def test_there_are_no_circles(trees) -> None:
    assert circles(graph(trees)) == []


def test_a_class_or_type_alias_has_a_name_of_its_own(trees) -> None:
    places = defaultdict(set)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(f"{module}.{node.lineno}")
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
                name = ast.unparse(node.targets[0])
                if re.fullmatch("[A-Z][A-Za-z]*[a-z][A-Za-z]*", name):
                    places[name].add(ast.unparse(node.value))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_rooms_are_small() -> None:
    rooms = {folder: list(folder.glob("*.py")) for folder in (ROOT, *ROOT.rglob("*/"))}
    assert {str(room): len(files) for room, files in rooms.items() if len(files) > LARGEST_ROOM} == {}
    assert sum(len(files) for files in rooms.values()) <= LARGEST_PACKAGE


def posix_only(tree: ast.Module) -> set[str]:
    """Modules of POSIX systems alone that a tree imports without asking for the platform."""
    guarded = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and
               "platform" in ast.dump(block.test) for node in ast.walk(block)}
    names = [name for node in ast.walk(tree) if id(node) not in guarded
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                          [node.module or ""] if isinstance(node, ast.ImportFrom) else [])]
    return POSIX_ONLY & set(names)


def test_modules_of_posix_alone_are_imported_behind_the_platform(trees) -> None:
    assert {name: found for name, tree in trees.items() if (found := posix_only(tree))} == {}
    assert posix_only(ast.parse("import resource\nfrom fcntl import flock")) == {"resource", "fcntl"}
    assert posix_only(ast.parse("if sys.platform != 'win32':\n    import resource")) == set()


def at_import(tree: ast.AST) -> Iterator[str]:
    """The packages that importing a module imports, whatever its functions import later."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.If) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test)):
            yield from at_import(node)


def test_only_a_function_that_draws_imports_matplotlib(trees) -> None:
    assert {name for name, tree in trees.items() if "matplotlib" in at_import(tree)} == set()
    assert list(at_import(ast.parse("def f(): import a\ntry: import b.c\nexcept E: pass"))) == ["b"]


def test_the_checks_see_what_they_forbid() -> None:
    sources = {
        "lora.layer": "def f():\n    from lapwan.train.trainer import Trainer\n    from lapwan import settings\n",
        "train.trainer": "from lapwan.lora import layer\nif TYPE_CHECKING:\n    import lapwan.cli\n", "settings": "",
    }
    imports = graph({name: ast.parse(text) for name, text in sources.items()})
    assert upward(imports) == ["lora.layer imports settings", "lora.layer imports train.trainer"]
    assert circles(imports) == [["lora.layer", "train.trainer"]]


@pytest.mark.parametrize("statement", [
    "import lapwan.cli", "import lapwan", "from lapwan.models.spec import read_spec",
    "from lapwan.caching.read import load_index", "from lapwan.data.labels import label_caption",
])
def test_no_torch(statement) -> None:
    code = f"{statement}\nimport sys\nassert not {{'torch', 'matplotlib', 'filelock'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
