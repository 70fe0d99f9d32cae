"""Models of one transformer are trained: TI2V-5B with and without a clean first frame, Wan2.1 T2V."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from one_transformer import write_wan21
from safetensors import safe_open
from training_cases import randomise

from lapwan.errors import UserError
from lapwan.lora.formats import open_lora
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.rng import uniform
from lapwan.sampling.adapters import read_adapters
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, complete_guidance
from lapwan.settings.lora_argument import LoraArgument
from lapwan.train.objective import SigmaRule, make_draws
from lapwan.train.trainer import Trainer
from lapwan.wan.text import pad_text

HIGH = NoiseExpert.HIGH


@pytest.fixture
def make_ti2v(make_lora, ti2v: ModelSpec, ti2v_cache: Path):
    def make(**changes: Any) -> Trainer:
        return make_lora(**{"model": str(ti2v.path), "data": {"cache": ti2v_cache}, **changes})
    return make


def keys(trainer: Trainer, indices: list[int], seed: int) -> list[tuple[Any, ...]]:
    return [(seed, "high", 0, trainer.data.item_ids[i]) for i in indices]


def seed_with(clean: list[bool], ids: list[str]) -> int:
    """A seed by which these clips have a clean first frame, or none, at a share of a half."""
    return next(seed for seed in range(1000) if all(
        (uniform(seed, "high", 0, clip, "first frame") < 0.5) == is_clean
        for clip, is_clean in zip(ids, clean, strict=True)))


@pytest.mark.parametrize("clean", [[False, False], [True, True], [False, True]])
def test_the_loss_is_that_of_diffusers_own_transformer(make_ti2v, ti2v, clean) -> None:
    """A timestep per token, 0 on the first latent frame where it is given, and no loss there."""
    trainer = make_ti2v(roi_weight=1.0)
    batch = trainer.data.load_batch([0, 2])
    draws = make_draws(batch, keys(trainer, [0, 2], seed_with(clean, list(batch.ids))), SigmaRule(), 0.0, 0.5)
    assert (draws.clean_B is None) == (not any(clean)) and (draws.clean_B is None or draws.clean_B.tolist() == clean)
    with trainer.objective.loss(HIGH, batch, draws) as loss:
        ours, region = loss.figures["loss/diffusion"], loss.figures["loss/roi"]
    model = WanTransformer3DModel.from_pretrained(ti2v.path / "transformer")
    x0, sigma, given = batch.latents_BCTHW, draws.sigma_B.float().view(-1, 1, 1, 1, 1), torch.tensor(clean)
    x = sigma * draws.noise_BCTHW + (1 - sigma) * x0
    mask = torch.ones(2, 1, *x.shape[2:])
    mask[given, :, 0] = 0
    x = (1 - mask) * x0 + mask * x  # as the pipeline joins them
    times = 1000 * draws.sigma_B.float()[:, None] * mask[:, 0, :, ::2, ::2].flatten(1)
    with torch.no_grad():
        v = model(x, times, pad_text(list(batch.text)), return_dict=False)[0]
    error = (v - (draws.noise_BCTHW - x0)).square().mean(1)
    counted = mask[:, 0]
    torch.testing.assert_close(ours, (error * counted).sum((1, 2, 3)) / counted.sum((1, 2, 3)), rtol=0, atol=1e-4)
    roi = batch.roi_BTHW * counted
    torch.testing.assert_close(region, (error * roi).sum((1, 2, 3)) / roi.sum((1, 2, 3)), rtol=0, atol=1e-4)


def test_a_batch_of_two_is_two_of_one(make_ti2v) -> None:
    trainer = make_ti2v(roi_weight=1.0)
    randomise(trainer)
    for backbone in trainer.objective.backbones.values():
        backbone.transformer.double()
    ids = [trainer.data.item_ids[i] for i in (0, 2)]
    seed = seed_with([False, True], ids)

    def gradients(indices: list[int]) -> dict[str, torch.Tensor]:
        for parameter in trainer.parameters.values():
            parameter.grad = None
        batch = trainer.data.load_batch(indices)
        draws = make_draws(batch, keys(trainer, indices, seed), SigmaRule(), 0.0, 0.5)
        batch = replace(batch, text=tuple(text.double() for text in batch.text))
        draws = replace(draws, noise_BCTHW=draws.noise_BCTHW.double())
        with trainer.objective.loss(HIGH, batch, draws) as loss:
            loss.total_B.sum().backward()
        return {name: p.grad.clone() for name, p in trainer.parameters.items()}

    both, apart = gradients([0, 2]), [gradients([0]), gradients([2])]
    for name, value in both.items():
        torch.testing.assert_close(value, sum(part[name] for part in apart), rtol=0, atol=1e-10)
    assert max(float(value.abs().max()) for value in both.values()) > 1e-3


def test_draws_of_a_first_frame_follow_the_share_and_no_image_has_one(make_ti2v) -> None:
    trainer = make_ti2v()
    batch = trainer.data.load_batch([0])

    def count(share: float) -> int:
        draws = [make_draws(batch, keys(trainer, [0], seed), SigmaRule(), 0.0, share) for seed in range(200)]
        return sum(draw.clean_B is not None for draw in draws)

    assert count(0.0) == 0 and count(1.0) == 200 and 75 < count(0.5) < 125
    image = replace(batch, latents_BCTHW=batch.latents_BCTHW[:, :, :1])
    assert make_draws(image, keys(trainer, [0], 0), SigmaRule(), 0.0, 1.0).clean_B is None
    drawn = [draw.clean_B is not None for _ in range(20) for draw in _steps(trainer)]
    assert any(drawn) and not all(drawn)  # the default is both


def _steps(trainer: Trainer):
    data = trainer.data.step(HIGH)
    trainer.data.streams[HIGH].position = data.next_position
    return data.draws


def test_a_resumed_run_is_bitwise_that_of_one_without_a_stop(make_ti2v, tmp_path) -> None:
    common = {"steps": 4, "save_every": 2, "batch_size": 2, "caption_dropout": 0.3, "ema_decay": 0.9}
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    make_ti2v(**common, output=tmp_path / "whole").fit()
    first = make_ti2v(**common, output=tmp_path / "parts")
    first.schedule = first.schedule[:2]
    first.fit()
    second = make_ti2v(**common, output=tmp_path / "parts")
    assert second.resume()
    second.fit()
    files = [(tmp_path / name / "lapwan.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_one_file_names_the_model_and_no_noise_expert(make_ti2v, ti2v, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    make_ti2v(steps=1).fit()
    for folder in (tmp_path / "run", tmp_path / "run" / "step_000001"):
        assert [path.name for path in folder.glob("*.safetensors")] == ["lapwan.safetensors"]
    path = tmp_path / "run" / "lapwan.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_base_model_version"], metadata["modelspec.architecture"]) == ("wan_2.2_5b", "wan2.2/lora")
    assert (metadata["lapwan.model"], metadata["lapwan.task"], metadata["modelspec.title"]) == (
        "TI2V-5B", "ti2v", "lapwan")
    assert "high" not in json.dumps(metadata)
    renamed = path.rename(path.with_name("low_light.safetensors"))  # a name is not what the file is for
    assert set(open_lora(renamed)) == {None}
    assert read_adapters(Base(ti2v), [LoraArgument(path=renamed)], None)[1].loras[HIGH]


@pytest.mark.parametrize("with_image", [False, True])
def test_the_trained_lora_generates_what_it_does_in_diffusers(make_ti2v, ti2v, tmp_path, with_image) -> None:
    import numpy as np
    from PIL import Image

    trainer = make_ti2v(steps=1)
    randomise(trainer, 0.3)
    [path] = trainer.objective.save(tmp_path, 1)
    size, frames, steps = (64, 96), 5, 4
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if with_image else None
    pipeline = (WanImageToVideoPipeline if with_image else WanPipeline).from_pretrained(ti2v.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> torch.Tensor:
        return pipeline(
            prompt="电凝钩", negative_prompt="模糊", height=size[0], width=size[1], num_frames=frames,
            num_inference_steps=steps, guidance_scale=3.0, generator=torch.Generator().manual_seed(3),
            output_type="latent", **({"image": image} if with_image else {})).frames

    before = theirs()
    pipeline.load_lora_weights(str(path))
    with_lora = theirs()
    request = Request(
        prompt="电凝钩", negative_prompt="模糊", num_frames=frames, size=size, steps=steps, fps=24, seed=3,
        guidance=complete_guidance(ti2v, 3.0), image=image)
    base, adapters = read_adapters(Base(ti2v), [LoraArgument(path=path)], None)
    assert (Generator(ti2v).latents(request) - before).abs().max() < 1e-4
    assert (Generator(base, adapters).latents(request) - with_lora).abs().max() < 1e-4
    assert (with_lora - before).abs().max() > 1e-2


def test_a_lora_of_the_other_model_is_refused_by_name(make_lora, make_ti2v, ti2v, tiny_t2v, tmp_path) -> None:
    [path] = make_ti2v(steps=1).objective.save(tmp_path, 1)
    high, _ = make_lora(steps=1).objective.save(tmp_path, 1)
    with pytest.raises(UserError, match=r"the LoRA was made for another model"):
        read_adapters(Base(tiny_t2v), [LoraArgument(path=path, noise_expert="high")], None)
    with pytest.raises(UserError, match=r"lapwan\.safetensors \(for TI2V-5B\) does not say which noise expert"):
        read_adapters(Base(tiny_t2v), [LoraArgument(path=path)], None)
    with pytest.raises(UserError, match=r"the LoRA was made for another model"):
        read_adapters(Base(ti2v), [LoraArgument(path=high)], None)


def test_settings_of_two_noise_experts_are_refused(make_ti2v, make_lora) -> None:
    for changes, key in (({"low": {"alpha": 1.0}}, "[low]"), ({"one_file": True}, "one_file"),
                         ({"shares": {"high": 0.5, "low": 0.5}}, "shares"),
                         ({"phases": [{"low": 2}], "steps": None}, "low steps in [[phases]]")):
        with pytest.raises(UserError) as error:
            make_ti2v(**changes)
        assert str(error.value).startswith(f"{key}: only for a model of two noise experts, but TI2V-5B has one")
    with pytest.raises(UserError, match=r"first_frame = 0\.5 is for models .* not for T2V-A14B"):
        make_lora(first_frame=0.5)
    assert make_ti2v(phases=[{"joint": 3}, {"high": 2}], steps=None).schedule == [HIGH] * 5


def test_wan21_is_trained_in_one_file(make_lora, tiny_t2v, t2v_cache, tmp_path) -> None:
    spec = write_wan21(tmp_path / "m", tiny_t2v)
    trainer = make_lora(model=str(spec.path), steps=1)
    [path] = trainer.objective.save(tmp_path, 1)
    assert path.name == "lapwan.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["lapwan.model"] == "Wan2.1 T2V" and metadata["ss_base_model_version"] == "wan2.1"
    assert metadata["modelspec.architecture"] == "wan2.1/lora"
    assert trainer.data.step(HIGH).draws[0].clean_B is None
