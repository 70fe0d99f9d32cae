"""TI2V-5B (a timestep per token, a 48-channel VAE of stride 16) and Wan2.1 T2V, as small random folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from sampling_cases import refused
from transformers import UMT5Config, UMT5EncoderModel

from lapwan.errors import UserError
from lapwan.models.spec import ModelSpec, read_spec
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, complete_guidance
from lapwan.tiny.model import make_tokenizer
from lapwan.tiny.resolve import resolve
from lapwan.wan.vae import decode

SIZE, FRAMES, STEPS = (64, 96), 9, 6


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory) -> ModelSpec:
    folder = tmp_path_factory.mktemp("ti2v") / "model"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                      is_encoder_decoder=False, use_cache=False)
    WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=48, num_res_blocks=1, is_residual=True, in_channels=12,
            out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[1.3] * 48,
        ).eval(),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=48, out_channels=48,
            text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
        ).eval(),
        transformer_2=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
        expand_timesteps=True,
    ).save_pretrained(folder)
    return read_spec(folder)


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


def test_it_is_for_generation_only(ti2v) -> None:
    with pytest.raises(UserError, match="is a TI2V-5B model, which lapwan can generate with but not train"):
        resolve(str(ti2v.path))
    assert resolve(str(ti2v.path), generation=True).task == "ti2v"


def test_sizes_are_multiples_of_32(lapwan, ti2v, tmp_path) -> None:
    command = ("generate", "--model", str(ti2v.path), "--prompt", "x", "-o", "a", "--num-frames", "5", "--steps", "2")
    refused(lapwan(*command, "--size", "48x64"), "multiples of 32")
    refused(lapwan(*command, "--size", "32x64", "--boundary", "0.5"), "one transformer for all noise")
    assert lapwan(*command, "--size", "32x64").code == 0
    Image.new("RGB", (64, 32)).save(tmp_path / "first.png")
    refused(lapwan(*command, "--size", "32x64", "--image", "first.png", "--last-image", "first.png", "--overwrite"),
            "takes a first frame only")


def edited(source: ModelSpec, folder: Path, file: str, **changes: object) -> Path:
    """A folder of links to a model's parts, with one JSON file changed."""
    folder.mkdir()
    for part in source.path.iterdir():
        (folder / part.name).symlink_to(part, target_is_directory=part.is_dir())
    target = folder / file
    if target.parent != folder:
        real = target.parent.resolve()
        target.parent.unlink()
        target.parent.mkdir()
        for part in real.iterdir():
            (target.parent / part.name).symlink_to(part)
    data = json.loads(target.read_text())
    target.unlink()
    target.write_text(json.dumps({**data, **changes}))
    return folder


def test_wan21_text_to_video_is_one_transformer(t2v, tmp_path, small) -> None:
    folder = edited(t2v, tmp_path / "m", "model_index.json", boundary_ratio=None, transformer_2=[None, None])
    (folder / "lapwan.json").unlink()
    spec = read_spec(folder)
    assert spec.noise_experts == ("high",) and spec.defaults.guidance == {"high": 5.0} and spec.defaults.steps == 50
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
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
