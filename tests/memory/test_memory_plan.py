"""The plan's arithmetic against closed forms, and traced memory against counting by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from lapwan.lora.attach import Group, attach, initial_state
from lapwan.memory.cost import ClipShape, GroupShape, NoiseExpertShape, tokens_of, width_of
from lapwan.memory.plan import (
    GIB,
    Flops,
    NoiseExpertBytes,
    Placement,
    Strategy,
    Throughput,
    available_host_memory,
    choose,
    memory_budget,
    placements,
    required_bytes,
    resident,
)
from lapwan.memory.shape_model import ShapeModel
from lapwan.memory.streaming import tensors_of
from lapwan.memory.trace import trace_memory
from lapwan.memory.training import Workload, predict_training
from lapwan.models.base import Base, target_ranks
from lapwan.models.spec import ModelSpec, read_spec
from lapwan.names import NoiseExpert, Precision
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer.context_parallel import ContextParallel
from lapwan.wan.transformer.forward import ForwardOptions

HIGH = NoiseExpertBytes((10, 20, 30, 40), 5, 3)
LOW = NoiseExpertBytes((10, 10, 10, 10), 7, 1)


@pytest.mark.parametrize(("placement", "expected"), [
    (Placement(True), 105 + 47 + 4), (Placement(False), 105 + 4),
    (Placement(False, 1), 5 + 20 + 30 + 40 + 10 + 4), (Placement(False, 2), 5 + 30 + 40 + 2 * 20 + 4),
    (Placement(False, 4), 5 + 2 * 40 + 4),
])
def test_what_is_resident(placement, expected) -> None:
    assert resident([HIGH, LOW], placement) == expected


def test_the_quickest_that_fits_and_else_the_smallest() -> None:
    strategies = [Strategy(Placement(True), 100, 1.0), Strategy(Placement(False), 100, 1.5),
                  Strategy(Placement(False), 10, 1.2, "block"), Strategy(Placement(False, 4), 10, 9.0, "block")]
    peaks = [156 + 100 + 2, 109 + 100 + 2, 109 + 10 + 2, 89 + 10 + 2]
    for strategy, peak in zip(strategies, peaks, strict=True):
        assert choose([HIGH, LOW], [strategy], 2, None, "auto").peak == peak

    def with_free(peak: int) -> Strategy:
        return choose([HIGH, LOW], strategies, 2, required_bytes(peak), "auto").strategy

    assert [with_free(peak) for peak in peaks] == [strategies[0], strategies[2], strategies[2], strategies[3]]
    tight = choose([HIGH, LOW], strategies, 2, 0, "auto")
    assert tight.strategy is strategies[3] and not tight.fits
    assert choose([HIGH, LOW], strategies, 2, 0, "auto").host == 105 + 47
    assert choose([HIGH, LOW], strategies[:1], 2, None, "auto").host == 0


def test_the_host_counts_as_far_as_there_is_a_choice() -> None:
    strategies = [Strategy(Placement(False), 100, 1.0), Strategy(Placement(True), 100, 1.5),
                  Strategy(Placement(False, 4), 10, 9.0)]

    def chosen(free: int, host: int | None) -> Strategy:
        return choose([HIGH, LOW], strategies, 2, free, "auto", host_free=host).strategy

    choices = [chosen(required_bytes(258), host) for host in (None, 152, 151)]
    assert choices == [strategies[0], strategies[0], strategies[1]]
    assert chosen(required_bytes(211), 151) is strategies[0]  # nothing else fits the device
    line = choose([HIGH, LOW], strategies[:1], 2, None, "auto", host_free=GIB).host_summary
    assert line == ", 0.0 GiB of host memory"
    assert "WHICH HAS ONLY 0.0 GiB" in choose([HIGH, LOW], strategies[:1], 2, None, "auto", host_free=1).host_summary
    assert available_host_memory() is None or available_host_memory() > 1 << 20


def test_another_phase_may_be_the_largest() -> None:
    strategies = [Strategy(Placement(True), 1, 1.0), Strategy(Placement(False), 1, 2.0)]
    both, single = (choose([HIGH, LOW], [strategy], 2, None, "auto", {"text": 1000}) for strategy in strategies)
    assert both.peak == 156 + 1000 + 2 and single.peak == 4 + 1000 + 2


def test_what_is_tried_and_what_may_be_used() -> None:
    assert placements(2, "auto") == [Placement(True), Placement(False), Placement(False, 1), Placement(False, 2)]
    assert placements(2, 16.0) == placements(2, "auto")
    assert [placements(3, memory) for memory in ("both", "one", "stream")] == [
        [Placement(True)], [Placement(False)], [Placement(False, 3)]]
    assert placements(0, "stream") == [Placement(False)]
    assert memory_budget(None, "auto") is None
    assert memory_budget(3 * GIB, 2.0) == 2 * GIB and memory_budget(GIB, 2.0) == GIB
    assert memory_budget(None, 0.5) == GIB // 2 and memory_budget(7, "one") == 7


def test_seconds_are_flops_over_rates() -> None:
    rates = Throughput(matmul=10.0, matmul_fp8=20.0, attention=5.0, bus=1.0)
    assert Flops(10, 20, 5).seconds(rates) == 3.0 and Flops(1, 2, 3).times(2) == Flops(2, 4, 6)


@pytest.mark.parametrize("precision", [None, *Precision])
def test_bytes_from_shapes_are_those_of_the_loaded_model(precision, tiny_t2v, own_cache) -> None:
    recipe = None if precision is None else Recipe(precision, frozenset({7}))
    ranks = {"blocks.6.attn1.to_q": 4, "blocks.7.attn1.to_q": 4, "blocks.7.ffn.net.2": 8}
    base = Base(tiny_t2v)
    model = base.load(NoiseExpert.HIGH, torch.bfloat16, recipe=recipe).transformer
    plain = {id(t) for t in tensors_of(model)}
    state = initial_state(load_transformer(tiny_t2v, NoiseExpert.HIGH), ranks, None, 0)
    adapter = attach(model, [Group("a", state, True)])
    shape = NoiseExpertShape(tiny_t2v, NoiseExpert.HIGH, torch.bfloat16, recipe, [GroupShape(ranks, True)])
    sizes = shape.bytes(copies=3)
    assert sizes.blocks == tuple(sum(t.nbytes for t in tensors_of(b) if id(t) in plain) for b in model.blocks)
    # The rope tables are made in another shape on a device without values; what is stored is the same.
    stored = sum(p.nbytes for p in model.parameters() if id(p) in plain) + sum(
        b.nbytes for n, b in model.named_buffers() if id(b) in plain)
    assert sizes.weights == stored
    rows = adapter.adapter_tensors()
    assert sizes.adapters == sum(t.nbytes * (3 if t.requires_grad else 1) for t in rows)
    assert shape.gradients == sum(p.nbytes for p in adapter.parameters().values())
    assert shape.first_trained == 6


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_shape_model_holds_what_diffusers_holds(task, tiny_t2v, tiny_i2v) -> None:
    shape = NoiseExpertShape(tiny_t2v if task == "t2v" else tiny_i2v, NoiseExpert.HIGH, torch.bfloat16)
    models = (ShapeModel(shape.config, 8, torch.bfloat16), diffusers_model(shape))
    ours, theirs = ({name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()} for model in models)
    assert ours == theirs
    # Exactly these: the kernels of a GPU are chosen by type.
    ours, theirs = ({name for name, m in model.named_modules() if type(m) is nn.Linear} for model in models)
    assert ours == theirs


def test_the_trace_counts_what_lives() -> None:
    """x -> W1 x -> relu -> W2: by hand, in units of a tensor of 1024 fp32 numbers."""
    unit = 4096
    layers = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False)).to("meta")
    x = torch.empty(32, 32, device="meta")
    layers.requires_grad_(False)
    with torch.no_grad():
        assert trace_memory(lambda: layers(x)).peak == 2 * unit  # input and output of the layer at work
    layers[0].weight.requires_grad_()
    # Forward: h, relu(h) (kept), y, and the loss; backward: dy, then d relu(h), dh, and W1's gradient is what is left.
    work = trace_memory(lambda: layers(x).sum().backward())
    assert work.change == unit + 512 or work.change == unit
    assert 3 * unit <= work.peak <= 4 * unit + 4 * 512


def test_attention_is_counted_without_its_products(tiny_t2v) -> None:
    """From N tokens to 4N the work grows fourfold, not sixteenfold."""
    shape = NoiseExpertShape(tiny_t2v, NoiseExpert.HIGH, torch.float32)
    small, large = (shape.forward_memory(ClipShape(1, 17, size, size)) for size in (256, 512))
    assert 3.5 < large / small < 4.2
    assert tokens_of(tiny_t2v, (17, 64, 64)) == 5 * 16 and width_of(tiny_t2v) == 192


def test_work_grows_by_trained_block_and_shrinks_with_recomputation(tiny_t2v) -> None:
    def work(blocks, checkpointing="off", batch=1) -> int:
        ranks = {f"blocks.{i}.{name}": 4 for i in blocks for name in ("attn1.to_q", "ffn.net.2")}
        shape = NoiseExpertShape(tiny_t2v, NoiseExpert.LOW, torch.float32, None, [GroupShape(ranks, True)])
        return shape.step_memory(ClipShape(batch, 9, 64, 64), [checkpointing]).peak(checkpointing)

    of = {n: work(range(8 - n, 8)) for n in (2, 3, 6)}
    assert of[6] - of[3] == pytest.approx(3 * (of[3] - of[2]), rel=1e-9)  # equal blocks add equally
    assert work(range(8), "block") < 0.5 * work(range(8), "off")
    assert 1.8 < work(range(4, 8), batch=2) / work(range(4, 8)) < 2.1


ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k")
FP8_BELOW = Recipe(Precision.FP8, frozenset({6, 7}))


def ranks_of(first: int, *more: str) -> dict[str, int]:
    """A LoRA on attention from a block on, and on other modules of the last two."""
    return {f"blocks.{i}.{path}": 4 for i in range(first, 8) for path in ATTENTION} | {
        f"blocks.{i}.{path}": 8 for i in (6, 7) for path in more}


# Loras, gated, recipe, processes, dtype: each a kind of run.
RUNS = {
    "lora": ([(ranks_of(5, "ffn.net.0.proj"), True)], False, None, 1, torch.bfloat16),
    "all blocks": ([(ranks_of(0, "ffn.net.2"), True)], False, None, 1, torch.float32),
    "text untouched": ([({"blocks.5.attn1.to_q": 4, "blocks.7.ffn.net.2": 8}, True)], False, None, 1, torch.float32),
    "mixture": ([(ranks_of(5), True), (ranks_of(6, "ffn.net.2"), True), (ranks_of(3), False)], True, None, 1,
                torch.bfloat16),
    "fp8 below": ([(ranks_of(6), True)], False, FP8_BELOW, 1, torch.bfloat16),
    "nf4": ([(ranks_of(5, "ffn.net.2"), True)], False, Recipe(Precision.NF4), 1, torch.bfloat16),
    "context parallel": ([(ranks_of(5), True)], False, None, 2, torch.bfloat16),
}


def traced(shape: NoiseExpertShape, clip: ClipShape, kind: str, whole: int, processes: int) -> int:
    """The whole step with diffusers' modules, torch's checkpointing and torch's meta kernels."""
    model = diffusers_model(shape)
    adapter = shape.equip(model, shape.kinds)
    options = ForwardOptions(checkpointing=kind, whole_blocks=whole,
                             context_parallel=ContextParallel(0, processes) if processes > 1 else None)
    backbone, inputs = WanBackbone(model, options), shape.inputs(clip)

    def step() -> None:
        torch.autograd.backward((backbone.velocity(*inputs) - inputs[0]).square().mean())

    with shape.gates(adapter, clip, True):
        return trace_memory(step).peak


def diffusers_model(shape: NoiseExpertShape) -> nn.Module:
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(shape.config)
    for name, parameter in model.named_parameters():
        if not any(part in model._keep_in_fp32_modules for part in name.split(".")):
            parameter.data = parameter.data.to(shape.dtype)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def ti2v(tiny_t2v, tmp_path_factory) -> ModelSpec:
    """A single transformer with a clean first frame: the embedded one's configuration without weights."""
    folder = tmp_path_factory.mktemp("ti2v")
    for file in ("scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
                 "text_encoder/config.json"):
        (folder / file).parent.mkdir()
        shutil.copy(tiny_t2v.path / file, folder / file)
    index = json.loads((tiny_t2v.path / "model_index.json").read_text())
    index |= {"boundary_ratio": None, "transformer_2": [None, None], "expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return read_spec(folder)


def test_a_clean_first_frame_adds_two_rows_of_modulation_and_nothing_for_each_token(ti2v, tiny_t2v) -> None:
    """Of an evaluation and of a step with the blocks recomputed, against the same transformer with one timestep; six
    rows in fp32 for each token would double the first and add a third to the second."""
    def taken(spec: ModelSpec) -> tuple[int, int]:
        ranks = {f"blocks.{i}.attn1.to_q": 4 for i in range(8)}
        shape = NoiseExpertShape(spec, NoiseExpert.HIGH, torch.bfloat16, None, [GroupShape(ranks, True)])
        clip = ClipShape(1, 17, 256, 256)
        return shape.forward_memory(clip), shape.step_memory(clip, ["block"]).peak("block")

    assert ti2v.clean_first_frame
    for split, plain in zip(taken(ti2v), taken(tiny_t2v), strict=True):
        assert 0.9 * plain < split < 1.1 * plain


@pytest.mark.parametrize(("task", "name"), [*(("t2v", name) for name in RUNS), ("i2v", "lora"), ("ti2v", "lora"),
                                            ("ti2v", "context parallel")])
def test_a_step_from_segments_is_the_step_traced_whole(task, name, tiny_t2v, tiny_i2v, ti2v) -> None:
    loras, gated, recipe, processes, dtype = RUNS[name]
    spec = {"t2v": tiny_t2v, "i2v": tiny_i2v, "ti2v": ti2v}[task]
    shape = NoiseExpertShape(spec, spec.noise_experts[-1], dtype, recipe,
                             [GroupShape(ranks, trained) for ranks, trained in loras], gated)
    clip = ClipShape(1, 9, 64, 64)
    step = shape.step_memory(clip, ["off", "op", "block"], processes)
    mixed = [("off", 1), ("op", 2)] if name == "text untouched" else []
    for kind, whole in [("off", 0), ("op", 0), ("block", 0), *mixed]:
        assert step.peak(kind, whole) == pytest.approx(traced(shape, clip, kind, whole, processes), rel=5e-3), kind


@pytest.mark.parametrize(("dtype", "card", "size"), [
    ("bf16", 24, (480, 832)), ("bf16", 24, (704, 1280)), ("nf4", 12, (480, 832))])
def test_ti2v_5b_is_trained_on_small_cards_with_everything_resident(ti2v, tmp_path, dtype, card, size) -> None:
    """A LoRA of rank 32 on every Linear at 121 frames; of a card its context and the desktop take 0.75 GiB."""
    shapes = {"patch_size": [1, 2, 2], "num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48,
              "out_channels": 48, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 14336, "num_layers": 30}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(
        json.loads((ti2v.path / "transformer" / "config.json").read_text()) | shapes))
    spec = replace(ti2v, path=tmp_path, in_channels=48, latent_channels=48, num_layers=30, text_dim=4096,
                   spatial_stride=16, pixel_multiple=32)
    settings = TrainLoraSettings.model_validate({
        "output": "unused", "data": {"cache": "unused"}, "steps": 1000, "dtype": dtype, "noise_experts": ["high"],
        "targets": {"recipe": "all", "rank": 32}})
    work = Workload((121, *size), 0, 1000, {NoiseExpert.HIGH: [target_ranks(settings.targets, 30)]})
    assert tokens_of(spec, work.bucket) == 31 * (size[0] // 32) * (size[1] // 32)
    rates = Throughput(matmul=1e14, matmul_fp8=1e14, attention=1e14, bus=2e10)
    plan = predict_training(settings, Base(spec), work, torch.bfloat16, int((card - 0.75) * GIB), rates, True, None)
    assert plan.fits and plan.both and not plan.streamed and not plan.strategy.micro_batch
    assert plan.parts["weights"] == pytest.approx({"bf16": 9.33, "nf4": 2.62}[dtype] * GIB, rel=0.01)


def test_flops_of_a_known_model(tiny_t2v) -> None:
    """8 blocks of width 192 and 768: products 2·(N·(6·192² + 2·192·768) + 512·2·192²), attention 4·192·N·(N + 512)."""
    shape = NoiseExpertShape(tiny_t2v, NoiseExpert.LOW, torch.float32)
    tokens = 5 * 36
    flops = shape.flops(ClipShape(1, 17, 96, 96), range(8))
    assert flops.matmul == 8 * 2 * (tokens * (6 * 192**2 + 2 * 192 * 768) + 512 * 2 * 192**2)
    assert flops.attention == 8 * 4 * 192 * tokens * (tokens + 512) and flops.matmul_fp8 == 0
    eight = NoiseExpertShape(tiny_t2v, NoiseExpert.LOW, torch.float32, Recipe(Precision.FP8, frozenset({6, 7})))
    assert eight.flops(ClipShape(1, 17, 96, 96), range(8)).matmul_fp8 == flops.matmul * 6 / 8
