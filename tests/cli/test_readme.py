"""The README's tour is run as it stands there, on few clips and few steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def tour() -> list[list[str]]:
    """The `lapwan ...` lines of the section "A tour", as words."""
    section = README.read_text(encoding="utf-8").split("## A tour")[1].split("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines() if line.startswith("lapwan ")]


def test_the_tour_runs_as_it_stands(tmp_path):
    commands = tour()
    assert [words[0] for words in commands] == [
        "label", "cache", "train-lora", "inspect-weights", "merge", "train-moe", "generate", "generate"]
    code = ("from pathlib import Path\nfrom lapwan.tiny.dataset import write_dataset\n"
            "write_dataset(Path('clips'), clips=8, seed=1, size=(64, 64), frames=17)\n")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    small = {"cache": ["--size", "32x32", "--num-frames", "5"], "generate": ["--size", "32x32", "--num-frames", "5",
                                                                            "--steps", "3"]}
    for words in commands:
        words = ["2" if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]
        done = subprocess.run(
            [sys.executable, "-m", "lapwan", *words, *small.get(words[0], [])], cwd=tmp_path, capture_output=True,
            text=True, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
        )
        assert done.returncode == 0, f"{words}\n{done.stderr}"
    assert (tmp_path / "hook.mp4").stat().st_size > 0 and (tmp_path / "suction.mp4").stat().st_size > 0
    assert (tmp_path / "merged" / "model_index.json").is_file()


def test_the_readme_holds_the_two_commands_that_ci_runs():
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    assert "pip install -e '.[dev]' && pytest\n" in text and "pip install -e '.[dev]' && pytest\n" in ci
    assert "pip install . && lapwan demo\n" in text and "pip install . && lapwan demo" in ci
