"""TI2V-5B (a timestep per token, a 48-channel VAE of stride 16) and Wan2.1 T2V, as small random folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from one_transformer import edited, write_wan21
from PIL import Image
from sampling_cases import refused

from lapwan.errors import UserError
from lapwan.models.spec import read_spec
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, complete_guidance
from lapwan.wan.vae import decode

SIZE, FRAMES, STEPS = (64, 96), 9, 6


def test_the_spec_is_read_from_the_folder(ti2v) -> None:
    assert (ti2v.task, ti2v.boundary, ti2v.latent_channels, ti2v.pixel_multiple) == ("ti2v", None, 48, 32)
    assert (ti2v.defaults.steps, ti2v.defaults.fps, ti2v.defaults.guidance) == (50, 24, {"high": 5.0})
    assert ti2v.latent_shape(FRAMES, *SIZE) == (48, 3, 4, 6)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("with_image", [False, True])
def test_a_generation_equals_diffusers(with_image, guidance, ti2v) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if with_image else None
    pipeline = (WanImageToVideoPipeline if with_image else WanPipeline).from_pretrained(ti2v.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": image} if with_image else {}
    expected = pipeline(
        prompt="电凝钩", negative_prompt="模糊", height=SIZE[0], width=SIZE[1], num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=guidance, generator=torch.Generator().manual_seed(3),
        output_type="latent", **given,
    ).frames
    generator = Generator(ti2v)
    request = Request(
        prompt="电凝钩", negative_prompt="模糊", num_frames=FRAMES, size=SIZE, steps=STEPS, fps=24, seed=3,
        guidance=complete_guidance(ti2v, guidance), image=image,
    )
    ours = generator.latents(request)
    if with_image:
        assert torch.equal(ours[:, :, 0], generator._conditions(request, False).first_BC1HW[:, :, 0])
    assert (ours - expected).abs().max() < 1e-4
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in
                 (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std))
    with torch.no_grad():
        pixels = pipeline.vae.decode(expected * std + mean, return_dict=False)[0]
        assert (decode(generator.vae(), ours) - pixels).abs().max() < 1e-4
    assert generator.generate(request).frames.shape == (FRAMES, *SIZE, 3)


def test_sizes_are_multiples_of_32(lapwan, ti2v, tmp_path) -> None:
    command = ("generate", "--model", str(ti2v.path), "--prompt", "x", "-o", "a", "--num-frames", "5", "--steps", "2")
    refused(lapwan(*command, "--size", "48x64"), "multiples of 32")
    refused(lapwan(*command, "--size", "32x64", "--boundary", "0.5"), "one transformer for all noise")
    assert lapwan(*command, "--size", "32x64").code == 0
    Image.new("RGB", (64, 32)).save(tmp_path / "first.png")
    refused(lapwan(*command, "--size", "32x64", "--image", "first.png", "--last-image", "first.png", "--overwrite"),
            "takes a first frame only")


def test_wan21_text_to_video_is_one_transformer(t2v, tmp_path, small) -> None:
    spec = write_wan21(tmp_path / "m", t2v)
    assert spec.noise_experts == ("high",) and spec.defaults.guidance == {"high": 5.0} and spec.defaults.steps == 50
    pipeline = WanPipeline.from_pretrained(spec.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    request = small(spec, guidance=3.0, negative_prompt="模糊")
    expected = pipeline(
        prompt=request.prompt, negative_prompt="模糊", height=32, width=48, num_frames=5, num_inference_steps=3,
        guidance_scale=3.0, generator=torch.Generator().manual_seed(request.seed), output_type="latent",
    ).frames
    assert (Generator(spec).latents(request) - expected).abs().max() < 1e-4


def test_wan21_image_to_video_is_refused_by_name(i2v, tmp_path) -> None:
    folder = edited(i2v, tmp_path / "m", "transformer/config.json", image_dim=1280)
    with pytest.raises(UserError, match=r"Wan2\.1 image-to-video model, which needs an image encoder"):
        read_spec(folder)
