"""Precision, streaming, offload and the plan on a GPU: `pytest -m gpu`."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import bench_plan

from lapwan.lora.attach import Group, attach, initial_state
from lapwan.memory.streaming import offload_backbone
from lapwan.names import Precision
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import LINEAR_CLASSES, Fp8Linear, fp8_in_hardware, quantise_fp8
from lapwan.wan.quantise.load import fill, linears_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def model(precision: Precision | None = None, layers: int = 6, home: torch.device = CUDA):
    """Random weights of width 1536, in bf16, the same at every call."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights():
        made = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, text_dim=64, freq_dim=64,
                                     ffn_dim=4096, num_layers=layers)
    generator = torch.Generator(CUDA).manual_seed(0)

    def weight(name: str, shape: torch.Size) -> torch.Tensor:
        scale = 0.02 if len(shape) < 2 else shape[1:].numel() ** -0.5
        return torch.randn(shape, generator=generator, device=CUDA) * scale

    values = {n: weight(n, p.shape).bfloat16() for n, p in made.named_parameters()}
    source = {n: lambda v=v: v for n, v in values.items()}
    blocks = [] if precision is None else linears_of(made.blocks, "blocks")
    fill(made, source, blocks, precision or Precision.FP8, lambda name, stored: stored, home, None, CUDA)
    return WanBackbone(made.requires_grad_(False).eval().to(home))


def inputs(batch: int = 1):
    generator = torch.Generator(CUDA).manual_seed(1)
    x = torch.randn(batch, 16, 9, 32, 32, device=CUDA, generator=generator)
    return x, torch.full((batch,), 700.0, device=CUDA), torch.randn(batch, 512, 64, device=CUDA, generator=generator)


@pytest.mark.parametrize("precision", list(Precision))
def test_quantising_gives_the_same_bytes_on_both_devices(precision) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    here, there = (LINEAR_CLASSES[precision].from_weight(weight.to(d), None) for d in (CUDA, torch.device("cpu")))
    assert torch.equal(here.codes.cpu().view(torch.uint8), there.codes.view(torch.uint8))
    assert torch.equal(here.scale.cpu(), there.scale)
    assert torch.equal(here.weight_as(torch.bfloat16).cpu(), there.weight_as(torch.bfloat16))


@pytest.mark.skipif(not fp8_in_hardware(CUDA), reason="no fp8 here")
@pytest.mark.parametrize("rows", [1, 17, 5376])
def test_fp8_in_hardware_is_its_emulation_up_to_accumulation(rows) -> None:
    generator = torch.Generator().manual_seed(0)
    made = Fp8Linear.from_weight(torch.randn(1536, 5120, generator=generator) / 70, torch.randn(1536).bfloat16())
    x = torch.randn(2, rows, 5120, generator=generator).bfloat16()
    emulated = made(x.float())
    hardware = made.to(CUDA)(x.to(CUDA))
    assert hardware.dtype == torch.bfloat16 and hardware.shape == emulated.shape
    error = (hardware.float().cpu() - emulated).norm() / emulated.norm()
    assert error < 4e-3  # bf16's rounding of the output is 1.7e-3; fast accumulation adds less
    x8 = quantise_fp8(x.to(CUDA).flatten(0, 1))[0]
    assert torch.equal(x8.cpu().view(torch.uint8), quantise_fp8(x.flatten(0, 1))[0].view(torch.uint8))
    given = x.to(CUDA).requires_grad_()
    made(given).sum().backward()
    expected = torch.ones(2 * rows, 1536, device=CUDA, dtype=torch.bfloat16) @ made.weight_as(torch.bfloat16)
    torch.testing.assert_close(given.grad.flatten(0, 1), expected)


@torch.no_grad()
@pytest.mark.parametrize("precision", [None, *Precision])
def test_streamed_is_resident_bit_for_bit_whatever_overlaps(precision) -> None:
    resident = model(precision)
    expected = resident.velocity(*inputs())
    twice = resident.velocity(*inputs(2))
    del resident
    streamed = model(precision, home=torch.device("cpu"))
    offload = offload_backbone(streamed, (), CUDA, range(6))
    offload.onload()
    for _ in range(20):  # a slot that is filled too early would show sooner or later
        assert torch.equal(streamed.velocity(*inputs()), expected)
    assert torch.equal(streamed.velocity(*inputs(2)), twice)
    offload.offload()
    torch.randn(1 << 28, device=CUDA)  # what has the memory now must not be written to
    offload.onload()
    assert torch.equal(streamed.velocity(*inputs()), expected)


@torch.no_grad()
def test_a_ring_holds_two_blocks() -> None:
    streamed = model(home=torch.device("cpu"), layers=10)
    offload = offload_backbone(streamed, (), CUDA, range(10))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    offload.onload()
    block = sum(-(-p.nbytes // 256) * 256 for p in streamed.transformer.blocks[0].parameters())
    outer = sum(p.nbytes for n, p in streamed.transformer.named_parameters() if not n.startswith("blocks."))
    held = torch.cuda.memory_allocated() - before
    assert 2 * block <= held <= 2 * block + outer + (4 << 20)
    offload.offload()
    assert torch.cuda.memory_allocated() - before < 4 << 20


def test_training_over_a_streamed_prefix_has_the_resident_gradients() -> None:
    found = []
    for streamed in (False, True):
        made = model(home=torch.device("cpu") if streamed else CUDA)
        state = initial_state(made.transformer, {f"blocks.{i}.attn1.to_q": 8 for i in (4, 5)}, None, 3)
        for entry in state.entries.values():
            entry.up.normal_(generator=torch.Generator().manual_seed(1))
        adapter = attach(made.transformer, [Group("lora", state, trainable=True)])
        if streamed:
            offload = offload_backbone(made, adapter.adapter_tensors(), CUDA, range(4))
            for tensor in adapter.adapter_tensors():
                tensor.data = tensor.data.to(CUDA)
            offload.onload()
        made.checkpoint("block")
        for _ in range(3):
            made.velocity(*inputs()).square().mean().backward()
        found.append([p.grad for p in adapter.parameters().values()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()  # attention's backward adds in any order


def test_a_video_is_the_same_wherever_its_weights_wait(succeed, own_cache, tmp_path) -> None:
    common = ("--model", "tiny", "--prompt", "电凝钩切割组织", "--size", "64x64", "--num-frames", "9", "--steps", "4",
              "--compile", "off")
    for dtype in ("bf16", "fp8", "nf4"):
        made = []
        for memory in ("both", "one", "stream"):
            out = f"{dtype}-{memory}.safetensors"
            succeed("generate", *common, "--dtype", dtype, "--memory", memory, "-o", out)
            made.append(load_file(tmp_path / out)["latents"])
        assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", ["fp8", "int8", "nf4"])
def test_both_stages_train_on_a_quantised_base(dtype, succeed, own_cache, t2v_cache, tmp_path) -> None:
    small = ("--cache", t2v_cache, "--dtype", dtype, "--steps", "3", "--set", "targets.last_blocks=2",
             "--set", "targets.ffn_last_blocks=1")
    for command in ("train-lora", "train-moe"):
        losses = {}
        for memory in ("both", "stream"):
            run = f"{command}-{memory}"
            succeed(command, *small, "--memory", memory, "-o", run)
            rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            losses[memory] = [row["loss"] for row in rows]
        assert losses["both"] == pytest.approx(losses["stream"], rel=1e-3)


@pytest.mark.parametrize("row", ["lora_bf16", "lora_all_block", "stream", "fp8_last", "nf4_all", "video_bf16"])
def test_the_predicted_peak_is_within_a_tenth(row, tmp_path_factory, monkeypatch) -> None:
    work = tmp_path_factory.getbasetemp() / "plan"
    monkeypatch.setenv("LAPWAN_CACHE_DIR", str(work / "cache"))
    bench = bench_plan.Bench(work, tiny=False)
    gc.collect()
    torch.cuda.empty_cache()
    found = bench_plan.ROWS[row](bench)
    assert abs(found["error_percent"]) < 10, found
