"""What a mixture's settings do, each as a contract."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from training_cases import backward, draws_for, edited_cache, randomise

from lapwan.commands import train_moe
from lapwan.data.taxonomy import load_taxonomy
from lapwan.errors import UserError
from lapwan.lora.formats import read_lora
from lapwan.moe.mixture_file import read_mixture
from lapwan.names import NoiseExpert
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe
from lapwan.train.moe.objective import MixtureWeights
from lapwan.train.moe.recipe import check_mixture, mixture_rows

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
ONE_BLOCK = {"targets": {"last_blocks": 1, "ffn_last_blocks": 1}}


def doubled(trainer):
    """In fp64 as far as diffusers computes in it: its norms and time embedding take fp32 on the way."""
    for adapter in trainer.objective.adapters.values():
        adapter.transformer.double()
    trainer.objective.mixture.double()
    return trainer


@pytest.mark.parametrize("router", [{"top_k": 2, "sigma": True}, {"kind": "label", "top_k": 1}])
def test_accumulated_batches_are_the_large_batch_to_1e_10(make_moe, t2v_cache, router):
    """Gradients of every term, usage, totals; with dropout of experts and regions from motion."""
    found = []
    for batch_size, accumulate in ((2, 1), (1, 2)):
        trainer = doubled(make_moe(
            **ONE_BLOCK, batch_size=batch_size, accumulate=accumulate, router=router, expert_dropout=0.5,
            roi_fallback="motion", routing_loss={"entropy": 0.5, "entropy_floor": 5.0}, max_grad_norm=1e9,
            data={"cache": t2v_cache, "balance": 1.0}))
        randomise(trainer)
        trainer._optimizer_step(LOW)
        grads = {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
        found.append(grads | {"usage": trainer.objective.usage_E, "totals": trainer.objective.totals.flat})
    assert found[0].keys() == found[1].keys() and any(name.startswith("router") for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-10, msg=name)


def test_the_diffusion_loss_alone_reaches_what_a_router_makes_of_sigma(make_moe):
    trainer = make_moe(**ONE_BLOCK, router={"sigma": True, "top_k": 4})
    randomise(trainer)
    grads = backward(trainer, HIGH, [0, 1], only="loss/diffusion")
    assert float(grads["router.sigma.weight"].abs().max()) > 0


def test_shared_experts_are_one_set_of_parameters_that_both_noise_experts_train(make_moe):
    trainer = make_moe(**ONE_BLOCK, shared_experts=True, steps=2, optimizer={"lr": 1e-2}, save_every=100)
    separate = make_moe(**ONE_BLOCK)
    count = sum(p.numel() for n, p in trainer.parameters.items() if n.endswith((".down", ".up")))
    assert 2 * count == sum(p.numel() for n, p in separate.parameters.items() if n.endswith((".down", ".up")))
    for noise_expert in NoiseExpert:
        randomise(trainer)
        assert any(n.startswith("experts.") and float(g.abs().max()) > 0
                   for n, g in backward(trainer, noise_expert, [0]).items())
    trainer.config.run_folder.mkdir()
    trainer.fit()
    again = read_mixture(trainer.config.run_folder / "lapwan.safetensors", resolve_base("tiny"))
    for family in again.families:
        one, other = (again.states[e][family] for e in NoiseExpert)
        assert one.fingerprint() == other.fingerprint()
        high = trainer.objective.adapters[HIGH].state(family)
        assert high.fingerprint() == trainer.objective.adapters[LOW].state(family).fingerprint() == one.fingerprint()
    rows = [json.loads(line) for line in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["noise_expert"] for row in rows} == {"high", "low"}


@pytest.mark.parametrize(("change", "message"), [
    ({"shared_experts": True, "low": {"optimizer": {"lr": 1e-3}}}, r"\[high\] and \[low\] differ in optimizer"),
    ({"shared_experts": True, "noise_experts": ["low"]}, "needs both noise experts"),
    ({"router": {"kind": "rule", "sigma": True}}, "whose gates are the labels"),
    ({"router": {"gate_ema": 0.5}}, "unless sigma = true"),
    ({"expert_targets": {"hook": {"z": 4}}}, "expert_targets.hook.z"),
    ({"noise_experts": ["low"], "init_lora": {"high": "x.safetensors"}}, "init_lora.high is given"),
])
def test_settings_that_contradict_each_other_are_refused(change, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        TrainMoeSettings.model_validate({"output": tmp_path, "data": {"cache": tmp_path}, "steps": 1, **change})


def test_experts_have_the_ranks_their_family_was_given(make_moe):
    trainer = make_moe(**ONE_BLOCK, expert_targets={"hook": {"q": 16}, "other": {"q": 1, "ffn_in": 0}})
    adapter = trainer.objective.adapters[HIGH]
    ranks = {family: {path: entry.rank for path, entry in adapter.state(family).entries.items()}
             for family in ("scissors", "hook", "other")}
    path = "blocks.7.attn1.to_q"
    assert [ranks[f][path] for f in ranks] == [8, 16, 1]
    assert "blocks.7.ffn.net.0.proj" in ranks["hook"] and "blocks.7.ffn.net.0.proj" not in ranks["other"]
    randomise(trainer)
    assert all(bool(torch.isfinite(g).all()) for g in backward(trainer, HIGH, [0, 1]).values())


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_experts_start_as_the_stage_1_lora_at_any_rank(make_lora, make_moe, tmp_path, rank):
    """ΔW of every expert is the LoRA's: exactly at its rank or above, the largest singular values below."""
    stage1 = make_lora(**ONE_BLOCK, output=tmp_path / "stage1")
    randomise(stage1)
    stage1.config.run_folder.mkdir()
    stage1.save()
    files = {e: tmp_path / "stage1" / f"lapwan_{e.file_suffix}.safetensors" for e in NoiseExpert}
    targets = {**ONE_BLOCK["targets"], **dict.fromkeys(("q", "k", "v", "o", "ffn_in"), rank)}
    trainer = make_moe(targets=targets, init_lora=files, alpha=3.0)
    [lora] = read_lora(files[LOW]).values()
    for family in trainer.objective.mixture.families:
        state = trainer.objective.adapters[LOW].state(family)
        for path, entry in state.entries.items():
            want = lora.entries[path].delta(torch.float64)
            assert entry.rank == rank and entry.alpha == 3.0
            if rank < lora.entries[path].rank:
                u, s, vh = torch.linalg.svd(want, full_matrices=False)
                want = u[:, :rank] * s[:rank] @ vh[:rank]
            torch.testing.assert_close(entry.delta(torch.float64), want, rtol=1e-4, atol=1e-6)


def test_a_lora_that_is_merged_already_is_no_start(make_lora, tmp_path, t2v_cache):
    stage1 = make_lora(**ONE_BLOCK, output=tmp_path / "stage1")
    stage1.config.run_folder.mkdir()
    stage1.save()
    files = {e.value: str(tmp_path / "stage1" / f"lapwan_{e.file_suffix}.safetensors") for e in NoiseExpert}
    settings = TrainMoeSettings.model_validate({
        "model": {"model": "tiny", "lora": files}, "init_lora": files, "output": tmp_path / "run", "steps": 1,
        "data": {"cache": t2v_cache}})
    base = resolve_base(settings.model)
    with pytest.raises(UserError, match=r"init_lora.high = .* is already merged into the model"):
        check_mixture(settings, base, recipe.read_data(settings, base), load_taxonomy("surgical4"))


def test_expert_dropout_keeps_a_clips_sum_and_never_takes_the_last_expert(make_moe):
    objective = make_moe(**ONE_BLOCK, expert_dropout=0.5).objective
    mix = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64).expand(400, 4)
    keys = [(0, "high", visit, "clip") for visit in range(400)]
    dropped = objective.drop_experts(mix, keys)
    torch.testing.assert_close(dropped.sum(dim=1), torch.ones(400, dtype=torch.float64))
    kinds = Counter(tuple(round(x, 3) for x in row) for row in dropped.tolist())
    assert set(kinds) == {(0.6, 0.4, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)}
    assert all(60 <= kinds[kind] <= 140 for kind in ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)))  # a quarter each
    assert torch.equal(objective.drop_experts(mix[:7], keys[3:10]), dropped[3:10])  # by visit, not by place
    assert torch.equal(objective.drop_experts(mix, ()), mix)  # validation


def test_the_teachers_weight_goes_in_a_straight_line_and_is_the_terms(make_moe):
    weights = MixtureWeights(teacher_kl=1.0, teacher_kl_end=0.2, steps=9)
    assert [weights.teacher_at(step) for step in (0, 4, 8, 20)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    trainer = make_moe(**ONE_BLOCK, steps=2, turn=1, routing_loss={"teacher_kl": 2.0, "teacher_kl_end": 0.5})
    shares = []
    for _ in range(4):
        batch = trainer.data.load_batch([1])
        trainer.objective.prepare(HIGH, [batch])
        with trainer.objective.loss(HIGH, batch, draws_for(trainer, HIGH, batch)) as loss:
            shares.append(float(loss.terms["loss/teacher_kl"].detach() / loss.figures["loss/teacher_kl"]))
            assert float(loss.figures["metrics/teacher_kl_weight"]) == pytest.approx(shares[-1], rel=1e-5)
    assert shares == pytest.approx([2.0, 1.5, 1.0, 0.5], rel=1e-5)


def test_entropy_is_of_the_router_before_top_k(make_moe):
    terms = []
    for k in (1, 2, 4):
        trainer = make_moe(**ONE_BLOCK, router={"top_k": k}, routing_loss={"entropy": 1.0, "entropy_floor": 3.0})
        batch = trainer.data.load_batch([0, 1])
        trainer.objective.prepare(LOW, [batch])
        with trainer.objective.loss(LOW, batch, draws_for(trainer, LOW, batch)) as loss:
            h_B = loss.figures["loss/routing_entropy"]
            torch.testing.assert_close(loss.terms["loss/routing_entropy"].detach(), 3.0 - h_B)
            terms.append(h_B)
        assert float(h_B.min()) > 1.2  # a fresh router is unsure, although with k = 1 only one expert acts
    assert torch.equal(terms[0], terms[1]) and torch.equal(terms[0], terms[2])


def test_losses_by_family_are_those_clips_losses(make_moe):
    trainer = make_moe(**ONE_BLOCK)
    batch = trainer.data.load_batch([0, 1, 2])
    trainer.objective.prepare(LOW, [batch])
    with trainer.objective.loss(LOW, batch, draws_for(trainer, LOW, batch)) as loss:
        for i, family in enumerate(("scissors", "hook", "suction")):
            assert torch.equal(loss.figures[f"loss_by_family/{family}"], loss.figures["loss/diffusion"][i : i + 1])
        assert loss.figures["loss_by_family/other"].numel() == 0


def skewed(items):
    """Nine clips of scissors, one of hook."""
    many = [replace(items[0], id=f"{items[0].id}-{i}", fallback=False) for i in range(9)]
    return [*many, replace(items[1], fallback=False)]


def test_balanced_sampling_draws_families_evenly_and_says_how_uneven_they_are(
    make_moe, make_lora, tmp_path, t2v_cache, caplog):
    cache = edited_cache(t2v_cache, tmp_path / "skewed", skewed)
    for make in (make_moe, make_lora):  # a plain LoRA draws in the same order
        for power, share in ((0.0, 0.1), (1.0, 0.5), (0.5, 0.25)):
            trainer = make(**ONE_BLOCK, data={"cache": cache, "balance": power})
            groups, _ = trainer.data.streams[HIGH].order.batches((0, 0), 1000)
            drawn = sum(trainer.data.item_ids[v.item] == "clip1" for group in groups for v in group) / 1000
            assert drawn == pytest.approx(share, abs=0.05)
    settings = TrainMoeSettings.model_validate(
        {"output": tmp_path / "r", "steps": 1, "data": {"cache": cache}, "optimizer": {"lr": 2e-3}})
    data = recipe.read_data(settings, resolve_base("tiny"))
    with caplog.at_level(logging.WARNING):
        rows = mixture_rows(settings, data, load_taxonomy("surgical4"))
    assert rows[0].text == "4, by clips: scissors 9, hook 1, suction 0, other 0; imbalance (largest / smallest) inf"
    for balance, text in ((1.0, "families are drawn equally often"), (0.5, "more often (data.balance = 0.5)")):
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"balance": balance})})
        assert mixture_rows(settings, data, load_taxonomy("surgical4"))[0].text.endswith(text)


def test_clips_without_labels_cannot_be_balanced(make_lora, tmp_path, t2v_cache):
    cache = edited_cache(t2v_cache, tmp_path / "bare", lambda items: [
        replace(item, label=None, label_weights=None) for item in items])
    with pytest.raises(UserError, match=r"data.balance = 1 draws clips by family, but clip clip0 has no label"):
        make_lora(data={"cache": cache, "balance": 1.0})


def test_a_region_from_motion_stands_in_only_where_there_is_none(make_moe, make_lora):
    for make in (make_moe, make_lora):
        plain, motion = make(**ONE_BLOCK, roi_weight=3.0), make(**ONE_BLOCK, roi_weight=3.0, roi_fallback="motion")
        own, other = (trainer.data.load_batch([0, 1]).roi_BTHW for trainer in (plain, motion))
        assert torch.equal(own[0], other[0])  # clip 0 has boxes of its own
        assert float(own[1].sum()) == 0.0 and 0 < float(other[1].mean()) < 0.6


def test_the_plan_says_that_the_region_loss_is_off(tmp_path, t2v_cache, capsys):
    from lapwan.settings.base import RunOptions
    cache = edited_cache(t2v_cache, tmp_path / "bare", lambda items: [replace(item, roi=None) for item in items])
    for fallback, said in (("none", "so it is off"), ("motion", "use their moving parts")):
        settings = TrainMoeSettings.model_validate({
            **ONE_BLOCK, "output": tmp_path / "run", "steps": 1, "data": {"cache": cache}, "roi_fallback": fallback})
        train_moe.run(settings, RunOptions(dry_run=True))
        err = capsys.readouterr().err
        assert "0 of 4 clips have a region" in err.replace("\n", " ") and said in " ".join(err.split())


@pytest.mark.parametrize(("lr", "scale", "kind", "warned"), [
    (1e-4, 10.0, "text", False), (2e-3, 10.0, "text", True), (2e-3, 0.5, "text", False), (2e-3, 10.0, "linear", False)])
def test_a_router_that_learns_too_fast_is_warned_about(make_moe, capsys, t2v_cache, tmp_path, lr, scale, kind, warned):
    settings = TrainMoeSettings.model_validate({
        "output": tmp_path / "r", "steps": 1, "data": {"cache": t2v_cache}, "optimizer": {"lr": lr},
        "router": {"lr_scale": scale, "kind": kind}})
    mixture_rows(settings, recipe.read_data(settings, resolve_base("tiny")), load_taxonomy("surgical4"))
    assert ("lr x router.lr_scale = 0.02, above 0.005" in " ".join(capsys.readouterr().err.split())) is warned


def test_what_is_watched_is_in_the_log_and_on_the_board(make_moe):
    trainer = make_moe(**ONE_BLOCK, steps=12, turn=1, batch_size=2, optimizer={"lr": 1e-2}, save_every=100,
                       routing_watch={"every": 12, "after": 12}, watch={"every": 12}, router={"top_k": 4})
    trainer.config.run_folder.mkdir()
    trainer.fit()
    rows = [json.loads(line) for line in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]
    users = {"loss/diffusion", "loss/routing_entropy", "loss/routing_load_balance", "loss/teacher_kl",
             *(f"metrics/expert_usage_{f}" for f in ("scissors", "hook", "suction", "other"))}
    assert all(users <= row.keys() | {"loss/teacher_kl"} for row in rows)
    last = rows[-1]
    assert last["step"] == 24 and last["routing/clips"] == 24
    assert sum(last[f"routing/usage/{f}"] for f in ("scissors", "hook", "suction", "other")) == pytest.approx(1)
    confusion = {k: v for k, v in last.items() if k.startswith("routing/confusion/")}
    assert len(confusion) == 16 and sum(confusion.values()) == 18  # a quarter of the clips are fallbacks
    assert {k for k in last if k.startswith("timestep_gate/low/w_at_")} and "routing/usage_of/hook/hook" in last
    for figure in ("grad_norm_of/hook", "weights/high/delta_norm_of/hook", "weights/low/overlap/scissors-hook"):
        assert math.isfinite(last[figure])
    mean = sum(row["loss/routing_entropy"] for row in rows[12:]) / 12
    assert last["routing/entropy"] == pytest.approx(mean, abs=1e-5)


def test_gradients_by_expert_are_the_parts_of_the_whole(make_moe):
    trainer = make_moe(**ONE_BLOCK, routing_watch={"every": 1}, router={"kind": "rule"}, max_grad_norm=1e9)
    randomise(trainer)
    figures = trainer._optimizer_step(HIGH)
    norms = {n.removeprefix("grad_norm_of/"): float(v) for n, v in figures.items() if n.startswith("grad_norm_of/")}
    assert set(norms) == {"scissors", "hook", "suction", "other"} and sum(v > 0 for v in norms.values()) == 1
    lora = [p.grad.square().sum() for n, p in trainer.parameters.items() if p.grad is not None and "timestep" not in n]
    assert max(norms.values()) == pytest.approx(float(torch.stack(lora).sum().sqrt()), rel=1e-5)


def test_previews_with_a_hint_for_each_family(make_moe):
    preview = {"every": 2, "prompts": ["电凝钩切割组织"], "hints": "families", "steps": 2, "size": [32, 32],
               "num_frames": 1, "guidance": 1.0}
    trainer = make_moe(**ONE_BLOCK, steps=1, preview=preview, optimizer={"lr": 3e-2}, router={"kind": "rule"})
    randomise(trainer, 0.2)
    trainer.config.run_folder.mkdir()
    trainer.fit()
    made = {p.name: p.read_bytes() for p in (trainer.config.run_folder / "previews").iterdir()}
    assert set(made) == {"step_000002_0.png", *(f"step_000002_0_{f}.png" for f in trainer.objective.mixture.families)}


@pytest.mark.parametrize(("change", "message"), [
    ({"router": {"top_k": 5}}, "router.top_k = 5, but taxonomy surgical4 has 4 families"),
    ({"expert_targets": {"hok": {"q": 2}}}, r"expert_targets.hok is not a family of surgical4 \(did you mean 'hook'"),
])
def test_what_does_not_fit_the_taxonomy_is_refused(tmp_path, t2v_cache, change, message):
    settings = TrainMoeSettings.model_validate(
        {"output": tmp_path / "run", "steps": 1, "data": {"cache": t2v_cache}, **change})
    base = resolve_base("tiny")
    with pytest.raises(UserError, match=message):
        check_mixture(settings, base, recipe.read_data(settings, base), load_taxonomy("surgical4"))


def test_temperature_knots_decay_and_lr_scales_are_what_the_settings_say(make_moe):
    trainer = make_moe(**ONE_BLOCK, router={"temperature": 0.5, "lr_scale": 3.0}, optimizer={"lr": 1e-3},
                       timestep_gate={"knots": 5, "lr_scale": 2.0}, routing_loss={"usage_decay": 0.5})
    mixture, optimizers = trainer.objective.mixture, trainer.optimizers
    assert mixture.timestep_gate(HIGH).values_K.shape == (5,)
    batch = trainer.data.load_batch([0])
    sharp = mixture.route(batch.text)
    mixture.router.temperature = 1.0
    torch.testing.assert_close(sharp, torch.softmax(2.0 * mixture.route(batch.text).log(), dim=-1))
    mixture.router.temperature = 0.5
    assert [group["lr"] for group in optimizers["router"].optimizer.param_groups] == [pytest.approx(3e-3)]
    assert sorted(group["lr"] for group in optimizers["high"].optimizer.param_groups) == pytest.approx([1e-3, 2e-3])
    trainer.objective.prepare(HIGH, [batch])
    used = mixture.select(mixture.route(batch.text))[0].double()
    torch.testing.assert_close(trainer.objective.usage_E, 0.5 * 0.25 + 0.5 * used.detach(), rtol=0, atol=1e-7)


def test_thresholds_and_windows_are_what_the_settings_say(make_moe):
    watched = {"every": 6, "after": 0, "entropy": 5.0, "least_usage": 0.9, "most_usage": 0.95, "teacher_kl": 1e-3}
    trainer = make_moe(**ONE_BLOCK, steps=6, turn=1, batch_size=2, routing_watch=watched)
    trainer.config.run_folder.mkdir()
    trainer.fit()  # windows of 12 clips are too small to judge four experts by, so the second look judges 24
    kinds = [fault.kind for fault in trainer.callbacks["routing"].faults]
    assert kinds == ["collapse", *["underuse"] * 4, "divergence"]
    rows = [json.loads(line) for line in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "routing/clips" in row] == [12] and rows[-1]["routing/faults"] == 6
