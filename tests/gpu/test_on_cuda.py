"""The road on a GPU in bf16: `pytest -m gpu`. What differs from the CPU: precision, devices and autograd's threads."""

from __future__ import annotations

import json

import pytest
import torch

from lapwan.data.taxonomy import load_taxonomy
from lapwan.names import NoiseExpert
from lapwan.train.moe import recipe as moe_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_and_a_video(succeed, t2v_cache, tmp_path):
    small = ("--set", "targets.last_blocks=2", "--set", "targets.ffn_last_blocks=1", "--steps", "3", "--lr", "1e-3")
    succeed("train-lora", "--cache", t2v_cache, "-o", "gpu", *small)
    succeed("train-lora", "--cache", t2v_cache, "-o", "cpu", "--device", "cpu", *small)
    # The same keyed draws on both machines: the losses agree to bf16's precision.
    for ours, theirs in zip(rows(tmp_path / "gpu"), rows(tmp_path / "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
    succeed("train-moe", "--cache", t2v_cache, "-o", "moe", "--set", "activation_checkpointing=true", *small)
    succeed("generate", "--model", "tiny", "--moe", "moe/lapwan.safetensors", "--prompt", "电凝钩切割组织",
           "--size", "32x32", "--num-frames", "5", "--steps", "3", "-o", "x.mp4")
    assert (tmp_path / "x.mp4").stat().st_size > 0


@pytest.mark.parametrize("noise_expert", list(NoiseExpert))
def test_recomputation_on_autograds_threads_meets_the_gates_of_its_forward(noise_expert, t2v_cache, tmp_path):
    from lapwan.settings.train_moe import TrainMoeSettings
    from lapwan.tiny.resolve import resolve_base
    from lapwan.train import recipe
    from lapwan.train.objective import make_draws

    grads = []
    for recompute in (False, True):
        settings = TrainMoeSettings.model_validate({
            "model": "tiny", "output": tmp_path / "run", "data": {"cache": t2v_cache}, "steps": 1, "dtype": "fp32",
            "activation_checkpointing": recompute, "router": {"top_k": 4},
            "targets": {"last_blocks": 2, "ffn_last_blocks": 1}})
        base = resolve_base("tiny")
        data = recipe.read_data(settings, base)
        trainer = moe_recipe.prepare(settings, base, data, load_taxonomy("surgical4"), torch.device("cuda"))
        with torch.no_grad():
            for name, parameter in trainer.parameters.items():
                if name.endswith(".up"):
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        batch = trainer.data.load_batch([0, 1])
        trainer.objective.prepare(noise_expert, [batch])
        stream = trainer.data.streams[noise_expert]
        draws = make_draws(batch, [(0, noise_expert.value, 0, clip) for clip in batch.ids], stream.sigma_rule)
        with trainer.objective.loss(noise_expert, batch, draws) as loss:
            loss.total_B.mean().backward()
        grads.append({n: p.grad.cpu() for n, p in trainer.parameters.items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=1e-4, atol=1e-6, msg=name)
