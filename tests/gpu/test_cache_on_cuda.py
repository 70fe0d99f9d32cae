"""Caching on a GPU: `pytest -m gpu`. The files agree with the CPU's to the precision of the convolutions."""

from __future__ import annotations

import gc

import pytest
import torch
from cache_clips import cache_tiny, make_video, write_jsonl

from lapwan.caching.read import load_index, read_item

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def dataset(tmp_path):
    for index in range(3):
        make_video(tmp_path / f"c{index}.mp4", frames=48, seed=index)
    return write_jsonl(tmp_path / "clips.jsonl", [
        {"video_path": f"c{i}.mp4", "caption": f"剪刀 {i}"} for i in range(3)])


@pytest.mark.parametrize(("vae_dtype", "error"), [("float32", 5e-3), ("bfloat16", 5e-2)])
def test_files_agree_with_the_cpu(dataset, tmp_path, vae_dtype, error):
    """TF32 convolutions and bfloat16 round; relative error over a clip, and the condition likewise."""
    common = {"model": "tiny-i2v", "num_frames": (45,)}
    cpu = cache_tiny(dataset, tmp_path / "cpu", **common)
    gpu = cache_tiny(dataset, tmp_path / "gpu", device="cuda", vae_dtype=vae_dtype, **common)
    for ours, theirs in zip(load_index(gpu).items, load_index(cpu).items, strict=True):
        on_gpu, on_cpu = read_item(gpu, ours), read_item(cpu, theirs)
        for kind in ("latents", "condition"):
            assert (on_gpu[kind] - on_cpu[kind]).norm() < error * on_cpu[kind].norm()
        torch.testing.assert_close(on_gpu["text"], on_cpu["text"], atol=1e-3, rtol=1e-3)


def test_the_still_encoding_is_bitwise_the_plain_one():
    from lapwan.models.spec import read_spec
    from lapwan.tiny.model import tiny_folder
    from lapwan.wan.image_condition import condition_video, encode_static
    from lapwan.wan.vae import channels_last, load_vae

    vae = load_vae(read_spec(tiny_folder("i2v")), device="cuda")
    channels_last(vae)
    image = torch.rand(2, 3, 64, 64, device="cuda") * 2 - 1
    with torch.no_grad():
        still, done, plain_count = encode_static(vae, image, 81)
        assert torch.equal(still, vae.encode(condition_video(image, 81)).latent_dist.mode())
    assert done < 0.6 * plain_count


def test_a_clip_too_large_for_the_memory_is_one_line(dataset, tmp_path):
    from lapwan.errors import UserError

    gc.collect()
    torch.cuda.empty_cache()  # what torch holds from other tests it would give without asking the device
    torch.cuda.set_per_process_memory_fraction(0.001)  # 140 MB of an H200
    try:
        with pytest.raises(UserError, match="too small for the VAE on 45 frames of 512x512"):
            cache_tiny(dataset, tmp_path / "cache", device="cuda", num_frames=(45,), size=(512, 512))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
