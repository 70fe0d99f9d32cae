"""Each command as users type it, on the device it takes by itself, with a memory cap in GiB: `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from lapwan.models.device import limit_memory, pick_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def no_cap_afterwards():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("memory", ["16", "16GiB", "auto", "stream"])
@pytest.mark.parametrize("command", ["train-lora", "train-moe"])
def test_training(command, memory, succeed, t2v_cache, tmp_path) -> None:
    run = tmp_path / "run"
    succeed(command, "--model", "tiny", "--cache", t2v_cache, "--steps", "1", "--memory", memory, "-o", run)
    assert list(run.glob("lapwan*.safetensors"))


@pytest.mark.parametrize("memory", ["16", "auto", "one", "stream"])
def test_generate(memory, succeed, tmp_path) -> None:
    succeed("generate", "--model", "tiny", "--prompt", "电凝钩切割组织", "--size", "32x32", "--num-frames", "5",
            "--steps", "2", "--memory", memory, "-o", tmp_path / "out.mp4")
    assert (tmp_path / "out.mp4").is_file()


def test_preference_alignment(succeed, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("剪刀剪断血管\n电凝钩切割组织\n", encoding="utf-8")
    succeed("srpo", "--prompts", tmp_path / "prompts.txt", "--reward", "tiny", "--size", "32x32", "--steps", "1",
            "--set", "memory=one", "--set", "held_out.count=1", "-o", tmp_path / "run")
    assert list((tmp_path / "run").glob("lapwan*.safetensors"))


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_the_device_has_an_index(device) -> None:
    chosen = pick_device(device)
    assert chosen == torch.device("cuda:0")
    limit_memory(chosen, 16)
