"""A dry run loads no model, so it imports no model's library: they take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cache_clips import make_video

PROGRAM = """
import sys
from lapwan.cli import main
sys.argv[0] = "lapwan"
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("imported:", *(name for name in ("diffusers", "transformers", "torch._dynamo", "sympy") if name in sys.modules))
"""


def imported(*arguments: object, folder: Path, cache: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments), "--dry-run"], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "LAPWAN_CACHE_DIR": str(cache)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("command", ["train-lora", "train-moe"])
def test_of_a_training_imports_neither_diffusers_nor_a_compiler(command, t2v_cache, own_cache, tmp_path) -> None:
    assert imported(command, "--model", "tiny", "--cache", t2v_cache, "--steps", 1, "-o", "run", folder=tmp_path,
                    cache=own_cache) == []


def test_of_cache_imports_neither_diffusers_nor_transformers(own_cache, tmp_path) -> None:
    video = make_video(tmp_path / "clips" / "a.mp4")
    video.with_suffix(".txt").write_text("a hook cuts", encoding="utf-8")
    libraries = imported("cache", "--model", "tiny", "--dataset", "clips", "-o", "cache", folder=tmp_path,
                         cache=own_cache)
    assert not {"diffusers", "transformers"} & set(libraries)


def test_of_srpo_and_generate_imports_no_transformers(own_cache, tmp_path) -> None:
    """Their sigma grids are those of diffusers' schedulers."""
    (tmp_path / "prompts.txt").write_text("a hook cuts\nscissors cut\n", encoding="utf-8")
    srpo = imported("srpo", "--prompts", "prompts.txt", "--reward", "tiny", "-o", "run", "--size", "32x32", "--set",
                    "held_out.count=0", folder=tmp_path, cache=own_cache)
    generate = imported("generate", "--model", "tiny", "--prompt", "a hook", "-o", "a.mp4", folder=tmp_path,
                        cache=own_cache)
    assert "transformers" not in {*srpo, *generate}
