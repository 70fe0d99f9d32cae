"""musubi-tuner's dataset file: every key, with its fallback, or a refusal by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cache_clips import cache_tiny, make_video, write_jsonl
from PIL import Image

from lapwan.caching.read import load_index, read_item
from lapwan.data.musubi_dataset import UNSUPPORTED, read_entries, read_musubi_dataset
from lapwan.errors import UserError


@pytest.fixture
def media(tmp_path):
    """videos/ with captions, images/ with captions, and a JSONL of each."""
    for index in range(2):
        make_video(tmp_path / "videos" / f"v{index}.mp4", frames=20, seed=index)
        (tmp_path / "videos" / f"v{index}.txt").write_text(f"视频 {index}\n", encoding="utf-8")
    (tmp_path / "images").mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"p{index}.png")
        (tmp_path / "images" / f"p{index}.txt").write_text(f"图 {index}", encoding="utf-8")
    write_jsonl(tmp_path / "videos.jsonl", [{"video_path": "videos/v0.mp4", "caption": "a"}])
    write_jsonl(tmp_path / "images.jsonl", [{"image_path": "images/p0.png", "caption": "b"}])
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    return path


FULL = """
[general]
resolution = [48, 32]
caption_extension = ".txt"
batch_size = 2
num_repeats = 3
enable_bucket = true
bucket_no_upscale = true

[[datasets]]
video_directory = "videos"
cache_directory = "cache_v"
target_frames = [1, 6, 9]
frame_extraction = "uniform"
frame_stride = 2
frame_sample = 2
max_frames = 33
source_fps = 32

[[datasets]]
image_directory = "images"
cache_directory = "cache_i"
resolution = 32
num_repeats = 1
enable_bucket = false

[[datasets]]
video_jsonl_file = "videos.jsonl"
cache_directory = "cache_vj"
target_frames = [9]

[[datasets]]
image_jsonl_file = "images.jsonl"
cache_directory = "cache_ij"
"""


def test_every_key_is_read(media):
    entries = read_entries(write(media, FULL))
    video, image, _, _ = entries
    assert video.resolution == (48, 32) and image.resolution == (32, 32)
    assert (video.num_repeats, image.num_repeats) == (3, 1)
    assert (video.enable_bucket, image.enable_bucket, video.bucket_no_upscale) == (True, False, True)
    sets = read_musubi_dataset(media / "dataset.toml", None, 16, 4)
    assert [s.folder.name for s in sets] == ["cache_v", "cache_i", "cache_vj", "cache_ij"]
    extraction = sets[0].extraction
    assert extraction.target_frames == (1, 5, 9)  # 6 rounds down
    assert (extraction.frame_extraction, extraction.frame_stride, extraction.frame_sample, extraction.max_frames,
            extraction.source_fps) == ("uniform", 2, 2, 33, 32.0)
    assert [c.caption for c in sets[0].clips] == ["视频 0", "视频 1"]


def test_json_says_the_same(media):
    import tomllib

    toml = read_entries(write(media, FULL))
    (media / "dataset.json").write_text(json.dumps(tomllib.loads(FULL)), encoding="utf-8")
    assert read_entries(media / "dataset.json") == toml


def test_a_whole_run(media, monkeypatch):
    monkeypatch.chdir(media)
    cache_tiny(write(media, FULL), None)
    videos = load_index(media / "cache_v")
    # 20 frames said to be 32 fps are 10 at 16: two starts of 1 (0, 9), of 5 (0, 5) and of 9 (0, 1), for each video.
    assert [(i.start, i.frames) for i in videos.items[:6]] == [(0, 1), (9, 1), (0, 5), (5, 5), (0, 9), (1, 9)]
    assert {i.repeats for i in videos.items} == {3}
    assert videos.items[4].id == "v0_00000-009_0096x0064"
    images = load_index(media / "cache_i")
    assert [i.id for i in images.items] == ["p0_0096x0064", "p1_0096x0064"]
    assert images.items[0].bucket == (1, 32, 32)
    assert read_item(media / "cache_i", images.items[0])["latents"].shape == (16, 1, 4, 4)
    from safetensors import safe_open

    with safe_open(media / "cache_i" / "p0_0096x0064_wan.safetensors", "pt") as file:
        assert "frame_count" not in file.metadata()
    assert len(load_index(media / "cache_vj").items) == len(load_index(media / "cache_ij").items) == 1


VIDEO = '[[datasets]]\nvideo_directory = "videos"\ncaption_extension = ".txt"\ncache_directory = "c"\n'


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
def test_keys_of_other_architectures_are_refused_by_name(media, key):
    with pytest.raises(UserError, match=rf"datasets\[0\]\.{key}: .*not supported"):
        read_entries(write(media, VIDEO + f"{key} = 1\n"))


@pytest.mark.parametrize(("text", "message"), [
    (VIDEO + "frame_extracton = 'head'\n", r"unknown key 'frame_extracton' \(did you mean 'frame_extraction'"),
    (VIDEO + "frame_extraction = 'tail'\n", r"frame_extraction = 'tail'.*'head'"),
    (VIDEO + "target_frames = []\n", "target_frames"),
    (VIDEO + "target_frames = [0]\n", "target_frames"),
    (VIDEO + "source_fps = -1\n", "source_fps = -1"),
    (VIDEO + "image_directory = 'images'\n", "exactly one of"),
    ("[[datasets]]\ncache_directory = 'c'\n", "exactly one of"),
    ("[general]\ntarget_frames = [9]\n" + VIDEO, r"belongs in \[\[datasets\]\]"),
    ("[general]\nresolution = 64\n", r"no \[\[datasets\]\]"),
    ("[generall]\n" + VIDEO, "unknown key 'generall' .did you mean 'general'"),
    ('[[datasets]]\nvideo_directory = "videos"\n', "needs caption_extension"),
    ('[[datasets]]\nimage_directory = "images"\ncaption_extension = ".txt"\ntarget_frames = [9]\n', "only for videos"),
    ("= broken", "not valid TOML"),
])
def test_wrong_files_are_refused(media, text, message):
    with pytest.raises(UserError, match=message):
        read_entries(write(media, text))


def test_several_problems_come_at_once(media):
    with pytest.raises(UserError, match="3 problems") as error:
        read_entries(write(media, VIDEO + "num_repeats = 0\nframe_stride = 'x'\nfoo = 1\n"))
    assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize(("text", "message"), [
    (VIDEO + VIDEO, "that of datasets.0. too"),
    (VIDEO + "resolution = [50, 32]\n", "multiples of 16"),
    (VIDEO.replace("videos", "nowhere"), "no such path: nowhere"),
])
def test_wrong_sets_are_refused(media, text, message):
    with pytest.raises(UserError, match=message):
        read_musubi_dataset(write(media, text), None, 16, 4)


def test_captions_that_are_missing_or_empty_are_drops(media, monkeypatch):
    monkeypatch.chdir(media)
    (media / "videos" / "v0.txt").unlink()
    (media / "videos" / "v1.txt").write_text("  \n")
    make_video(media / "videos" / "v2.mp4", frames=20)
    (media / "videos" / "v2.txt").write_text("x")
    path = write(media, VIDEO + "resolution = [48, 32]\ntarget_frames = [9]\n")
    (one,) = read_musubi_dataset(path, None, 16, 4)
    assert [drop.reason for drop in one.drops] == ["no caption file v0.txt", "empty caption v1.txt"]
    with pytest.raises(UserError, match="2 of the clips"):
        cache_tiny(path, None)
    assert len(load_index(media / "c").items) == 1


def test_control_in_a_jsonl_is_refused(media):
    write_jsonl(media / "videos.jsonl", [{"video_path": "videos/v0.mp4", "caption": "a", "control_path": "c.mp4"}])
    entry = '[[datasets]]\nvideo_jsonl_file = "videos.jsonl"\ncache_directory = "c"\nresolution = [48, 32]\n'
    path = write(media, entry)
    with pytest.raises(UserError, match="control_path"):
        read_musubi_dataset(path, None, 16, 4)


def test_options_that_the_file_says_itself_are_refused(media):
    path = write(media, VIDEO + "resolution = [48, 32]\n")
    with pytest.raises(UserError, match="size, num_frames: not allowed with a dataset file"):
        cache_tiny(path, None, size=(32, 48), num_frames=(9,))


def test_caches_default_to_the_directory_or_the_output(media):
    entry = '[[datasets]]\nvideo_directory = "videos"\ncaption_extension = ".txt"\nresolution = [48, 32]\n'
    (own,) = read_musubi_dataset(write(media, entry), None, 16, 4)
    assert own.folder == media / "videos"
    (given,) = read_musubi_dataset(media / "dataset.toml", media / "out", 16, 4)
    assert given.folder == media / "out"
    two = read_musubi_dataset(write(media, entry + entry), media / "out", 16, 4)
    assert [one.folder for one in two] == [media / "out" / "0", media / "out" / "1"]
