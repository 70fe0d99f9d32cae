"""Generation on a CUDA device: the same numbers as on the CPU in fp32, and bf16 runs through every part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sampling_cases import random_lora

from lapwan import VideoGenerator
from lapwan.lora.formats import write_lora
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
