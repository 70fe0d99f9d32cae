"""What is done to pixels is in the plan and in the recipe of the clips it concerns, and of no other."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from cache_clips import cache_tiny, make_video, write_jsonl

from lapwan.caching.layout import read_recipe
from lapwan.caching.read import load_index
from lapwan.checkpoints.container import read_header


def anamorphic(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        stream.options = {"flags": "+ildct+ilme"}
        for level in range(9):
            pixels = np.full((64, 64, 3), 20 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def rows(folder: Path, *names: str) -> Path:
    return write_jsonl(folder / "clips.jsonl", [{"video_path": name, "caption": name} for name in names])



def test_only_clips_that_are_treated_depend_on_it(tmp_path, capsys):
    make_video(tmp_path / "plain.mp4", frames=10)
    anamorphic(tmp_path / "dvd.mp4")
    dataset, cache = rows(tmp_path, "plain.mp4", "dvd.mp4"), tmp_path / "cache"
    cache_tiny(dataset, cache, text=False)
    assert "1 clip interlaced: fields to whole frames (yadif)" in (shown := capsys.readouterr().err)
    assert "1 clip anamorphic: to square pixels" in shown
    made = recipes_of_latents(cache)
    assert set(made["plain"]) == {"source", "fps", "window", "size", "crop", "vae", "computed", "dtype", "i2v"}
    assert made["dvd"]["pixels"] == "yadif,square pixels" and made["dvd"]["crop"][:2] == [48, 32]
    cache_tiny(dataset, cache, text=False, deinterlace="never")
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 latent (pixels yadif,square pixels -> square pixels)" in shown
    cache_tiny(dataset, cache, text=False, deinterlace="always")
    assert "(pixels as they are -> yadif)" in " ".join(capsys.readouterr().err.split())
    cache_tiny(dataset, cache, text=False)
    assert "(pixels yadif -> as they are)" in " ".join(capsys.readouterr().err.split())


def recipes_of_latents(cache: Path) -> dict[str, dict]:
    return {path.name.split("_")[0]: read_recipe(read_header(path)) for path in cache.glob("*_wan.safetensors")}


def test_facts_of_older_versions_are_read_again(tmp_path):
    """Their index does not say whether a clip is interlaced."""
    anamorphic(tmp_path / "dvd.mp4")
    dataset, cache = rows(tmp_path, "dvd.mp4"), tmp_path / "cache"
    cache_tiny(dataset, cache)
    index = cache / "lapwan_index.jsonl"
    head, line = index.read_text().splitlines()
    item = json.loads(line)
    item["facts"] = {"width": 64, "height": 64, "fps": 16.0, "frames": 9, "seconds": 0.5625, "origin": 0.0}
    index.write_text(head + "\n" + json.dumps(item) + "\n")
    cache_tiny(dataset, cache)
    facts = load_index(cache).items[0].facts
    assert facts["width"] == 96 and facts["traits"] == "interlaced"


def test_parts_of_a_recording_are_items_of_their_own(tmp_path, capsys):
    make_video(tmp_path / "operation.mp4", frames=40)
    lines = [{"video_path": "operation.mp4", "start": start, "duration": 0.6, "caption": "x"} for start in (0, 1, 1.5)]
    dataset, cache = write_jsonl(tmp_path / "clips.jsonl", lines), tmp_path / "cache"
    cache_tiny(dataset, cache)
    items = load_index(cache).items
    assert [item.id.split("_0")[0] for item in items] == ["operation"] * 3
    assert len({item.latents for item in items}) == len({item.clip for item in items}) == 3
    assert items[1].clip.endswith("operation.mp4#t=1,1.6") and items[1].facts["begin"] == 1
    assert read_recipe(read_header(cache / items[1].latents))["begin"] == 1
    capsys.readouterr()
    dataset = write_jsonl(tmp_path / "clips.jsonl", lines[::-1])  # lines that move keep their files
    cache_tiny(dataset, cache)
    assert "nothing to do" in capsys.readouterr().out
    assert [item.latents for item in load_index(cache).items] == [item.latents for item in items][::-1]


def test_an_empty_region_is_warned_of(tmp_path, capsys):
    make_video(tmp_path / "a.mp4", frames=20)
    roi = [{"frame": frame, "box": [0.1, 0.1, 0.5, 0.5]} for frame in (16, 17, 18)]
    dataset = write_jsonl(tmp_path / "clips.jsonl", [{"video_path": "a.mp4", "caption": "x", "roi": roi}])
    cache_tiny(dataset, tmp_path / "cache")
    assert "region of 1 item is empty" in capsys.readouterr().err.replace("\n", " ")


def test_hdr_is_named_in_the_plan(tmp_path, capsys):
    with av.open(str(tmp_path / "hdr.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p10le"
        stream.codec_context.color_trc = 16
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 120, np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv444p10le")
            frame.color_trc = 16
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    make_video(tmp_path / "a.mp4", frames=10)
    dataset, cache = rows(tmp_path, "a.mp4", "hdr.mkv"), tmp_path / "cache"
    with_drop = {"skip_bad": True}
    cache_tiny(dataset, cache, **with_drop)
    assert '1 clip HDR: refused (hdr = "tonemap" reads them)' in capsys.readouterr().err
    cache_tiny(dataset, cache, hdr="tonemap")
    assert "1 clip HDR (PQ): tone-mapped to BT.709" in capsys.readouterr().err
    assert len(load_index(cache).items) == 2


@pytest.mark.parametrize("units", ["pixels", "coco"])
def test_units_of_boxes_are_a_setting(tmp_path, units):
    make_video(tmp_path / "a.mp4", frames=10)
    roi = [{"frame": 0, "box": [0, 0, 48, 64]}]
    dataset = write_jsonl(tmp_path / "clips.jsonl", [{"video_path": "a.mp4", "caption": "x", "roi": roi}])
    cache_tiny(dataset, tmp_path / "cache", roi_units=units)
    assert load_index(tmp_path / "cache").items[0].roi is not None
