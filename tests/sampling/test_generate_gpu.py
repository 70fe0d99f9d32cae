"""Generation on a CUDA device: the same numbers as on the CPU in fp32, and bf16 runs through every part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import random_lora
from PIL import Image

from lapwan import VideoGenerator
from lapwan.lora.formats import write_lora
from lapwan.names import Precision
from lapwan.sampling.adapters import AdapterSet, LoraUse
from lapwan.sampling.generator import Generator

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("sampler", ["unipc", "euler", "dpmpp"])
def test_fp32_agrees_with_the_cpu(sampler, t2v, small) -> None:
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        request = small(t2v, sampler=sampler, guidance=3.0)
        there = Generator(t2v, device="cuda").latents(request).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    assert (there - Generator(t2v).latents(request)).abs().max() < 1e-3


def test_bf16_with_everything_on(mixture_file, tmp_path) -> None:
    lora = tmp_path / "a.safetensors"
    write_lora(lora, random_lora(0))
    generator = VideoGenerator("tiny", moe=mixture_file, loras=[f"both={lora}:0.5"], device="cuda")
    small = {"num_frames": 5, "size": (32, 48), "steps": 4, "guidance": {"high": 3.0, "low": 2.0}}
    first = generator.generate("电凝钩切割组织", alpha_expert=0.5, **small)
    again = generator.generate("电凝钩切割组织", alpha_expert=0.5, **small)
    assert first.facts["dtype"] == "bfloat16" and first.facts["device"].startswith("cuda")
    assert np.abs(first.frames.astype(int) - again.frames).max() <= 1
    hinted = generator.generate("电凝钩切割组织", instrument_hint="scissors", **small)
    assert (hinted.frames != first.frames).any()
    picture = Image.new("RGB", (48, 32), (200, 60, 60))
    from_image = VideoGenerator("tiny", device="cuda").generate("x", image=picture, last_image=picture, **small)
    assert from_image.frames.shape == (5, 32, 48, 3)


def test_one_at_a_time_parks_the_idle_one_in_pinned_memory(t2v, small) -> None:
    request = small(t2v, steps=4)
    both = Generator(t2v, device="cuda", dtype=torch.bfloat16, memory="both")
    one = Generator(t2v, device="cuda", dtype=torch.bfloat16, memory="one")
    expected = both.latents(request)
    for _ in range(2):  # the second time from pinned memory
        assert (one.latents(request) - expected).abs().max() < 1e-2
        assert one.noise_experts.resident() == ("low",)
    low, high = (one.noise_experts._loaded[e].backbone.transformer for e in ("low", "high"))
    assert {p.device.type for p in low.parameters()} == {"cuda"}
    assert {(p.device.type, p.is_pinned()) for p in high.parameters()} == {("cpu", True)}
    waiting = one._text.model.parameters()
    assert {(p.device.type, p.is_pinned()) for p in waiting} == {("cpu", True)}
    models = [both.noise_experts.backbone(e).transformer for e in t2v.noise_experts]
    assert {p.device.type for model in models for p in model.parameters()} == {"cuda"}


def test_memory_is_decided_from_what_the_gpu_has_free(t2v, small, capsys) -> None:
    generator = Generator(t2v, device="cuda", dtype=torch.bfloat16)
    generator.latents(small(t2v))
    assert "both noise experts stay on cuda (auto)" in capsys.readouterr().err
    assert generator.noise_experts.resident() == ("high", "low")


def test_fp16_runs(t2v, small) -> None:
    latents = Generator(t2v, device="cuda", dtype=torch.float16).latents(small(t2v, guidance=3.0))
    assert torch.isfinite(latents).all() and latents.dtype == torch.float32


def test_other_adapters_while_blocks_stream(t2v, small) -> None:
    """Their rows are made beside host memory's weights and must follow to the device."""
    request, sets = small(t2v), {}
    for name in ("a", "b"):
        state = random_lora(ord(name))
        sets[name] = AdapterSet({e: [LoraUse(Path(name), state, 1.0)] for e in t2v.noise_experts})
    one = Generator(t2v, sets["a"], device="cuda", dtype=torch.bfloat16, memory="stream")
    one.latents(request)
    one.use(one.noise_experts.base, sets["b"])
    fresh = Generator(t2v, sets["b"], device="cuda", dtype=torch.bfloat16, memory="both")
    assert (one.latents(request) - fresh.latents(request)).abs().max() < 1e-2


def test_every_start_and_a_preview(t2v, i2v, small, tmp_path) -> None:
    """What is made on the host meets the device: a video to start from, both images, stills while sampling."""
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(clip[0])
    there = Generator(t2v, device="cuda", dtype=torch.bfloat16)
    video = there.generate(small(t2v, video_THWC=clip, start_sigma=0.95, steps=4), tmp_path / "preview.png")
    assert video.frames.shape == clip.shape and (tmp_path / "preview.png").is_file()
    assert torch.cuda.get_device_name() == video.facts["hardware"]
    both = Generator(i2v, device="cuda", dtype=torch.bfloat16, memory="one")
    assert both.generate(small(i2v, image=picture, last_image=picture, guidance=2.0)).frames.shape == clip.shape


@pytest.mark.parametrize("precision", list(Precision))
def test_quantised_blocks_with_loras_and_guidance(precision, t2v, small) -> None:
    adapters = AdapterSet({e: [LoraUse(Path("a"), random_lora(1), 0.5)] for e in t2v.noise_experts})
    plain, quantised = (
        Generator(t2v, adapters, "cuda", torch.bfloat16, precision=form).latents(small(t2v, guidance=3.0))
        for form in (None, precision)
    )
    assert 0 < (plain - quantised).norm() / plain.norm() < 0.5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_another_gpu_than_the_first(dtype) -> None:
    small = {"num_frames": 5, "size": (32, 48), "steps": 2, "guidance": 3.0}
    first, second = (VideoGenerator("tiny", device=f"cuda:{i}", dtype=dtype).generate("x", **small) for i in (0, 1))
    torch.cuda.set_device(0)
    assert np.abs(first.frames.astype(int) - second.frames).max() <= 1
