"""Training's extras on a GPU in bf16: optimizers, dropout, max-norm, running mean, alpha phases, previews, offload."""

from __future__ import annotations

import gc
import io
import json

import pytest
import torch
from safetensors.torch import load_file

from lapwan.commands import train_lora, train_moe
from lapwan.settings.base import RunOptions
from lapwan.settings.optimizers import AdamW8bitSettings, ScheduleSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.train.objective import ParameterGroup
from lapwan.train.optimizers import ScheduledOptimizer, make_optimizer, make_schedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
EVERYTHING = {
    "model": "tiny", "steps": 6, "turn": 2, "accumulate": 2, "device": "cuda", "ema_decay": 0.9, "max_norm": 0.5,
    "targets": {"last_blocks": 2, "ffn_last_blocks": 1}, "dropout": {"neuron": 0.1, "rank": 0.1, "module": 0.1},
    "watch": {"every": 4}, "weighting": {"kind": "min_snr"}, "sigma": {"strata": 4, "shift": "resolution"},
    "alpha_schedule": {"phases": [{"name": "a", "alpha": 4, "max_steps": 3}, {"name": "b", "alpha": 8}]},
    "preview": {"every": 6, "prompts": ["电凝钩切割组织"], "steps": 3, "size": [32, 32], "num_frames": 5,
                "guidance": 2.0},
}


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["lora", "moe"])
@pytest.mark.parametrize("optimizer", [{"type": "adamw", "lr": 1e-3}, {"type": "automagic", "max_lr": 1e-3}])
@pytest.mark.parametrize("memory", ["both", "one"])
def test_everything_at_once(kind, optimizer, memory, t2v_cache, tmp_path):
    model, command = {"lora": (TrainLoraSettings, train_lora), "moe": (TrainMoeSettings, train_moe)}[kind]
    settings = {**EVERYTHING, "output": tmp_path / "run", "data": {"cache": t2v_cache}, "optimizer": optimizer,
                "memory": memory, "activation_checkpointing": memory == "one"}
    command.run(model.model_validate(settings), RunOptions())
    lines = rows(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert torch.isfinite(torch.tensor([line["loss"], line["grad_norm"], line["peak_gib"]])).all()
    assert lines[-1]["alpha/value"] == 8.0 and lines[-1]["weights/high/mean_abs_B"] > 0
    assert len(list((tmp_path / "run" / "previews").iterdir())) == 2
    more = model.model_validate({**settings, "resume": True, "allow_changed": True, "steps": 8})
    command.run(more, RunOptions())
    assert rows(tmp_path / "run")[-1]["step"] == 16


def test_offload_changes_nothing_but_the_memory(t2v_cache, tmp_path):
    found = {}
    for memory in ("both", "one"):
        gc.collect()  # the run before must not count in this one's peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = tmp_path / memory
        train_lora.run(TrainLoraSettings.model_validate({
            "model": "tiny", "output": run, "data": {"cache": t2v_cache}, "steps": 4, "turn": 2, "memory": memory,
            "device": "cuda", "dtype": "fp32", "targets": {"last_blocks": 1, "ffn_last_blocks": 1},
            "optimizer": {"lr": 1e-3}}), RunOptions())
        found[memory] = load_file(run / "lapwan_low_noise.safetensors"), torch.cuda.max_memory_allocated()
    for name, tensor in found["both"][0].items():
        # Kernels add in any order, which AdamW's first steps enlarge; weights left behind differ by steps of 1e-3.
        torch.testing.assert_close(found["one"][0][name], tensor, rtol=1e-4, atol=1e-5)
    # What one at a time saves is the idle noise expert's weights: 10.3 MB in bf16 on the disk, twice that in fp32.
    assert found["both"][1] - found["one"][1] > 0.9 * 2 * 10.2e6


def test_8_bit_adamw_goes_on_from_its_state_bit_for_bit():
    """Through the file a checkpoint is, with matrices large enough for 8 bits (4096 elements) and one that is not."""
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.down": (8, 1024), "a.up": (1024, 8), "b.down": (4, 64)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = [{n: torch.randn(s, generator=generator).cuda() for n, s in shapes.items()} for _ in range(6)]

    def made():
        weights = {name: torch.nn.Parameter(value.cuda()) for name, value in start.items()}
        optimizer = make_optimizer(AdamW8bitSettings(lr=1e-2, lora_plus=2.0), [ParameterGroup(weights)])
        return weights, optimizer, make_schedule(ScheduleSettings(name="cosine", warmup_steps=2), optimizer, 6)

    def train(weights, optimizer, schedule, steps):
        for own in steps:
            for name, weight in weights.items():
                weight.grad = own[name].clone()
            optimizer.step()
            schedule.step()

    whole, part = made(), made()
    train(*whole, gradients)
    train(*part, gradients[:3])
    file = io.BytesIO()
    torch.save({"optimizer": part[1].state_dict(), "schedule": part[2].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    again = made()
    with torch.no_grad():
        for name, weight in again[0].items():
            weight.copy_(part[0][name])
    ScheduledOptimizer(again[1], again[2]).restore(saved["optimizer"], saved["schedule"], keep_hyperparameters=False)
    train(*again, gradients[3:])
    assert all(torch.equal(weight, again[0][name]) for name, weight in whole[0].items())
    assert any(value.dtype == torch.uint8 for state in whole[1].state.values() for value in state.values()
               if isinstance(value, torch.Tensor))
