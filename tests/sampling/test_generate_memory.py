"""Both noise experts on the device or one at a time: the decision, the moves, and the same frames either way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch
from adapter_cases import random_lora
from diffusers.models.embeddings import TimestepEmbedding
from PIL import Image
from safetensors.torch import load_file
from sampling_cases import generate
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lapwan import UserError, VideoGenerator
from lapwan.lora.attach import Group, attach
from lapwan.lora.formats import write_lora
from lapwan.memory.generation import GenerationWorkload, generation_rows, plan_generation, text_encoder_bytes
from lapwan.memory.plan import Throughput, required_bytes
from lapwan.memory.streaming import HostCopy
from lapwan.models.device import free_bytes
from lapwan.sampling.generator import Generator
from lapwan.sampling.result import read_metadata
from lapwan.wan.backbone import load_transformer
from lapwan.wan.text import load_text_encoder

GIB = 1 << 30
RATES = Throughput(600e12, 1000e12, 450e12, 50e9)


def planned(t2v, memory, free, **workload):
    """The embedded model at 96 x 96 on a device with this many free bytes."""
    video = GenerationWorkload(17, (96, 96), **workload)
    return plan_generation(t2v, {}, torch.float32, None, video, memory, free, RATES, text_bytes=0)


def test_the_plan_takes_the_quickest_that_fits(t2v) -> None:
    """Of 5 videos at a time sampling takes more than decoding, so that what is streamed decides the peak."""
    assert planned(t2v, "auto", None, batch=5).both
    free = 4 * GIB
    last = planned(t2v, "auto", free, batch=5)
    assert last.both and last.strategy.batched_guidance
    strategies = []
    while last.fits:
        assert required_bytes(last.peak) <= free
        strategies.append((last.both, len(last.streamed), last.strategy.batched_guidance))
        free = required_bytes(last.peak) - 1
        last = planned(t2v, "auto", free, batch=5)
    assert strategies[0] == (True, 0, True) and (False, 0, True) in strategies
    assert any(streamed for _, streamed, _ in strategies) and any(not batched for *_, batched in strategies)
    assert strategies[-1][1] == 8  # of 8 blocks, when nothing else fits
    assert planned(t2v, "stream", 8 * GIB).strategy.seconds >= planned(t2v, "both", 8 * GIB).strategy.seconds


@pytest.mark.parametrize(("memory", "both", "streamed"), [("both", True, 0), ("one", False, 0), ("stream", False, 8)])
def test_what_is_asked_for_is_done(memory, both, streamed, t2v) -> None:
    for free in (None, 1, 100 * GIB):
        plan = planned(t2v, memory, free)
        assert (plan.both, len(plan.streamed)) == (both, streamed)
        assert plan.fits is (free != 1)


def test_a_number_is_the_most_it_may_take(t2v) -> None:
    assert planned(t2v, 50.0, 100 * GIB).both
    capped = planned(t2v, 0.8, 100 * GIB)
    assert capped.peak < 0.8 * GIB and capped.free == int(0.8 * GIB)
    assert planned(t2v, 50.0, 900 << 20).free == 900 << 20


def test_reading_the_prompt_counts_where_it_needs_more_than_sampling(t2v) -> None:
    video = GenerationWorkload(17, (96, 96))
    plan = plan_generation(t2v, {}, torch.float32, None, video, "auto", 8 * GIB, RATES, 7 * GIB)
    assert plan.peak >= 7 * GIB and plan.fits


def test_the_plan_says_the_numbers(t2v) -> None:
    plan = planned(t2v, "one", GIB)
    memory, table, time = generation_rows(plan, torch.device("cuda:0"), 2, 40)
    assert memory.text.startswith("one noise expert on cuda:0 at a time (as asked)")
    device, host = (dict(zip(table.headings, row, strict=True)) for row in table.rows)
    assert device["GiB"] == "cuda:0" and device["free"] == "1.00"
    assert device["predicted peak"] == f"{plan.peak / GIB:.2f}"
    assert host["GiB"] == "host" and host["weights"] == f"{plan.host / GIB:.2f}"
    assert "s a step, " in time.text and time.text.endswith(" for all 40 (predicted)")
    assert [row.text for row in generation_rows(planned(t2v, "auto", None), torch.device("cpu"), 2, 40)] == [
        "both noise experts stay on cpu (auto)"]
    for memory, text in (("stream", "8 blocks of the active noise expert stream from host memory to cuda"),
                         (0.8, "(within 0.8 GiB)")):
        assert text in generation_rows(planned(t2v, memory, GIB), torch.device("cuda"), 2, 40)[0].text


def test_sizes_are_read_from_headers(t2v) -> None:
    assert text_encoder_bytes(t2v) == sum(
        p.nbytes for p in load_text_encoder(t2v).model.parameters())
    assert free_bytes(torch.device("cpu")) is None


def test_a_host_copy_brings_back_the_same_tensors_and_the_adapters_on_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).to(torch.bfloat16))
    model.register_buffer("table", torch.arange(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    there = [tensor.data_ptr() for tensor in tensors]
    host = HostCopy(tensors, pinned=False)
    for _ in range(2):
        host.offload()
        waiting = [tensor.data_ptr() for tensor in tensors]
        assert not set(waiting) & set(there)
        host.onload(torch.device("cpu"))
        assert not {tensor.data_ptr() for tensor in tensors} & set(waiting)
        for name, value in model.state_dict().items():
            assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], tensors, strict=True))


def test_an_adapters_own_tensors_leave_out_the_base(t2v) -> None:
    model = load_transformer(t2v, t2v.noise_experts[0])
    plain = {id(t) for t in (*model.parameters(), *model.buffers())}
    adapter = attach(model, [Group("a", random_lora(0), False)])
    own = {id(t) for t in adapter.adapter_tensors()}
    assert own and not own & plain
    assert own | plain == {id(t) for t in (*model.parameters(), *model.buffers())}


def test_one_at_a_time_gives_the_same_bits(t2v, small, mixture_file, tmp_path, capsys) -> None:
    write_lora(tmp_path / "a.safetensors", random_lora(0))
    given = {"moe": mixture_file, "loras": [f"both={tmp_path / 'a.safetensors'}:0.5"]}
    said = {"num_frames": 5, "size": (32, 48), "steps": 4, "guidance": {"high": 3.0, "low": 2.0}}
    made = {}
    for memory in ("both", "one", "stream"):
        generator = VideoGenerator("tiny", memory=memory, **given)
        made[memory] = [generator.generate(prompt, **said) for prompt in ("电凝钩切割组织", "剪刀剪断组织")]
    loads = re.findall("(?:loading|reading) the (high|low) noise expert", capsys.readouterr().err)
    assert loads == ["high", "low"] + 2 * ["high", "low"] + ["high", "low"]
    for both, one in zip(2 * made["both"], made["one"] + made["stream"], strict=True):
        assert torch.equal(both.latents, one.latents) and (both.frames == one.frames).all()
        assert both.settings == one.settings and both.facts == one.facts
        assert "memory" not in one.settings


def test_one_transformer_at_a_time_on_the_device(t2v, small) -> None:
    seen = {}
    for memory in ("both", "one"):
        generator, residents = Generator(t2v, memory=memory), seen.setdefault(memory, [])

        def note(module, inputs, noise_experts=generator.noise_experts, residents=residents):
            if isinstance(module, TimestepEmbedding):  # once in an evaluation
                residents.append(tuple(e.value for e in noise_experts.resident()))

        with register_module_forward_pre_hook(note):
            generator.latents(small(t2v, steps=4))
    assert set(seen["one"]) == {("high",), ("low",)}
    assert seen["both"][-1] == ("high", "low")


def test_the_option_and_repeating_a_video_with_another(lapwan, tmp_path) -> None:
    planned = generate(lapwan, "--memory", "one", "--dry-run")
    assert planned.code == 0 and planned.err.count("memory      one noise expert on cpu at a time") == 1, planned.err
    assert "memory" not in generate(lapwan, "--dry-run").err
    ran = generate(lapwan, "--memory", "one", output="a.mp4")
    assert ran.code == 0 and "memory      one noise expert on cpu at a time (as asked)" in ran.err, ran.err
    assert ran.err.count("\nmemory ") == 1
    assert "memory" not in json.loads(read_metadata(tmp_path / "a.mp4")["settings"])
    for memory in ("both", "one"):
        again = lapwan("generate", "--from", "a.mp4", "--memory", memory, "-o", f"{memory}.mp4")
        assert again.code == 0 and "the frames are identical" in again.err and "warning" not in again.err, again.err


def test_fp16_keeps_in_fp32_what_diffusers_keeps(t2v, lapwan, tmp_path) -> None:
    model = load_transformer(t2v, t2v.noise_experts[0], torch.float16)
    kept = ("norm2", "scale_shift_table", "time_embedder")
    for name, value in model.named_parameters():
        wide = any(part in kept for part in name.split("."))
        assert value.dtype == (torch.float32 if wide else torch.float16), name
    made = {d: generate(lapwan, "--dtype", d, output=f"{d}.safetensors") for d in ("fp16", "fp32")}
    assert all(ran.code == 0 for ran in made.values()), made
    half, full = (load_file(tmp_path / f"{d}.safetensors")["latents"] for d in ("fp16", "fp32"))
    assert 0 < (half - full).abs().max() < 0.05
    assert json.loads(read_metadata(tmp_path / "fp16.safetensors")["facts"])["dtype"] == "float16"


def test_latents_that_overflow_are_refused(t2v, small) -> None:
    generator = Generator(t2v, dtype=torch.float16)
    high = generator.noise_experts.backbone(t2v.noise_experts[0])
    high.transformer.patch_embedding.weight.data.fill_(6e4)
    with pytest.raises(UserError, match="not finite in float16; use --dtype bf16"):
        generator.latents(small(t2v))


def test_an_image_model_one_at_a_time(i2v, small) -> None:
    image = Image.new("RGB", (48, 32), (200, 60, 60))
    request = small(i2v, image=image, steps=4)
    assert torch.equal(Generator(i2v, memory="one").latents(request), Generator(i2v, memory="both").latents(request))


@pytest.fixture
def out_of_memory() -> Iterator[None]:
    """The patch embedding, a transformer's first operation, finds no memory."""
    def full(module: torch.nn.Module, inputs: object) -> None:
        if isinstance(module, torch.nn.Conv3d):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines follow.")

    with register_module_forward_pre_hook(full):
        yield


@pytest.mark.parametrize(("memory", "advice"), [("both", "use --memory one, a smaller"), ("one", "use a smaller")])
def test_running_out_of_gpu_memory_is_one_line(memory, advice, out_of_memory) -> None:
    with pytest.raises(UserError, match="memory ran out at 32x48, 5 frames: " + advice) as caught:
        VideoGenerator("tiny", memory=memory).generate("x", num_frames=5, size=(32, 48), steps=2)
    assert "\n" not in str(caught.value)
