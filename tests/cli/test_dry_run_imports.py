"""A dry run loads no model, so it imports no model's library: they take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cache_clips import make_video, write_jsonl

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
    make_video(tmp_path / "a.mp4")
    write_jsonl(tmp_path / "labels.jsonl", [{"video_path": "a.mp4", "caption": "a hook cuts"}])
    libraries = imported("cache", "--model", "tiny", "--dataset", "labels.jsonl", "-o", "cache", folder=tmp_path,
                         cache=own_cache)
    assert not {"diffusers", "transformers"} & set(libraries)


def test_of_generate_and_a_second_of_srpo_import_no_transformers(own_cache, tmp_path) -> None:
    """Their sigma grids are those of diffusers' schedulers. The first of srpo traces the VAE, which is diffusers'."""
    (tmp_path / "prompts.txt").write_text("a hook cuts\nscissors cut\n", encoding="utf-8")
    generate = imported("generate", "--model", "tiny", "--prompt", "a hook", "-o", "a.mp4", folder=tmp_path,
                        cache=own_cache)
    _, srpo = (imported("srpo", "--prompts", "prompts.txt", "--reward", "tiny", "-o", "run", "--size", "32x32", "--set",
                        "held_out.count=0", folder=tmp_path, cache=own_cache) for _ in range(2))
    assert "transformers" not in {*srpo, *generate}
