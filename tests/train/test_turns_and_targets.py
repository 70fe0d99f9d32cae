"""Turns, phases and shares; targets by pattern; dropout, max-norm, running mean, going on from a LoRA."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from training_cases import backward, draws_for, randomise

from lapwan.errors import UserError
from lapwan.lora.dropout import Dropout, DropoutRates
from lapwan.lora.formats import open_lora
from lapwan.lora.targets import resolve_patterns
from lapwan.models.base import target_ranks
from lapwan.names import NoiseExpert
from lapwan.settings.model import BaseModelSettings
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train.checklist import plan_rows
from lapwan.train.recipe import RunData, read_data
from lapwan.train.schedule import interleave

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def data_of(cache, **changes) -> tuple[TrainLoraSettings, RunData]:
    settings = TrainLoraSettings.model_validate({"output": "run", "data": {"cache": cache}, "model": "tiny", **changes})
    return settings, read_data(settings, resolve_base("tiny"))


def test_phases_run_one_after_the_other(t2v_cache):
    _, data = data_of(t2v_cache, turn=2, phases=[{"high": 5}, {"low": 7}, {"joint": 6}])
    assert data.schedule[:12] == [HIGH] * 5 + [LOW] * 7
    assert data.schedule[12:] == [HIGH] * 2 + [LOW] * 2 + [HIGH] + [LOW]
    assert {e: own.steps for e, own in data.noise_experts.items()} == {HIGH: 8, LOW: 10}


def test_shares_divide_all_steps(t2v_cache):
    _, data = data_of(t2v_cache, steps=100, shares={"high": 0.7, "low": 0.3})
    assert (data.schedule.count(HIGH), data.schedule.count(LOW)) == (140, 60)


def test_windows_start_and_stop_noise_experts():
    order = interleave({HIGH: 10, LOW: 10}, 2, {LOW: (6, None)})
    assert order[:6] == [HIGH] * 6 and len(order) == 20
    assert interleave({HIGH: 10, LOW: 4}, 2, {HIGH: (0, 5)})[:6].count(HIGH) <= 5
    assert LOW not in interleave({HIGH: 4, LOW: 4}, 2, {LOW: (0, 2)})[2:]
    assert interleave({LOW: 3}, 2, {LOW: (100, None)}) == [LOW] * 3  # nobody else: no step of nobody


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 5, "phases": [{"high": 1}]}, "exactly one of steps, epochs and"),
    ({"phases": [{}]}, "a phase needs steps"),
    ({"noise_experts": ["high"], "phases": [{"low": 1}]},
     "a phase has low steps, but noise_experts does not include 'low'"),
    ({"steps": 5, "shares": {"high": 0.5, "low": 0.4}}, "shares must add up to 1, not 0.9"),
    ({"steps": 5, "shares": {"high": 1.0}}, "shares needs a share above 0 for each of high, low"),
    ({"steps": 5, "shares": {"high": 0.5, "low": 0.5}, "low": {"steps": 3}}, "low.steps and shares both set"),
    ({"phases": [{"high": 1}], "low": {"start": 3}}, "leave out start, stop and shares"),
])
def test_turns_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainLoraSettings.model_validate({"output": "run", "data": {"cache": "cache"}, **changes})


def test_patterns_name_modules_in_either_layout_and_later_ones_win():
    found = resolve_patterns({"blocks.*.self_attn.*": 16, "*.attn1.to_k": 4, "blocks.[01].self_attn.q": 0,
                              "blocks.7.ffn.net.2": 8}, 8)
    assert found["blocks.5.attn1.to_q"] == 16 and found["blocks.5.attn1.to_k"] == 4
    assert "blocks.0.attn1.to_q" not in found and found["blocks.7.ffn.net.2"] == 8 and len(found) == 31
    assert next(iter(found)).startswith("blocks.0") and list(found)[-1] == "blocks.7.ffn.net.2"


@pytest.mark.parametrize(("shared", "low", "modules", "ranks"), [
    ("last_2", {}, 20, {4, 8}),  # ten Linears of two blocks: q 8, the others 4
    ("all", {}, 80, {4, 8}),
    ({"recipe": "last_3", "rank": 16, "q": 32}, {}, 30, {16, 32}),
    ({"rank": 6, "last_blocks": 2, "ffn_last_blocks": 1}, {}, 17, {6}),
    ({"rank": 6}, {"recipe": "last_1"}, 10, {4, 6}),  # where a recipe says nothing, what is shared holds
    ({"patterns": {"*.self_attn.q": 2}}, "last_1", 10, {4, 8}),
    ("all", {"rank": 2, "ffn_out": 0}, 72, {2}),
])
def test_recipes_and_one_rank_for_all(t2v_cache, shared, low, modules, ranks):
    _, data = data_of(t2v_cache, steps=1, targets=shared, low={"targets": low})
    found = target_ranks(data.noise_experts[LOW].targets, 8)
    assert (len(found), set(found.values())) == (modules, ranks)


@pytest.mark.parametrize(("targets", "message"), [
    ("last8", "targets = 'last8' is not a recipe; write 'last_8'"),
    ({"recipe": "last_0"}, "is not a recipe"),
    ({"recipe": "all", "patterns": {"*": 4}}, "recipe and patterns both set what is trained"),
    ({"rank": 4, "patterns": {"*": 4}}, "rank and patterns both set what is trained"),
])
def test_recipes_that_are_none_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        TrainLoraSettings.model_validate({"output": "run", "data": {"cache": "c"}, "steps": 1, "targets": targets})


def test_a_pattern_that_matches_nothing_lists_near_matches():
    with pytest.raises(UserError, match=r"'blocks.\*.self_attn.qq' matches no module.*near are .*self_attn.q"):
        resolve_patterns({"blocks.*.self_attn.qq": 4}, 8)
    with pytest.raises(UserError, match="no module is left"):
        resolve_patterns({"*.ffn.0": 0}, 8)


def test_the_plan_says_turns_modules_optimizer_ratio_and_how_sigma_falls(t2v_cache):
    settings, data = data_of(t2v_cache, steps=40, turn=10, high_noise_max_lr=5e-4, high_noise_min_lr=2e-5,
                             sigma={"sampler": "logit_normal", "shift": 5.0}, ema_decay=0.99,
                             targets={"patterns": {"*.self_attn.q": 4}})
    rows = plan_rows(settings, resolve_base("tiny"), data)
    text = "\n".join(f"{row.name}: {row.text}" for row in rows)
    assert "turns: high 10, low 10, high 10, low 10, ... (8 turns)" in text
    assert "8 modules of rank 4; automagic, lr from 2e-05, bump 5e-06, min 2e-05, max 0.0005" in text
    assert "predicted LR ratio high / low: " in text and "EMA decay 0.99" in text
    assert "high [0.875, 1]: logit_normal, shift 5; half of all draws in 0.901 to 0.950" in text
    assert "the band holds 36.8 % of the whole distribution" in text
    bars = [line for row in rows if row.detail for line in row.text.splitlines() if line.startswith("0.")]
    assert len(bars) == 20 and "0.875-0.887" in bars[0] and max(bar.count("#") for bar in bars[:10]) == 30
    shares = [float(line.split("%")[0].split()[-1]) for line in bars[:10]]
    assert sum(shares) == pytest.approx(100, abs=0.6)


def test_what_is_uniform_or_the_same_for_both_noise_experts_is_one_line(t2v_cache):
    settings, data = data_of(t2v_cache, steps=40)
    rows = plan_rows(settings, resolve_base("tiny"), data)
    shown, details = ([row for row in rows if row.detail is detail] for detail in (False, True))
    assert [row.name for row in shown] == ["model", "data", "steps", "high, low"]
    assert shown[-1].text == "each 40 steps; 67 modules of rank 4, 8; adamw lr 0.0001"
    assert [row.text for row in details] == ["high [0.875, 1]: uniform", "low [0, 0.875]: uniform"]


def test_dropout_is_keyed_scaled_and_off_without_keys(make_lora):
    trainer = make_lora(dropout={"rank": 0.5})
    randomise(trainer)
    first, again = (backward(trainer, HIGH, [0, 1]) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)  # the same visit drops the same rows
    rows = [first[n].abs().sum(dim=1) for n in first if n.endswith(".down")]
    dropped = sum(int((r == 0).sum()) for r in rows)
    total = sum(r.numel() for r in rows)
    assert 0.1 < dropped / total < 0.4  # both clips' halves: a row is untouched with probability 1/4
    batch = trainer.data.load_batch([0])
    draws = draws_for(trainer, HIGH, batch)
    quiet = type(draws)(**{**vars(draws), "keys": ()})
    plain = make_lora()
    randomise(plain)
    values = []
    for one, drawn in ((trainer, quiet), (plain, draws), (trainer, draws)):
        with torch.no_grad(), one.objective.loss(HIGH, batch, drawn) as loss:
            values.append(float(loss.total_B[0]))
    assert values[0] == values[1] != values[2]


def test_modules_drop_different_rows(make_lora):
    adapter = make_lora(noise_experts=["high"]).objective.adapters[HIGH]
    first, second = adapter.layers["blocks.7.attn1.to_q"], adapter.layers["blocks.6.attn1.to_q"]
    dropout = Dropout(DropoutRates(rank=0.5), adapter.layers)
    masks = []
    for layer in (first, second):
        kept = []
        for visit in range(8):
            with dropout.scope(adapter.holder, [(0, "high", visit, "clip")]):
                kept.append(adapter.holder.mask(layer, torch.ones(1, 1, 8)).flatten())
        masks.append(torch.stack(kept))
    assert not torch.equal(*masks) and not torch.equal(masks[0][0], masks[0][1])


@pytest.mark.parametrize("rates", [DropoutRates(neuron=0.3), DropoutRates(rank=0.3), DropoutRates(module=0.3)])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(make_lora, rates):
    adapter = make_lora(noise_experts=["high"]).objective.adapters[HIGH]
    layer = next(iter(adapter.layers.values()))
    dropout = Dropout(rates, adapter.layers)
    hidden = torch.ones(1, 6, layer.down_RI.shape[0])
    total = torch.zeros_like(hidden)
    for visit in range(400):
        with dropout.scope(adapter.holder, [(0, "high", visit, "clip")]):
            total += adapter.holder.mask(layer, hidden)
    assert adapter.holder.mask is None
    assert float((total / 400).mean()) == pytest.approx(1.0, abs=0.12)


def test_recomputed_activations_meet_the_same_dropout(make_lora):
    grads = []
    for recompute in (False, True):
        trainer = make_lora(activation_checkpointing=recompute, dropout={"neuron": 0.3, "rank": 0.3, "module": 0.2})
        randomise(trainer)
        grads.append(backward(trainer, LOW, [0, 1]))
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_mixture_gets_dropout_and_max_norm_too(make_moe):
    trainer = make_moe(steps=2, dropout={"rank": 0.4}, max_norm=1e-4, optimizer={"lr": 1e-2})
    trainer.config.run_folder.mkdir()
    trainer.fit()
    for adapter in trainer.objective.adapters.values():
        for family in adapter.group_names:
            norms = [float(entry.delta(torch.float64).norm()) for entry in adapter.state(family).entries.values()]
            assert max(norms) <= 1e-4 * (1 + 1e-5)
    row = json.loads((trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["max_norm/scaled_modules"] > 0


def test_saved_adapters_are_the_running_mean_and_training_goes_on_from_the_weights(make_lora):
    trainer = make_lora(steps=3, ema_decay=0.9, optimizer={"lr": 1e-2})
    trainer.config.run_folder.mkdir()
    trainer.fit()
    [(_, file)] = open_lora(trainer.config.run_folder / "lapwan_high_noise.safetensors").items()
    entry = file.read().entries["blocks.7.attn1.to_q"]
    name = "high.blocks.7.attn1.to_q.up"
    assert torch.equal(entry.up, trainer.ema.means[name]) and not torch.equal(entry.up, trainer.parameters[name])
    raw = load_file(trainer.config.run_folder / "step_000006" / "state" / "trained.safetensors")
    assert torch.equal(raw[name], trainer.parameters[name])


def test_a_lora_to_continue_from_brings_its_modules_ranks_and_alpha(make_lora, tmp_path):
    first = make_lora(output=tmp_path / "first", targets={"patterns": {"blocks.7.self_attn.q": 3}}, alpha=6.0,
                      optimizer={"lr": 1e-2})
    first.config.run_folder.mkdir()
    first.fit()
    file = tmp_path / "first" / "lapwan_high_noise.safetensors"
    second = make_lora(output=tmp_path / "second", init_lora={"high": file})
    state = second.objective.adapters[HIGH].state("lora")
    [(_, was)] = open_lora(file).items()
    assert list(state.entries) == ["blocks.7.attn1.to_q"] and state.entries["blocks.7.attn1.to_q"].alpha == 6.0
    assert torch.equal(state.entries["blocks.7.attn1.to_q"].up, was.read().entries["blocks.7.attn1.to_q"].up)
    assert len(second.objective.adapters[LOW].layers) > 1
    with pytest.raises(UserError, match="is for the high noise expert"):
        make_lora(output=tmp_path / "third", init_lora={"low": file})


def test_both_loras_in_one_file_are_the_two_and_serve_wherever_they_do(make_lora, tmp_path):
    apart, together = (make_lora(output=tmp_path / str(one), one_file=one, optimizer={"lr": 1e-2}, save_every=4)
                       for one in (False, True))
    for trainer in (apart, together):
        trainer.config.run_folder.mkdir()
        trainer.fit()
    assert [p.name for p in sorted(together.config.run_folder.glob("*.safetensors"))] == ["lapwan.safetensors"]
    assert (together.config.run_folder / "step_000004" / "lapwan.safetensors").is_file()
    both = open_lora(together.config.run_folder / "lapwan.safetensors")
    for noise_expert in NoiseExpert:
        [(_, file)] = open_lora(apart.config.run_folder / f"lapwan_{noise_expert.file_suffix}.safetensors").items()
        assert both[noise_expert].fingerprint() == file.fingerprint()
        ours, theirs = both[noise_expert].metadata, file.metadata
        # What was set differs, so the hash of it does; all else a file says of itself is the same.
        assert {k: v for k, v in ours.items() if k != "lapwan.settings"} == {
            k: v for k, v in theirs.items() if k != "lapwan.settings"}
    files = dict.fromkeys(NoiseExpert, together.config.run_folder / "lapwan.safetensors")
    base = resolve_base(BaseModelSettings(model="tiny", lora=files))
    weight = dict(base.load(LOW).transformer.named_parameters())["blocks.7.attn1.to_q.weight"]
    delta = together.objective.adapters[LOW].state("lora").entries["blocks.7.attn1.to_q"].delta()
    plain = dict(resolve_base("tiny").load(LOW).transformer.named_parameters())["blocks.7.attn1.to_q.weight"]
    torch.testing.assert_close(weight - plain, delta, rtol=0, atol=1e-6)
    again = make_lora(output=tmp_path / "again", init_lora=files)
    name = "low.blocks.7.attn1.to_q.up"
    assert torch.equal(again.parameters[name], together.parameters[name])


def test_one_file_needs_both_noise_experts():
    with pytest.raises(ValueError, match="one_file is for both noise experts, but noise_experts is only 'high'"):
        TrainLoraSettings.model_validate({"output": "run", "data": {"cache": "c"}, "steps": 1, "one_file": True,
                                          "noise_experts": ["high"]})
