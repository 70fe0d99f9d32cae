"""`lapwan cache` from a JSONL to files, index and batches, on the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from cache_clips import cache_tiny, make_video, write_jsonl
from safetensors import safe_open

from lapwan.caching.collate import collate
from lapwan.caching.read import load_index, read_empty_text, read_item, read_prompt
from lapwan.commands.cache import run
from lapwan.errors import UserError
from lapwan.settings.base import RunOptions
from lapwan.settings.cache import CacheSettings


def cache(dataset, output, model="tiny-t2v", **more):
    return cache_tiny(dataset, output, model=model, **more)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Three clips with labels, one with a region."""
    folder = tmp_path_factory.mktemp("clips")
    captions = ["抓钳抓取标本袋", "电凝钩切割血管", "the suction clears the field"]
    rows = []
    for index, caption in enumerate(captions):
        make_video(folder / "clips" / f"clip_{index}.mp4", frames=12, seed=5 * index)
        rows.append({"video_path": f"clips/clip_{index}.mp4", "caption": caption, "source": "test",
                     "instrument_label": index, "instrument_name": ["a", "b", "c"][index],
                     "instrument_logits": [float(i == index) for i in range(4)]})
    rows[0]["roi"] = [{"frame": i, "box": [0.25, 0.25, 0.5, 0.75]} for i in range(12)]
    rows[2] |= {"split": "val", "label_fallback": True}
    return write_jsonl(folder / "labels.jsonl", rows)


@pytest.fixture(scope="module")
def i2v_cache(labelled, tmp_path_factory):
    return cache(labelled, tmp_path_factory.mktemp("i2v") / "cache", "tiny-i2v", workers=None)


def test_index_carries_what_training_needs(i2v_cache):
    index = load_index(i2v_cache)
    assert (index.task, index.fps, index.text_dim, index.verified) == ("i2v", 16.0, 96, True)
    first, _, last = index.items
    assert first.id == "clip_0_00000-009_0096x0064"
    assert (first.label, first.label_name, first.label_weights) == (0, "a", (1.0, 0.0, 0.0, 0.0))
    assert first.bucket == (9, 32, 48)
    assert first.roi is not None and last.roi is None
    assert (last.split, last.fallback, last.source) == ("val", True, "test")


def test_files_follow_the_contract(i2v_cache):
    with safe_open(i2v_cache / "clip_1_00000-009_0048x0032_wan.safetensors", "pt") as file:
        assert set(file.keys()) == {"latents_3x4x6_float32", "latents_image_3x4x6_float32"}
        assert file.get_tensor("latents_3x4x6_float32").shape == (16, 3, 4, 6)
        image = file.get_tensor("latents_image_3x4x6_float32")
        assert image.shape == (20, 3, 4, 6)
        assert image[:4, 0].eq(1).all() and image[:4, 1:].eq(0).all()
        metadata = file.metadata()
    recipe, checksum = json.loads(metadata.pop("lapwan.recipe")), metadata.pop("lapwan.sha256")
    assert metadata == {"architecture": "wan", "width": "48", "height": "32", "format_version": "1.0.1",
                        "frame_count": "9"}
    assert len(checksum) == 64
    assert recipe["size"] == [48, 32] and recipe["window"] == [0, 9]
    with safe_open(i2v_cache / "clip_1_wan_te.safetensors", "pt") as file:
        assert list(file.keys()) == ["varlen_t5_float32"]
        assert file.get_tensor("varlen_t5_float32").shape[1] == 96
        assert file.metadata()["caption1"] == "电凝钩切割血管"
        assert file.metadata()["architecture"] == "wan"
    musubi_sees = sorted(p.name for p in i2v_cache.glob("*_wan*.safetensors"))
    assert musubi_sees == sorted(f"clip_{i}_{e}.safetensors" for i in range(3)
                                 for e in ("wan_te", "00000-009_0048x0032_wan"))


def test_latents_and_text_equal_diffusers_on_the_same_frames(i2v_cache, labelled):
    from diffusers import WanImageToVideoPipeline

    from lapwan.data.buckets import centre_crop
    from lapwan.data.video import probe, read_frames
    from lapwan.tiny.model import tiny_folder

    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_folder("i2v"), dtype=torch.float32, local_files_only=True)
    video = labelled.parent / "clips" / "clip_1.mp4"
    frames = read_frames(video, range(9), centre_crop(96, 64, (48, 32)), 16, probe(video, 16))
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    index = load_index(i2v_cache)
    tensors = read_item(i2v_cache, index.items[1], index.text_dim)
    with pytest.raises(UserError, match="but the cache's are"):
        read_item(i2v_cache, index.items[1], 7)
    with torch.no_grad():
        raw = pipeline.vae.encode(pixels).latent_dist.mode()
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in
                     (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std))
        torch.testing.assert_close(tensors["latents"][None], (raw - mean) / std, atol=1e-5, rtol=0)
        _, condition = pipeline.prepare_latents(pixels[:, :, 0], 1, 16, 32, 48, 9, torch.float32, torch.device("cpu"))
        torch.testing.assert_close(tensors["condition"][None], condition, atol=1e-5, rtol=0)
        for kind, prompt in (("caption", index.items[1].caption), ("empty", ""), ("negative", CacheSettings(
                dataset="x", model="x").negative_prompt)):
            ours = tensors["text"] if kind == "caption" else read_prompt(index, kind)
            theirs, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
            torch.testing.assert_close(ours, theirs[0, : len(ours)], atol=1e-5, rtol=0)
            assert theirs[0, len(ours):].abs().max() == 0


def test_region_is_the_covered_area_of_each_cell(i2v_cache):
    index = load_index(i2v_cache)
    roi = read_item(i2v_cache, index.items[0])["roi"]
    # Box x 0.25..0.5 of 48 px = 12..24 px = cells 1.5..3; y 0.25..0.75 of 32 px = cells 1..3; every frame.
    expected = torch.zeros(3, 4, 6)
    expected[:, 1:3, 1], expected[:, 1:3, 2] = 0.5, 1.0
    torch.testing.assert_close(roi, expected)


def test_batch_of_items(i2v_cache):
    index = load_index(i2v_cache)
    batch = collate([(item, read_item(i2v_cache, item)) for item in index.items])
    assert batch.latents_BCTHW.shape == (3, 16, 3, 4, 6)
    assert batch.condition_BCTHW.shape == (3, 20, 3, 4, 6)
    assert batch.label_weights_BE.argmax(1).tolist() == [0, 1, 2]
    assert batch.fallback_B.tolist() == [False, False, True]
    assert batch.roi_BTHW.flatten(1).any(dim=1).tolist() == [True, False, False]
    assert read_empty_text(index).shape == (1, 96)


def test_clips_kept_on_another_device_are_a_batch_there(i2v_cache):
    """Some with a region, some without: what stands for the missing one is on the same device."""
    index = load_index(i2v_cache)
    kept = [(item, {name: None if tensor is None else tensor.to("meta") for name, tensor in
                    read_item(i2v_cache, item).items()}) for item in index.items]
    assert collate(kept).roi_BTHW.device.type == "meta"


def test_a_second_run_does_nothing_and_says_so(i2v_cache, labelled, capsys):
    before = {p.name: p.stat().st_mtime_ns for p in i2v_cache.glob("*.safetensors")}
    cache(labelled, i2v_cache, "tiny-i2v")
    assert "nothing to do" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in i2v_cache.glob("*.safetensors")} == before


def test_a_second_run_and_reading_the_index_import_no_torch(i2v_cache, labelled):
    code = (
        "import sys; from pathlib import Path\n"
        "from lapwan.commands.cache import run; from lapwan.settings.cache import CacheSettings\n"
        "from lapwan.settings.base import RunOptions; from lapwan.caching.read import load_index\n"
        f"run(CacheSettings(dataset={str(labelled)!r}, model='tiny-i2v', output={str(i2v_cache)!r}, size=(32, 48),"
        " num_frames=(9,)), RunOptions())\n"
        f"assert len(load_index(Path({str(i2v_cache)!r})).items) == 3\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_bad_clips_are_listed_and_the_others_done(labelled, tmp_path):
    rows = [json.loads(line) for line in labelled.read_text(encoding="utf-8").splitlines()][:1]
    rows[0]["video_path"] = str(labelled.parent / rows[0]["video_path"])
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    make_video(tmp_path / "short.mp4", frames=4)
    rows += [{"video_path": name, "caption": "剪刀"} for name in ("gone.mp4", "zero.mp4", "noise.mp4", "short.mp4")]
    dataset = write_jsonl(tmp_path / "clips.jsonl", rows)
    with pytest.raises(UserError, match="4 of the clips could not be cached"):
        cache(dataset, tmp_path / "cache")
    assert [item.id for item in load_index(tmp_path / "cache").items] == ["clip_0_00000-009_0096x0064"]
    cache(dataset, tmp_path / "cache", skip_bad=True)


@pytest.mark.parametrize(("line", "message"), [
    ('{"video_path": "a.mp4", "caption": ', "line 2: broken JSON"),
    ('{"video_path": "a.mp4", "caption": "  "}', "line 2: empty caption"),
    ('{"caption": "x"}', "line 2: no 'video_path'"),
    ('{"video_path": "a.mp4", "caption": "x", "roi": [{"frame": 0, "box": [1, 0, 0, 1]}]}', "line 2: roi entry"),
    ('{"video_path": "a.mp4", "caption": "x", "instrument_logits": [0.5, 0.9]}', "sum to 1"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    make_video(tmp_path / "a.mp4", frames=12)
    dataset = tmp_path / "clips.jsonl"
    dataset.write_text('{"video_path": "a.mp4", "caption": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        cache(dataset, tmp_path / "cache")


@pytest.mark.parametrize(("change", "message"), [
    ({"num_frames": (16,)}, "4N\\+1"), ({"size": (30, 48)}, "multiples of 16"), ({"device": "tpu9"}, "device"),
])
def test_wrong_sizes_are_refused(labelled, tmp_path, change, message):
    settings = {"dataset": labelled, "model": "tiny", "output": tmp_path / "c", "size": (32, 48), "num_frames": (9,)}
    with pytest.raises(UserError, match=message):
        run(CacheSettings(**settings | change), RunOptions())


def test_dry_run_plans_and_writes_nothing(labelled, tmp_path, capsys):
    settings = CacheSettings(dataset=labelled, model="tiny", output=tmp_path / "c", size=(32, 48), num_frames=(9,))
    run(settings, RunOptions(dry_run=True))
    out, err = capsys.readouterr()
    assert "to encode   3 latents, 3 captions" in err and "(missing)" in err
    assert tomllib.loads(out)["num_frames"] == [9]
    assert not (tmp_path / "c").exists()


def test_a_clip_damaged_in_the_middle_fails_alone(tmp_path):
    """Its header is whole, so the plan takes it; the decoder finds out."""
    for name in ("good", "bad"):
        make_video(tmp_path / f"{name}.mp4", frames=28, size=(192, 128))
    data = bytearray((tmp_path / "bad.mp4").read_bytes())
    at = data.index(b"mdat") + int.from_bytes(data[data.index(b"mdat") - 4 : data.index(b"mdat")], "big") // 2
    data[at : at + 200] = np.random.default_rng(0).bytes(200)
    (tmp_path / "bad.mp4").write_bytes(bytes(data))
    dataset = write_jsonl(tmp_path / "clips.jsonl", [
        {"video_path": f"{name}.mp4", "caption": "x"} for name in ("bad", "good")])
    with pytest.raises(UserError, match=r"1 of the clips.*bad\.mp4.*decoding fails"):
        cache(dataset, tmp_path / "cache", num_frames=(25,))
    assert [item.id for item in load_index(tmp_path / "cache").items] == ["good_00000-025_0192x0128"]


def test_equal_captions_are_encoded_once(labelled, tmp_path, capsys):
    rows = [json.loads(line) | {"caption": "同"} for line in labelled.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["video_path"] = str(labelled.parent / row["video_path"])
    cache(write_jsonl(tmp_path / "clips.jsonl", rows), tmp_path / "cache")
    assert "captions: 1/1 caption" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").glob("*_wan_te.safetensors"))) == 3


def test_bfloat16_files(labelled, i2v_cache, tmp_path):
    folder = cache(labelled, tmp_path / "cache", dtype="bfloat16")
    with safe_open(folder / "clip_0_00000-009_0048x0032_wan.safetensors", "pt") as file:
        assert list(file.keys()) == ["latents_3x4x6_bfloat16"]
    with safe_open(folder / "clip_0_wan_te.safetensors", "pt") as file:
        assert list(file.keys()) == ["varlen_t5_bfloat16"]
    ours = read_item(folder, load_index(folder).items[0])["latents"]
    full = read_item(i2v_cache, load_index(i2v_cache).items[0])["latents"]
    torch.testing.assert_close(ours, full, atol=0.05, rtol=0.01)


def test_batches_of_clips_equal_single_ones(labelled, i2v_cache, tmp_path):
    folder = cache(labelled, tmp_path / "cache", "tiny-i2v", batch_size=1, workers=1)
    for one, many in zip(load_index(folder).items, load_index(i2v_cache).items, strict=True):
        single, together = read_item(folder, one), read_item(i2v_cache, many)
        torch.testing.assert_close(single["latents"], together["latents"], atol=1e-5, rtol=0)
        torch.testing.assert_close(single["condition"], together["condition"], atol=1e-5, rtol=0)


def test_windows_of_a_clip_equal_its_own_frames(labelled, tmp_path):
    """Sliding windows share one decode; each must hold its own frames."""
    folder = cache(labelled, tmp_path / "cache", frame_extraction="slide", frame_stride=3, num_frames=(5, 9))
    items = [item for item in load_index(folder).items if item.clip.endswith("clip_1.mp4")]
    assert [(i.start, i.frames) for i in items] == [(0, 5), (3, 5), (6, 5), (0, 9), (3, 9)]
    starts = [read_item(folder, i)["latents"][:, 0] for i in items]
    torch.testing.assert_close(starts[0], starts[3], atol=1e-5, rtol=0)  # both start at frame 0
    torch.testing.assert_close(starts[1], starts[4], atol=1e-5, rtol=0)  # both at frame 3
    assert (starts[0] - starts[1]).abs().max() > 1e-3


def test_exit_codes_of_the_command(lapwan, labelled, tmp_path):
    run_it = ["cache", "--model", "tiny", "--size", "32x48", "--num-frames", "9"]
    config = tmp_path / "cache.toml"
    config.write_text(f'dataset = "{labelled}"\nmodel = "tiny"\noutput = "{tmp_path / "cache"}"\nsize = [32, 48]\n'
                      "num_frames = 9\n")
    done = lapwan("cache", "--config", config)
    assert done.code == 0 and "3 items" in done.out
    rows = [{"video_path": str(labelled.parent / "clips" / "clip_0.mp4"), "caption": "x"},
            {"video_path": "gone.mp4", "caption": "x"}]
    dataset = write_jsonl(tmp_path / "clips.jsonl", rows)
    run_it += ["--dataset", dataset, "-o", tmp_path / "c"]
    bad = lapwan(*run_it)
    assert bad.code == 2
    last = bad.err.strip().splitlines()[-1]
    assert last.startswith("error: 1 of the clips could not be cached: clips.jsonl, line 2")
    report = json.loads((tmp_path / "c" / "lapwan_report.json").read_text(encoding="utf-8"))
    assert report["items"] == 1 and report["dropped"][0]["clip"] == "clips.jsonl, line 2"
    odd = lapwan(*run_it, "--size", "48")
    assert odd.code == 2 and "HEIGHTxWIDTH" in odd.err and "Traceback" not in odd.err
