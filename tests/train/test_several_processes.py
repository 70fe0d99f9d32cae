"""Two processes (gloo, CPU) take the steps that one would: gradients, weights, metrics, what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import randomise
from two_processes import two_processes

from lapwan.data.taxonomy import load_taxonomy
from lapwan.errors import UserError
from lapwan.names import NoiseExpert
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe
from lapwan.train.lora import recipe as lora_recipe
from lapwan.train.moe import recipe as moe_recipe
from lapwan.train.parallel import ContextParallelProcesses, Distributed, choose_parallelism, join_processes

SETTINGS = {"targets": {"last_blocks": 1, "ffn_last_blocks": 1}, "steps": 2, "turn": 1, "model": "tiny",
            "accumulate": 2, "optimizer": {"lr": 1e-2}, "caption_dropout": 0.3, "roi_weight": 1.0, "ema_decay": 0.9,
            "dropout": {"rank": 0.2}, "max_norm": 0.5, "watch": {"every": 2}}
MIXTURE = {"router": {"sigma": True}, "expert_dropout": 0.3, "routing_loss": {"teacher_kl_end": 0.2},
           "routing_watch": {"every": 4, "after": 0}, "roi_fallback": "motion", "shared_experts": True}
PREVIEW = {"every": 3, "prompts": ["电凝钩切割组织"], "steps": 2, "size": [32, 32], "num_frames": 1, "guidance": 1.0}


def trainer_of(kind: str, cache: Path, run: Path, ranks: Distributed):
    """In fp64 as far as diffusers computes in it: its norms and time embedding take fp32 on the way."""
    model = TrainLoraSettings if kind == "lora" else TrainMoeSettings
    own = {} if kind == "lora" else MIXTURE
    settings = model.model_validate({**SETTINGS, **own, "output": run, "data": {"cache": cache}, "preview": PREVIEW})
    base = resolve_base("tiny")
    data = recipe.read_data(settings, base)
    cpu = torch.device("cpu")
    if kind == "lora":
        trainer = lora_recipe.prepare(settings, base, data, cpu, ranks)
    else:
        trainer = moe_recipe.prepare(settings, base, data, load_taxonomy("surgical4"), cpu, ranks)
    randomise(trainer)
    for adapter in trainer.objective.adapters.values():
        adapter.transformer.double()
    if trainer.ema is not None:
        trainer.ema.means = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    return trainer


def work(rank: int, cache: Path, folder: Path) -> None:
    """One of two processes: both kinds of run, then the gradients of one more step."""
    ranks, _ = join_processes("cpu")
    for name in ("lora", "moe", "lora_tokens", "moe_tokens"):
        kind, _, shares = name.partition("_")
        own = ContextParallelProcesses(rank, 2) if shares else ranks
        trainer = trainer_of(kind, cache, folder / name, own)
        if ranks.first:
            trainer.config.run_folder.mkdir(parents=True)
        ranks.any(False)  # the folder is there before anybody looks into it
        trainer.fit()
        trainer._optimizer_step(NoiseExpert.LOW)
        grads = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
        torch.save(grads, folder / f"{name}_{rank}.pt")
    ranks.close()


def test_two_processes_take_the_steps_of_one(t2v_cache, tmp_path):
    with two_processes(work, t2v_cache, tmp_path):
        alone = {kind: trainer_of(kind, t2v_cache, tmp_path / f"{kind}_alone", Distributed())
                 for kind in ("lora", "moe")}
        for trainer in alone.values():
            trainer.config.run_folder.mkdir()
            trainer.fit()
            trainer._optimizer_step(NoiseExpert.LOW)
    for kind, shares in itertools.product(("lora", "moe"), ("", "_tokens")):
        trainer, name = alone[kind], kind + shares
        # Gates are fp32: of a part of the tokens their gradient has its own rounding, which Adam's first steps, as
        # large for any gradient, carry into the weights. Until then the step is the same.
        exact = name != "moe_tokens"
        grads = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
        for rank in range(2):
            theirs = torch.load(tmp_path / f"{name}_{rank}.pt")
            assert grads.keys() == theirs.keys() and len(grads) > 4
            for key, gradient in grads.items() if exact else ():
                torch.testing.assert_close(theirs[key], gradient, rtol=0, atol=1e-10, msg=key)
        ours, two = (load_file(tmp_path / run / "step_000004" / "state" / "trained.safetensors")
                     for run in (f"{kind}_alone", name))
        for key in ours if exact else ():
            torch.testing.assert_close(two[key], ours[key], rtol=0, atol=1e-10, msg=key)
        assert [p.name for p in sorted((tmp_path / name / "previews").iterdir())] == [
            "step_000003_0.png", "step_000004_0.png"]
        lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
                 for run in (f"{kind}_alone", name)]
        assert [row["noise_expert"] for row in lines[0]] == [row["noise_expert"] for row in lines[1]]
        for one, other in zip(*lines, strict=True):  # the log is of the whole step, not of one process's part
            assert one.keys() == other.keys()
            for key in ("loss", "loss/diffusion", "grad_norm", "own_step") if exact or one is lines[0][0] else ():
                assert other[key] == pytest.approx(one[key], abs=1e-6), key


def test_batches_that_cannot_be_dealt_out_are_refused(t2v_cache, tmp_path):
    settings = TrainLoraSettings.model_validate(
        {**SETTINGS, "accumulate": 3, "output": tmp_path / "run", "data": {"cache": t2v_cache}})
    base = resolve_base("tiny")
    with pytest.raises(UserError, match="accumulate = 3 batches a step cannot be divided evenly among 2 processes"):
        lora_recipe.prepare(settings, base, recipe.read_data(settings, base), torch.device("cpu"), Distributed(0, 2))


def test_tokens_are_shared_where_that_can_be_exact(t2v_cache, tmp_path):
    given = {**SETTINGS, "divide": "tokens", "output": tmp_path / "run", "data": {"cache": t2v_cache}}
    base = resolve_base("tiny")
    settings = TrainLoraSettings.model_validate(given)
    assert choose_parallelism(settings, base, Distributed(1, 2)).local_items([1, 2, 3]) == [1, 2, 3]
    assert type(choose_parallelism(settings, base, Distributed())) is Distributed
    with pytest.raises(UserError, match="3 processes cannot share this model's 4 attention heads"):
        choose_parallelism(settings, base, Distributed(0, 3))
    settings = TrainLoraSettings.model_validate({**given, "dropout": {"neuron": 0.1}})
    with pytest.raises(UserError, match=r"dropout\.neuron draws for all tokens of a clip"):
        choose_parallelism(settings, base, Distributed(0, 2))


def test_an_incomplete_launchers_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE = 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        join_processes("cpu")
