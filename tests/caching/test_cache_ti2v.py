"""Caches of TI2V-5B: 48 channels, strides 4x16x16, sizes in multiples of 32, 24 fps, the first frame in the latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_cases import write_random_cache
from cache_clips import cache_tiny, make_video, strip_recipes, write_jsonl
from safetensors.torch import load_file

from lapwan.caching.read import load_index, read_item
from lapwan.data.buckets import centre_crop
from lapwan.data.video import probe, read_frames
from lapwan.errors import UserError
from lapwan.train.clip_store import check_cache
from lapwan.wan.vae import encode, load_vae


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    sizes = {"wide": (128, 64), "tall": (64, 128), "even": (96, 96)}
    for name, size in sizes.items():
        make_video(root / f"{name}.mp4", frames=18, size=size, fps=24)
    return write_jsonl(root / "clips.jsonl", [{"video_path": f"{name}.mp4", "caption": name} for name in sizes])


@pytest.fixture(scope="module")
def cached(dataset: Path, ti2v, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "c"
    return cache_tiny(dataset, folder, model=str(ti2v.path), size=(96, 96), buckets=True)


def test_the_latents_are_the_vaes_and_begin_with_those_of_the_first_frame(cached, dataset, ti2v) -> None:
    index = load_index(cached)
    assert (index.task, index.fps) == ("ti2v", 24.0)
    assert {item.caption: (item.width, item.height) for item in index.items} == {
        "wide": (128, 64), "tall": (64, 128), "even": (96, 96)}
    vae = load_vae(ti2v)
    for item in index.items:
        assert item.latents == f"{item.caption}_00000-009_{item.width:04d}x{item.height:04d}_wan.safetensors"
        shape = (48, 3, item.height // 16, item.width // 16)
        [(key, latents)] = load_file(cached / item.latents).items()  # no image condition
        assert key == f"latents_{'x'.join(map(str, shape[1:]))}_float32" and latents.shape == shape
        crop = centre_crop(item.width, item.height, (item.width, item.height))
        video = dataset.parent / f"{item.caption}.mp4"
        frames = read_frames(video, range(9), crop, 24, probe(video, 24))
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(latents, encode(vae, pixels)[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(latents[:, :1], encode(vae, pixels[:, :, :1])[0], rtol=0, atol=1e-5)


def test_it_serves_both_tasks_and_nothing_is_made_again(cached, dataset, ti2v, capsys, lapwan) -> None:
    for i2v in (True, False, None):
        cache_tiny(dataset, cached, model=str(ti2v.path), size=(96, 96), buckets=True, i2v=i2v)
    ran = lapwan("cache", "--verify", "--preview", "1", "-m", ti2v.path, "-o", cached)
    assert ran.code == 0 and (cached / "lapwan_preview.png").is_file()
    assert "latents:" not in capsys.readouterr().err


def test_a_size_of_16_is_refused(dataset, ti2v, tmp_path) -> None:
    with pytest.raises(UserError, match="multiples of 32; try 64x64"):
        cache_tiny(dataset, tmp_path / "c", model=str(ti2v.path), size=(48, 64))


def test_files_of_another_tool_are_read_by_their_shapes(cached, dataset, ti2v, tiny_t2v, tmp_path, capsys) -> None:
    """48 channels mean strides of 16; files of Wan2.1's VAE are not taken for this model's, nor the other one's."""
    import shutil

    folder = Path(shutil.copytree(cached, tmp_path / "foreign"))
    strip_recipes(folder)
    items = load_index(folder).items
    assert {(item.width, item.height) for item in items} == {(128, 64), (64, 128), (96, 96)}
    assert read_item(folder, items[0])["latents"].shape[0] == 48
    with pytest.raises(UserError, match="has 48 latent channels, but the model has 16"):
        check_cache(load_index(folder), tiny_t2v, items)
    capsys.readouterr()
    cache_tiny(dataset, folder, model=str(ti2v.path), size=(96, 96), buckets=True)
    assert "latents:" not in capsys.readouterr().err  # only the prompts were missing
    cache_tiny(dataset, folder, model="tiny-t2v", size=(96, 96), buckets=True)
    assert "another VAE (latents have 48 channels)" in capsys.readouterr().err


def test_a_cache_of_another_model_is_refused_by_name(t2v_cache, ti2v, tiny_t2v, tmp_path) -> None:
    index = load_index(t2v_cache)
    with pytest.raises(UserError, match=r"was cached for t2v, but the model is ti2v \(TI2V-5B\)"):
        check_cache(index, ti2v, index.items)
    other = load_index(write_random_cache(tmp_path / "c", ti2v))
    with pytest.raises(UserError, match=r"was cached for ti2v, but the model is t2v \(T2V-A14B\)"):
        check_cache(other, tiny_t2v, other.items)
