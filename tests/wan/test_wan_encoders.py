"""Latents, I2V condition and text features equal what diffusers' own pipelines make."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapwan.errors import UserError
from lapwan.models.spec import read_spec
from lapwan.tiny.model import tiny_folder
from lapwan.wan import image_condition, text, vae

PROMPTS = [
    "抓钳抓取标本袋。", "the hook  dissects &amp;amp; burns\n the gallbladder", "", "电凝钩切割血管，吸引清理术野 " * 5,
]


@pytest.fixture(scope="module")
def i2v():
    return read_spec(tiny_folder("i2v"))


@pytest.fixture(scope="module")
def pipeline(i2v):
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline.from_pretrained(i2v.path, dtype=torch.float32, local_files_only=True)


def _shift_statistics(*models):
    """Give the VAE a mean and std that are not 0 and 1, so that a wrong normalisation shows."""
    for model in models:
        model.register_to_config(latents_mean=[0.1 * i - 0.7 for i in range(16)],
                                 latents_std=[0.5 + 0.1 * i for i in range(16)])


def test_latents_equal_the_normalised_mode(i2v, pipeline):
    ours = vae.load_vae(i2v)
    _shift_statistics(ours, pipeline.vae)
    pixels = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mode()
        mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, 16, 1, 1, 1)
        std = torch.tensor(pipeline.vae.config.latents_std).view(1, 16, 1, 1, 1)
        latents = vae.encode(ours, pixels)
        assert latents.shape == (2, 16, 3, 4, 6)
        torch.testing.assert_close(latents, (raw - mean) / std, atol=1e-5, rtol=0)
        # What the pipeline decodes at the end of a generation: latents / (1/std) + mean.
        expected = pipeline.vae.decode(latents / (1 / std) + mean).sample
        torch.testing.assert_close(vae.decode(ours, latents), expected, atol=1e-5, rtol=0)


def test_vae_is_frozen_and_refuses_a_frame_count_it_would_cut(i2v):
    ours = vae.load_vae(i2v)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    with pytest.raises(ValueError, match="6 frames"):
        vae.encode(ours, torch.zeros(1, 3, 6, 16, 16))


@pytest.mark.parametrize(("frames", "last"), [(1, False), (5, False), (17, False), (5, True), (17, True), (37, True)])
def test_condition_equals_prepare_latents(i2v, pipeline, frames, last):
    ours = vae.load_vae(i2v)
    _shift_statistics(ours, pipeline.vae)
    image, end = torch.rand(2, 1, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        _, expected = pipeline.prepare_latents(
            image, 1, 16, 32, 48, frames, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0),
            last_image=end if last else None,
        )
        condition_BCTHW = image_condition.image_condition(ours, image, frames, end if last else None)
    assert condition_BCTHW.shape == (1, 20, (frames - 1) // 4 + 1, 4, 6)
    torch.testing.assert_close(condition_BCTHW, expected, atol=1e-5, rtol=0)


def test_text_equals_encode_prompt(i2v, pipeline):
    encoder = text.load_text_encoder(i2v)
    expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    features = text.encode_text(encoder, PROMPTS)
    assert len({f.shape[0] for f in features}) > 1
    padded = text.pad_text(features)
    assert padded.shape == expected.shape == (4, 512, i2v.text_dim)
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)
    assert padded[0, features[0].shape[0]:].abs().max() == 0


def test_text_does_not_depend_on_its_batch_and_is_cut_at_the_length(i2v):
    encoder = text.load_text_encoder(i2v)
    together = text.encode_text(encoder, PROMPTS)
    for prompt, feature in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(text.encode_text(encoder, [prompt])[0], feature, atol=1e-5, rtol=0)
    assert text.encode_text(encoder, ["x " * 900])[0].shape[0] == 512
    assert text.encode_text(encoder, [""])[0].shape[0] == 1  # only the end mark


@pytest.mark.parametrize(("part", "load"), [("vae", vae.load_vae), ("text_encoder", text.load_text_encoder)])
def test_a_model_that_lacks_a_tensor_is_refused(part, load, tmp_path):
    folder = shutil.copytree(tiny_folder("i2v"), tmp_path / "model")
    path = next((folder / part).glob("*.safetensors"))
    tensors = load_file(path)
    path.unlink()
    dropped = next(name for name in tensors if name.endswith("weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{part} lack 1 tensors of its config, such as '{dropped}'"):
        load(read_spec(folder))


@pytest.mark.parametrize(("change", "message"), [
    ({"extra_ids": 10**12}, "extra_ids = 1000000000000: must be less than or equal to 65536"),
    ({"eos_token": "<new>"}, "they do not belong together"), (None, "is no file of at most 64 MiB")])
def test_a_tokenizer_that_is_too_large_is_refused(change, message, tmp_path):
    folder = shutil.copytree(tiny_folder("t2v"), tmp_path / "model")
    file = folder / "tokenizer" / "tokenizer_config.json"
    if change is None:
        with (folder / "tokenizer" / "added_tokens.json").open("wb") as stream:
            stream.truncate(1 << 40)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        text.encode_text(text.load_text_encoder(read_spec(folder)), ["x"])


def test_a_clip_longer_than_the_positions_is_refused(i2v):
    i2v_spec = read_spec(tiny_folder("i2v"))
    assert i2v_spec.positions == 256
    with pytest.raises(UserError, match="sides of at most 4096 pixels, and 1021 frames"):
        i2v_spec.latent_shape(5, 4112, 16)
    with pytest.raises(UserError, match="and 1021 frames"):
        i2v_spec.check_clip(1025, 16, 16)


def test_prompt_cleaning():
    assert text.clean_prompt("  a &amp;amp; b\n\tc ") == "a & b c"
    assert text.clean_prompt("剪刀，剪断。") == "剪刀,剪断。"


@pytest.mark.parametrize(("frames", "last"), [(1, False), (5, False), (9, False), (45, False), (5, True), (45, True)])
def test_the_static_encoding_is_bitwise_the_plain_one_and_saves_work(i2v, frames, last):
    from lapwan.wan.image_condition import encode_static

    ours = vae.load_vae(i2v)
    image, end = torch.rand(2, 2, 3, 16, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    end = end if last else None
    with torch.no_grad():
        plain = ours.encode(image_condition.condition_video(image, frames, end)).latent_dist.mode()
        static, evaluations, all_evaluations = encode_static(ours, image, frames, end)
    assert torch.equal(static, plain)
    assert evaluations <= all_evaluations
    if frames == 45:
        # 12 chunks: the full-size layers converge after a few, and a last image runs them once more.
        assert evaluations < (0.8 if last else 0.75) * all_evaluations


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_over_channels_is_diffusers_with_its_gradient(i2v, dtype):
    """On a CPU by another sum (not in bf16, whose squares are too coarse); zeros stay zeros."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    module = WanRMS_norm(6, images=False).to(dtype)
    torch.nn.init.normal_(module.gamma)
    results = []
    for fast in (False, True):
        x = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        x[0, :, 0] = 0
        x.requires_grad_()
        if fast:
            vae.use_fast_norms(module)
        out = module(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        assert not out[0, :, 0].any()
        results.append((out.detach(), x.grad[1], module.gamma.grad.clone()))
        module.gamma.grad = None
    exact = dtype == torch.bfloat16  # the same computation
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exact else 1e-12)
