"""Whole generations against diffusers' own pipelines: same noise, same scheduler, fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import random_lora
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from lapwan.lora.formats import write_lora
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import read_adapters
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, complete_guidance
from lapwan.settings.lora_argument import LoraArgument
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.vae import decode

PROMPT, NEGATIVE, SIZE, FRAMES, STEPS, SEED = "电凝钩切割血管。A hook cuts.", "模糊，静态", (48, 64), 9, 6, 7
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pipelines(t2v: ModelSpec, i2v: ModelSpec) -> dict[str, WanPipeline | WanImageToVideoPipeline]:
    found = {
        "t2v": WanPipeline.from_pretrained(t2v.path, dtype=torch.float32),
        "i2v": WanImageToVideoPipeline.from_pretrained(i2v.path, dtype=torch.float32),
    }
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def theirs(pipeline: WanPipeline, task: str, image: Image.Image, guidance: tuple[float, float]) -> torch.Tensor:
    given = {"image": image} if task == "i2v" else {}
    return pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=SIZE[0], width=SIZE[1], num_frames=FRAMES,
        num_inference_steps=STEPS, guidance_scale=guidance[0], guidance_scale_2=guidance[1],
        generator=torch.Generator().manual_seed(SEED), output_type="latent", **given,
    ).frames


def request(spec: ModelSpec, image: Image.Image, guidance: tuple[float, float]) -> Request:
    wanted = dict(zip((NoiseExpert.HIGH, NoiseExpert.LOW), guidance, strict=True))
    return Request(
        prompt=PROMPT, negative_prompt=NEGATIVE, num_frames=FRAMES, size=SIZE, steps=STEPS, fps=16, seed=SEED,
        guidance=complete_guidance(spec, wanted), image=image if spec.task == "i2v" else None,
    )


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (4.0, 3.0)])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_generation_equals_diffusers(task, guidance, pipelines, image, t2v, i2v) -> None:
    spec = t2v if task == "t2v" else i2v
    generator = Generator(spec)
    ours = generator.latents(request(spec, image, guidance))
    expected = theirs(pipelines[task], task, image, guidance)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < TOLERANCE
    pipeline = pipelines[task]
    z = expected * torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
    z = z + torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        pixels = pipeline.vae.decode(z, return_dict=False)[0]
        assert (decode(generator.vae(), ours) - pixels).abs().max() < TOLERANCE
    high = int((pipeline.scheduler.timesteps >= spec.boundary * 1000).sum())
    assert 0 < high < STEPS  # both noise experts took part


@pytest.fixture
def lora_files(tmp_path: Path) -> dict[NoiseExpert, Path]:
    files = {e: tmp_path / f"lora_{e.file_suffix}.safetensors" for e in NoiseExpert}
    for index, file in enumerate(files.values()):
        write_lora(file, random_lora(index), layout="diffusers")
    return files


def latents_with(
    files: dict[NoiseExpert, Path], spec: ModelSpec, image: Image.Image, fold: bool = False
) -> torch.Tensor:
    loras = [
        LoraArgument(noise_expert="high", path=files[NoiseExpert.HIGH], strength=0.7),
        LoraArgument(path=files[NoiseExpert.LOW]),  # its name says the noise expert
    ]
    return Generator(*read_adapters(Base(spec), loras, None, fold)).latents(request(spec, image, (4.0, 3.0)))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_generation_with_a_lora_equals_diffusers_with_it_merged(
    task, pipelines, image, t2v, i2v, lora_files
) -> None:
    """ΔW = strength · alpha / r · B A, added to a pipeline's weights by hand."""
    spec, cls = (t2v, WanPipeline) if task == "t2v" else (i2v, WanImageToVideoPipeline)
    pipeline = cls.from_pretrained(spec.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for index, (noise_expert, strength) in enumerate(((NoiseExpert.HIGH, 0.7), (NoiseExpert.LOW, 1.0))):
        for path, entry in random_lora(index).entries.items():
            weight = getattr(pipeline, noise_expert.component).get_submodule(path).weight
            weight.data += strength * entry.alpha / entry.down.shape[0] * (entry.up @ entry.down)
    expected = theirs(pipeline, task, image, (4.0, 3.0))
    assert (expected - theirs(pipelines[task], task, image, (4.0, 3.0))).abs().max() > 100 * TOLERANCE
    assert (latents_with(lora_files, spec, image) - expected).abs().max() < TOLERANCE
    if task == "t2v":
        assert (latents_with(lora_files, spec, image, fold=True) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_generation_with_a_lora_equals_diffusers_that_loads_the_file(
    task, pipelines, image, t2v, i2v, lora_files
) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRA files through peft")
    spec, pipeline = (t2v, pipelines["t2v"]) if task == "t2v" else (i2v, pipelines["i2v"])
    high, low = str(lora_files[NoiseExpert.HIGH]), str(lora_files[NoiseExpert.LOW])
    try:
        pipeline.load_lora_weights(high, adapter_name="high")
        pipeline.load_lora_weights(low, adapter_name="low", load_into_transformer_2=True)
        pipeline.transformer.set_adapters("high", 0.7)
        pipeline.transformer_2.set_adapters("low", 1.0)
        expected = theirs(pipeline, task, image, (4.0, 3.0))
    finally:
        pipeline.unload_lora_weights()
    assert (latents_with(lora_files, spec, image) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("noise_expert", list(NoiseExpert))
def test_velocity_equals_the_pipelines_transformer(noise_expert, pipelines, i2v) -> None:
    model = getattr(pipelines["i2v"], noise_expert.component)
    generator = torch.Generator().manual_seed(3)
    x, condition = (torch.randn(2, c, 2, 4, 6, generator=generator) for c in (16, 20))
    text = torch.randn(2, 512, i2v.text_dim, generator=generator)
    timestep = torch.tensor([950, 20])
    with torch.no_grad():
        expected = model(torch.cat([x, condition], 1), timestep, text, return_dict=False)[0]
        ours = WanBackbone(load_transformer(i2v, noise_expert)).velocity(x, timestep, text, condition)
    assert (ours - expected).abs().max() < 1e-5


def test_guidance_is_decided_by_each_noise_expert(t2v, small) -> None:
    """(1, 4) guides the low noise expert only, where diffusers would guide neither."""
    generator = Generator(t2v)
    none = generator.latents(small(t2v, guidance=1.0, steps=6))
    low = generator.latents(small(t2v, guidance={NoiseExpert.HIGH: 1.0, NoiseExpert.LOW: 4.0}, steps=6))
    assert (none - low).abs().max() > 1e-3


def test_a_noise_expert_without_steps_is_not_loaded(t2v, small) -> None:
    generator = Generator(t2v)
    generator.latents(small(t2v, steps=2, flow_shift=30.0))
    assert generator.noise_experts.resident() == (NoiseExpert.HIGH,)
