"""Each command as users type it, on the device it takes by itself, with a memory cap in GiB: `pytest -m gpu`."""

from __future__ import annotations

import sys

import pytest
import torch

from lapwan import cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def lapwan(monkeypatch, capsys):
    """`lapwan WORDS` in this process; fails where it does not end with 0."""
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["lapwan", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.err

    yield run
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("memory", ["16", "16GiB", "auto", "stream"])
@pytest.mark.parametrize("command", ["train-lora", "train-moe"])
def test_training(command, memory, lapwan, t2v_cache, tmp_path) -> None:
    lapwan(command, "--model", "tiny", "--cache", t2v_cache, "--steps", "1", "--memory", memory, "-o", tmp_path / "run")


@pytest.mark.parametrize("memory", ["16", "auto", "one", "stream"])
def test_generate(memory, lapwan, tmp_path) -> None:
    lapwan("generate", "--model", "tiny", "--prompt", "电凝钩切割组织", "--size", "32x32", "--num-frames", "5",
           "--steps", "2", "--memory", memory, "-o", tmp_path / "out.mp4")


def test_preference_alignment(lapwan, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("剪刀剪断血管\n电凝钩切割组织\n", encoding="utf-8")
    lapwan("srpo", "--prompts", tmp_path / "prompts.txt", "--reward", "tiny", "--size", "32x32", "--steps", "1",
           "--set", "memory=one", "--set", "held_out.count=1", "-o", tmp_path / "run")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_the_device_has_an_index(device) -> None:
    from lapwan.models.device import limit_memory, pick_device

    chosen = pick_device(device)
    assert chosen == torch.device("cuda:0")
    limit_memory(chosen, 16)
    torch.cuda.set_per_process_memory_fraction(1.0)
