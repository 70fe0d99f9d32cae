"""Preference alignment on a GPU in bf16: offload changes nothing, masters and states lie where asked, it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lapwan.commands import srpo
from lapwan.rewards.build import build_rewards
from lapwan.settings.srpo import SrpoSettings
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS
from lapwan.train.recipe import run_training
from lapwan.train.srpo import recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def trained(folder: Path, name: str, **changes: Any) -> Any:
    prompts = folder / "prompts.txt"
    prompts.write_text("剪刀剪断血管\n电凝钩切割组织\n吸引器清理积血\n抓钳夹住胆囊\n", encoding="utf-8")
    settings = SrpoSettings.model_validate({
        "output": folder / name, "prompts": {"file": prompts}, "rewards": "tiny", "size": (32, 32), "num_frames": 5,
        "steps": 3, "accumulate": 2, "batch_size": 2, "rollout": {"steps": 3, "guidance": 2.0}, "save_every": 1,
        "held_out": {"count": 1, "every": 2}, "device": "cuda", "optimizer": {"lr": 1e-2}, **changes,
    })
    device = torch.device("cuda")
    planned = srpo.plan(settings, device)
    settings.output.mkdir(exist_ok=True)
    rewards = build_rewards(settings.rewards, device, EMBEDDED_REWARD_KINDS)
    trainer = recipe.prepare(settings, planned.base, planned.data, rewards, planned.memory, device)
    run_training(trainer, settings)
    return trainer


def tensors(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in trainer.parameters.items()}


@pytest.fixture
def repeatable(monkeypatch):
    """Kernels that add up in one order: gradients of convolutions, attention and resized frames have others too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # it names operations that have none
    yield
    torch.use_deterministic_algorithms(False)


def test_offload_of_the_idle_noise_expert_changes_no_bit(repeatable, tmp_path):
    both, again, one = (tensors(trained(tmp_path, name, memory=memory))
                        for name, memory in (("both", "both"), ("again", "both"), ("one", "one")))
    assert all(torch.equal(value, again[name]) for name, value in both.items()), "no two runs are alike here"
    for name, value in both.items():
        assert torch.equal(value, one[name]), name


@pytest.mark.parametrize("changes", [
    {"master_weights": "bf16"}, {"optimizer_on_cpu": True},
    {"train": "full", "optimizer_on_cpu": True, "activation_checkpointing": True},
    {"train": "full", "master_weights": "bf16"},
], ids=["bf16", "on cpu", "full on cpu", "full bf16"])
def test_masters_and_states_are_where_they_were_asked_for(tmp_path, changes):
    trainer = trained(tmp_path, "run", **changes)
    assert all(p.is_cuda for p in trainer.parameters.values())
    found = [(p.dtype, one) for p, one in trainer.optimizers["low"].optimizer.state.items()]
    bf16, full = changes.get("master_weights") == "bf16", changes.get("train") == "full"
    for dtype, one in found:
        kept = [value for value in one.values() if isinstance(value, torch.Tensor)]
        wide = not bf16 or (full and dtype == torch.float32)
        assert {value.dtype for value in kept} == {torch.float32 if wide else torch.bfloat16}
        assert {value.device.type for value in kept} == {"cpu" if "optimizer_on_cpu" in changes else "cuda"}
    again = trained(tmp_path, "run", **changes, steps=3, resume=True)
    for name, value in tensors(trainer).items():
        assert torch.equal(value, tensors(again)[name]), name
