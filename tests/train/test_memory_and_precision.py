"""Training on quantised and streamed bases, in micro-batches, with recomputation: the plan's line and the numbers."""

from __future__ import annotations

import cProfile
import json
import re

import pytest
import torch

from lapwan.commands import train_lora, train_moe
from lapwan.errors import UserError
from lapwan.lora.layer import FrozenLinear
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.plan import required_bytes
from lapwan.memory.training import plan_training
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.settings.train_moe import TrainMoeSettings
from lapwan.tiny.resolve import resolve_base
from lapwan.train import recipe

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
LR = {"optimizer": {"lr": 5e-3}}


def fitted(trainer):
    trainer.config.run_folder.mkdir(exist_ok=True)
    trainer.fit()
    return trainer


def losses(trainer) -> list[float]:
    rows = (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def same(a, b) -> bool:
    return all(torch.equal(p, b.parameters[n]) for n, p in a.parameters.items())


@pytest.mark.parametrize("kind", ["lora", "moe"])
def test_both_stages_learn_on_a_quantised_base_as_on_the_plain_one(kind, make_lora, make_moe, tmp_path):
    """The same clips, noise and sigmas: the losses stay within what rounding the base does to it, step by step."""
    make = {"lora": make_lora, "moe": make_moe}[kind]
    bounds = {"fp8": 0.02, "nf4": 0.1, **({"int8": 0.01} if kind == "lora" else {})}
    curves = {dtype: losses(fitted(make(output=tmp_path / dtype, dtype=dtype, steps=4, **LR)))
             for dtype in ("fp32", *bounds)}
    for dtype, bound in bounds.items():
        assert curves[dtype] == pytest.approx(curves["fp32"], rel=bound), dtype
        assert curves[dtype] != curves["fp32"]


@pytest.mark.parametrize(("dtype", "trained_blocks", "quantised"), [
    ("fp8", "auto", range(6)), ("fp8", "quantised", range(8)), ("int8", "auto", range(8)), ("nf4", "auto", range(8)),
    ("nf4", "plain", range(6)), ("auto", "auto", ()),
])
def test_which_blocks_are_quantised(dtype, trained_blocks, quantised, make_lora):
    trainer = make_lora(dtype=dtype, trained_blocks=trained_blocks)
    for adapter in trainer.objective.adapters.values():
        for index, block in enumerate(adapter.transformer.blocks):
            inside = any(isinstance(m, FrozenLinear) for m in block.modules())
            assert inside is (index in quantised), index


def test_fp8_under_more_than_half_of_the_blocks_quantises_all_of_them(make_lora):
    trainer = make_lora(dtype="fp8", targets={"last_blocks": 5, "ffn_last_blocks": 5})
    transformer = trainer.objective.adapters[HIGH].transformer
    assert all(any(isinstance(m, FrozenLinear) for m in block.modules()) for block in transformer.blocks)


@pytest.mark.parametrize(("kind", "dtype"), [
    pytest.param("lora", "fp32", marks=pytest.mark.slow), ("lora", "nf4"), ("moe", "nf4")])
def test_a_streamed_prefix_trains_to_the_same_bits(kind, dtype, make_lora, make_moe, tmp_path):
    make = {"lora": make_lora, "moe": make_moe}[kind]
    runs = {memory: fitted(make(output=tmp_path / memory, memory=memory, dtype=dtype, steps=3, **LR))
            for memory in ("both", "one", "stream")}
    assert same(runs["both"], runs["one"]) and same(runs["both"], runs["stream"])
    offload = runs["stream"].callbacks["onload"].offload
    assert isinstance(offload, NoiseExpertOffload) and not offload.both
    rings = [idle.ring for idle in offload._offloads.values()]
    assert len(rings) == 2 and all(ring is not None and ring.copied_bytes > 0 for ring in rings)
    idle = offload._offloads[HIGH if offload._active is LOW else LOW]
    assert not idle.on_device and not idle.ring._slots


def test_recomputation_and_micro_batches_change_nothing(make_lora, tmp_path):
    plain = fitted(make_lora(output=tmp_path / "plain", batch_size=2, steps=3, activation_checkpointing="off", **LR))
    for kind in ("op", "block"):
        other = fitted(make_lora(output=tmp_path / kind, batch_size=2, steps=3, activation_checkpointing=kind, **LR))
        assert other.objective.backbones[HIGH].options.checkpointing == kind
        assert same(plain, other)
    small = make_lora(output=tmp_path / "micro", batch_size=2, steps=3, **LR)
    small.data.micro_batch = 1
    fitted(small)
    assert losses(small) == pytest.approx(losses(plain), rel=1e-5)
    assert not same(plain, small)  # sums in another order, so it did run in parts


@pytest.fixture
def planned(t2v_cache):
    base = resolve_base("tiny")

    def make(predict: bool = False, **changes):
        settings = TrainLoraSettings.model_validate(
            {"output": "run", "model": "tiny", "data": {"cache": t2v_cache}, "steps": 1, **changes})
        return plan_training(settings, base, recipe.workload(recipe.read_data(settings, base), base), CPU, predict)

    return make


def test_a_cpu_keeps_everything_unless_told(planned):
    plan = planned()
    assert plan.both and plan.line == "memory: both noise experts stay on cpu"
    assert plan.plan.strategy.checkpointing == "off"
    assert not planned(memory="one").both and "one noise expert at a time on cpu" in planned(memory="one").line
    assert planned(memory="one", noise_experts=["high"]).both  # nothing to offload
    assert planned(activation_checkpointing=True).plan.strategy.checkpointing == "block"
    assert planned(activation_checkpointing=False).plan.strategy.checkpointing == "off"
    streamed = planned(memory="stream", targets={"last_blocks": 2, "ffn_last_blocks": 1})
    assert len(streamed.plan.streamed) == 6 and "first 6 blocks stream from host memory to cpu" in streamed.line


def test_less_and_less_memory(planned):
    """First one at a time or streaming or recomputing, whatever costs least; at last smaller parts of a batch."""
    settings = {"targets": {"last_blocks": 5, "ffn_last_blocks": 5}, "batch_size": 2}
    plan = planned(predict=True, memory=64.0, **settings)
    seen, free = [], 64 << 30
    while plan.plan.fits:
        assert required_bytes(plan.plan.peak) <= free
        strategy = plan.plan.strategy
        seen.append((plan.both, len(plan.plan.streamed), strategy.checkpointing, strategy.whole_blocks,
                     strategy.micro_batch))
        free = required_bytes(plan.plan.peak) - 1
        plan = planned(memory=free / 2**30, **settings)
    assert seen[0] == (True, 0, "off", 0, 0)
    assert any(not both for both, *_ in seen) and any(streamed for _, streamed, *_ in seen)
    assert any(kind == "op" for *_, kind, _, _ in seen) and any(whole for *_, whole, _ in seen)
    assert seen[-1][-1] == 1
    assert "THIS DOES NOT FIT" in plan.line and plan.rows(1)[-1].text.startswith("memory: this does not fit")
    first, second = (planned(predict=True, memory=64.0, dtype=d, **settings).plan.parts["weights"]
                     for d in ("fp32", "nf4"))
    assert second < 0.7 * first


def test_a_dry_run_predicts_and_a_run_is_planned_once(t2v_cache, tmp_path, capsys):
    for command, cls in ((train_lora, TrainLoraSettings), (train_moe, TrainMoeSettings)):
        settings = cls.model_validate({
            "output": tmp_path / cls.__name__, "model": "tiny", "data": {"cache": t2v_cache}, "steps": 1,
            "targets": {"last_blocks": 1, "ffn_last_blocks": 1}})
        command.run(settings, RunOptions(dry_run=True))
        log = capsys.readouterr().err
        assert re.search(r"GiB +weights +adapters +activations +other +predicted peak\n +cpu( +\d+\.\d\d){5}\n", log)
        assert re.search(r"time +\S+ s a step, \d+ s for all 2 \(predicted\)", log), log
        profile = cProfile.Profile()
        profile.runcall(command.run, settings, RunOptions())
        assert [entry.callcount for entry in profile.getstats() if entry.code is plan_training.__code__] == [1]


@pytest.mark.parametrize(("given", "message"), [
    ({"memory": "all"}, "'all' is not understood; write auto, both, one, stream, or a limit in GiB"),
    ({"memory": "-3"}, "'-3' is not understood"), ({"memory": "0"}, "'0' is not understood"),
    ({"dtype": "fp4"}, "fp4"), ({"activation_checkpointing": "some"}, "some"),
])
def test_what_is_not_understood_is_one_line(given, message, t2v_cache):
    with pytest.raises(UserError, match=message) as caught:
        load(TrainLoraSettings, options={"output": "run", "data.cache": str(t2v_cache), "steps": "1", **given},
             environment={})
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("number", [0, -1, -0.5, True, 0.0])
def test_a_cap_is_above_zero(number, t2v_cache):
    with pytest.raises(ValueError, match="is not understood"):
        TrainLoraSettings.model_validate({"output": "run", "data": {"cache": t2v_cache}, "steps": 1, "memory": number})


@pytest.mark.parametrize(("given", "meant"), [
    (12, 12.0), (0.5, 0.5), ("16", 16.0), ("16 GiB", 16.0), ("7.5g", 7.5), ("stream", "stream"),
])
def test_aliases_of_memory(given, meant, t2v_cache):
    assert TrainLoraSettings.model_validate(
        {"output": "run", "data": {"cache": t2v_cache}, "steps": 1, "memory": given}).memory == meant


def test_a_lora_that_is_gone_on_with_says_which_blocks_are_trained(make_lora, tmp_path):
    """Its modules lie before the targets: they neither stream nor are they quantised."""
    early = fitted(make_lora(output=tmp_path / "early", targets={"patterns": {"blocks.2.self_attn.q": 4}}, steps=1))
    files = {e: early.config.run_folder / f"lapwan_{e.file_suffix}.safetensors" for e in (HIGH, LOW)}
    given = {"init_lora": {e.value: path for e, path in files.items()}, "steps": 2, **LR}
    runs = [fitted(make_lora(output=tmp_path / memory, memory=memory, **given)) for memory in ("both", "stream")]
    assert same(*runs)
    offload = runs[1].callbacks["onload"].offload
    assert list(offload._streamed) == [0, 1]
    quantised = make_lora(output=tmp_path / "fp8", dtype="fp8", **given).objective.adapters[HIGH].transformer
    inside = [any(isinstance(m, FrozenLinear) for m in block.modules()) for block in quantised.blocks]
    assert [i for i, quantised in enumerate(inside) if not quantised] == [2]


def test_a_trained_block_is_not_streamed(make_lora):
    objective = make_lora().objective
    with pytest.raises(RuntimeError, match="cannot stream"):
        NoiseExpertOffload(CPU, False, range(8)).add(
            HIGH, objective.backbones[HIGH], objective.adapters[HIGH].adapter_tensors())


def test_a_frozen_lora_beside_a_mixture_needs_its_blocks_too(make_lora, make_moe, tmp_path):
    """The gates carry gradient through it, so its blocks do not stream; and the result is the resident one."""
    early = fitted(make_lora(output=tmp_path / "early", targets={"patterns": {"blocks.3.self_attn.q": 4}}, steps=1))
    base = {e.value: early.config.run_folder / f"lapwan_{e.file_suffix}.safetensors" for e in (HIGH, LOW)}
    runs = [fitted(make_moe(output=tmp_path / memory, memory=memory, base_lora=base, steps=2, **LR))
            for memory in ("both", "stream")]
    assert same(*runs)
    assert list(runs[1].callbacks["onload"].offload._streamed) == [0, 1, 2]
