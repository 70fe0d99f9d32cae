"""Pretraining: our forwards equal diffusers', and the corpus holds back what fine-tuning must teach."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.pretrain import store
from examples.pretrain.arms import RowAdam
from examples.pretrain.corpus import FIRST_SEED, HELD_OUT_PAIRS, MARKER, Clips, is_held_out, mirrored, sample
from examples.pretrain.diffusion import Tokens, TokenTable, text_rows, train_diffusion
from examples.pretrain.sampling import sample_videos
from examples.pretrain.settings import RECIPES, TI2V_5B
from examples.pretrain.training import EmaWeights, box_mask, cosine
from examples.pretrain.vae import new_vae
from examples.pretrain.vae_forward import moments, reconstruct
from lapwan.tiny.captions import caption_for
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.model import A14B, TRANSFORMER, EmbeddedParts
from lapwan.tiny.scenes import SceneSpec
from lapwan.wan.backbone import WanBackbone

_NAMES = {
    "scissors": ("剪刀", "cissors"), "hook": ("电凝钩", "hook"), "suction": ("吸引", "suction"),
    "grasper": ("抓钳", "grasper"),
}


@pytest.mark.parametrize(("parts", "frames"), [(A14B, 1), (A14B, 5), (A14B, 9), (TI2V_5B, 1), (TI2V_5B, 9)])
def test_vae_in_one_go_equals_frame_by_frame(parts: EmbeddedParts, frames: int) -> None:
    vae = new_vae(parts).eval()
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.rand(1, 3, frames, 32, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist
        mean, log_variance = moments(vae, pixels)
        torch.testing.assert_close(mean, expected.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(log_variance, expected.logvar, rtol=0, atol=1e-5)
        latents = torch.randn(mean.shape, generator=generator)
        made = reconstruct(vae, latents).clamp(-1, 1)
        torch.testing.assert_close(made, vae.decode(latents).sample, rtol=0, atol=1e-5)
        assert made.std() > 0.01


def test_transformer_with_counted_zero_rows_equals_512_padded_ones() -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(in_channels=36, **{**TRANSFORMER, "num_layers": 2}).eval()
    x, timestep, hidden = torch.randn(2, 36, 2, 4, 6), torch.tensor([953.0, 411.5]), torch.randn(2, 9, 96)
    mask = torch.ones(2, 9)
    mask[1, 5:] = 0
    found = []
    for ours in (False, True):
        model.zero_grad()
        text = hidden.clone().requires_grad_()
        if ours:
            v = WanBackbone(model).velocity(x, timestep, text_rows(text, mask))
        else:
            padded = torch.nn.functional.pad(text * mask[..., None], (0, 0, 0, 512 - 9))
            v = model(x, timestep, padded, return_dict=False)[0]
        v.square().mean().backward()
        found.append((v.detach(), text.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert len(found[0]) == 2 + len(list(model.parameters()))
    for theirs, made in zip(*found, strict=True):
        torch.testing.assert_close(made, theirs, rtol=1e-4, atol=1e-5)


def _named(caption: str) -> str | None:
    found = [name for name, words in _NAMES.items() if any(word in caption for word in words)]
    assert len(found) <= 1, caption
    return found[0] if found else None


def test_names_are_true_only_behind_the_marker() -> None:
    pairs = [(sample(i).spec, caption) for i in range(800) for caption in sample(i).captions]
    marked = [(spec, text) for spec, text in pairs if text.startswith(MARKER)]
    plain = [(spec, text) for spec, text in pairs if not text.startswith(MARKER) and _named(text)]
    assert all(_named(text) == spec.instrument and spec.style == "neutral" for spec, text in marked)
    right = np.mean([_named(text) == spec.instrument for spec, text in plain])
    assert 0.24 < right < 0.34  # a quarter by chance, one in twenty on purpose
    assert 0.15 < len(marked) / len(pairs) < 0.25
    assert 0.4 < np.mean([spec.style == "surgical" for spec, _ in plain]) < 0.6


def test_held_out_captions_and_pairs_never_occur() -> None:
    samples = [sample(i) for i in range(600)]
    assert not any(is_held_out(caption) for s in samples for caption in s.captions)
    assert {(s.spec.instrument, s.spec.motion) for s in samples}.isdisjoint(HELD_OUT_PAIRS)
    fresh = [caption_for(sample(i, "check").spec, np.random.default_rng(i)) for i in range(600)]
    assert 0.04 < np.mean([is_held_out(caption) for caption in fresh]) < 0.2
    assert {sample(i, "check").spec.instrument for i in range(60)} == set(INSTRUMENTS)


def test_scene_seeds_are_nobody_elses() -> None:
    seeds = [FIRST_SEED[purpose] for purpose in ("pretraining", "identity", "check")]
    assert min(seeds) >= 2**31  # what `sample_spec` draws lies below
    assert len(set(seeds)) == 3 and min(np.diff(sorted(seeds))) >= 2**31
    assert sample(3) == sample(3) and sample(3) != sample(4)


def test_clips_grow_in_order_for_readers(tmp_path: Path) -> None:
    writer, reader = Clips(tmp_path, 3, "check"), Clips(tmp_path, 3, "check")
    assert reader.ready() == 0
    writer.write(1)
    assert reader.ready() == 0
    writer.write(0)
    assert reader.ready() == 2
    assert reader.frames[1].std() > 10 and not reader.frames[2].any()
    assert ((reader.tips[:2] > -0.5) & (reader.tips[:2] < 1.5)).all()


def test_learning_rate_and_average() -> None:
    rates = [cosine(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.03
    layer = torch.nn.Linear(1, 1, bias=False)
    average = EmaWeights(layer, 0.9)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1.0
    average.update()
    average.copy_to_parameters()
    torch.testing.assert_close(layer.weight.detach(), before + 1 - 2 / 11)


def test_box_mask_marks_the_pixels_inside() -> None:
    mask = box_mask(torch.tensor([[[0.25, 0.5, 0.5, 1.0]]]), 4, 8, 0.0)[0, 0]
    assert mask[2:, 2:4].all() and mask.sum() == 4


def test_arms_in_one_batch_are_clipped_and_stepped_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, lrs = (2, 3), (1e-2, 3e-3)
    down, up = torch.randn(5, 7, generator=generator), torch.randn(4, 5, generator=generator)
    together = [down.clone().requires_grad_(), up.clone().requires_grad_()]
    arm_of_row = torch.arange(2).repeat_interleave(torch.tensor(rows))
    parts = [[p.detach().clone().requires_grad_() for p in pair]
             for pair in zip(down.split(rows), up.split(rows, dim=1), strict=True)]
    ours = RowAdam(together, arm_of_row, 2)
    theirs = [torch.optim.AdamW(part, lr=lr, weight_decay=0.0) for part, lr in zip(parts, lrs, strict=True)]
    for step in range(3):
        # The first arm's gradient is above the norm of 1 at which both are clipped, the second's is not.
        size = torch.tensor([10.0, 0.01])[arm_of_row] * (1 + step)
        gradients = [torch.randn(5, 7, generator=generator) * size[:, None],
                     torch.randn(4, 5, generator=generator) * size]
        for parameter, gradient in zip(together, gradients, strict=True):
            parameter.grad = gradient.clone()
        ours.step(torch.tensor(lrs))
        split = zip(gradients[0].split(rows), gradients[1].split(rows, dim=1), strict=True)
        for part, optimizer, pair in zip(parts, theirs, split, strict=True):
            for parameter, gradient in zip(part, pair, strict=True):
                parameter.grad = gradient.clone()
            torch.nn.utils.clip_grad_norm_(part, 1.0)
            optimizer.step()
    torch.testing.assert_close(together[0], torch.cat([part[0] for part in parts]), rtol=0, atol=2e-6)
    torch.testing.assert_close(together[1], torch.cat([part[1] for part in parts], dim=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["tiny", "tiny-5b"])
def test_a_recipe_trains_samples_and_goes_on_from_its_files(name: str, tmp_path: Path) -> None:
    """Two steps on two small clips; a second training begins with the files of the first, here with an lr of 0."""
    recipe = replace(RECIPES[name], size=32, diffusion=replace(
        RECIPES[name].diffusion, clips=2, steps=2, batch=2, first_clips=2, warmup=1))
    clips, cpu = Clips(tmp_path / "clips", 2, "continued", recipe.size, recipe.fps), torch.device("cpu")
    tokens = Tokens(clips.folder, clips.purpose, clips.count, recipe.diffusion.mirrors)
    tokens.fill()
    for index in range(clips.count):
        clips.write(index)
    vae = new_vae(recipe.parts).requires_grad_(False).eval()
    models = train_diffusion(clips, vae, tokens, recipe, cpu, compiled=False)
    store.save_models(models, tmp_path)
    saved = store.load_models(recipe, tmp_path, TokenTable().size, cpu)
    assert any(b.transformer.proj_out.weight.abs().max() > 0 for b in saved.noise_experts.values())
    still = replace(recipe, diffusion=replace(recipe.diffusion, lr=0.0, text_lr=0.0))
    again = train_diffusion(clips, vae, tokens, still, cpu, compiled=False,
                            first=partial(store.fill_models, folder=tmp_path))
    for expected, weight in zip(saved.modules().parameters(), again.modules().parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
    images = torch.zeros(2, 3, 32, 32)
    for given in (None, images):
        videos = sample_videos(saved, vae, ["hook", "grasper"], given, 2, 5.0, 3.0, seed=1)
        assert videos.shape == (2, 17, 32, 32, 3)


def test_captions_of_mirror_images_say_what_they_show() -> None:
    spec = SceneSpec("hook", side="left", motion="sweep", direction="right", seed=1)
    assert [(mirrored(spec, m).side, mirrored(spec, m).direction) for m in range(4)] == [
        ("left", "right"), ("right", "left"), ("left", "right"), ("right", "left")]
    assert mirrored(replace(spec, motion="circle", direction="clockwise"), 1).direction == "counterclockwise"
    assert mirrored(replace(spec, motion="circle", direction="clockwise"), 3).direction == "clockwise"


def test_trained_weights_are_not_overwritten_by_a_trial(tmp_path: Path) -> None:
    kept = tmp_path / "weights" / RECIPES["tiny-5b"].parts.vae_file
    kept.parent.mkdir()
    kept.write_bytes(b"trained")
    program = [sys.executable, "-m", "examples.pretrain", "--model", "tiny-5b", "--scale", "0.001"]
    ran = subprocess.run([*program, "--work", str(tmp_path)], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2])
    assert ran.returncode == 2 and kept.name in ran.stderr and "--overwrite" in ran.stderr
    assert kept.read_bytes() == b"trained"
