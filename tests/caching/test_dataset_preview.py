"""`lapwan cache --preview FILE`: the dataset on a sheet before anything is encoded."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from cache_clips import cache_tiny, make_video, write_jsonl
from PIL import Image

from lapwan.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A wide clip with a box, one with two windows, a short one, a missing and a damaged one."""
    folder = tmp_path_factory.mktemp("clips")
    make_video(folder / "wide.mp4", frames=12, size=(192, 64))
    make_video(folder / "long.mp4", frames=20)
    make_video(folder / "short.mp4", frames=4)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    return write_jsonl(folder / "clips.jsonl", [
        {"video_path": "wide.mp4", "caption": "a <script>alert(1)</script> & 剪刀", "instrument_name": "Scissors",
         "instrument_label": 0, "roi": [{"frame": i, "box": [0.4, 0.25, 0.6, 0.75]} for i in range(12)]},
        {"video_path": "long.mp4", "caption": "long", "instrument_name": "Hook", "instrument_label": 1},
        {"video_path": "short.mp4", "caption": "short"}, {"video_path": "gone.mp4", "caption": "gone"},
        {"video_path": "noise.mp4", "caption": "noise"},
    ])


def sheet(dataset: Path, path: Path, **settings: object) -> Path:
    cache_tiny(dataset, path.parent / "cache", preview=path, frame_extraction="chunk", **settings)
    return path


def pictures(page: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]


def test_the_page_says_what_becomes_of_each_clip(dataset, tmp_path):
    page = sheet(dataset, tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert not (tmp_path / "cache").exists(), "nothing is encoded or written"
    cards = page.split("<article")[1:]
    assert len(cards) == 5
    wide, long, short, noise, gone = cards
    assert "a &lt;script&gt;alert(1)&lt;/script&gt; &amp; 剪刀" in wide and "Scissors" in wide
    assert "the crop drops 50% of the picture" in wide and 'data-bucket="48x32"' in wide
    assert long.count("<i style=") == 2 and "left:45.00%;width:45.00%" in long and "2 items of 9 frames" in long
    assert "dropped: too short: 4 frames" in short and "data:image" in short
    assert "dropped: cannot be read as video" in noise and "no picture" in noise
    assert "dropped: no such file: gone.mp4" in gone
    assert "5: 2 used as 3 items, 3 dropped" in page


def test_the_page_needs_nothing_else(dataset, tmp_path):
    page = sheet(dataset, tmp_path / "sheet.html").read_text(encoding="utf-8")
    addresses = re.findall(r"(?:src|href)=\"([^\"]{0,20})", page) + re.findall(r"url\(([^)]*)", page)
    assert addresses and all(address.startswith("data:image/jpeg") for address in addresses)
    assert "http" not in page and "@import" not in page and "prefers-color-scheme: dark" in page


def test_crop_and_region_are_drawn_where_they_are(dataset, tmp_path):
    """192 x 64 to 48 x 32: the middle half of the width is kept; the box covers 0.4 to 0.6 of it."""
    picture = pictures(sheet(dataset, tmp_path / "sheet.html").read_text(encoding="utf-8"))[0].astype(int)
    height, width, _ = picture.shape
    assert (height, width) == (85, 256)
    bright = picture.sum(axis=-1)
    inside, outside = bright[10:15, 70:90], bright[10:15, 5:60]
    assert np.median(inside) > 2 * np.median(outside)
    # Yellow: red and green far above blue, which no other line or the grey picture has.
    yellow = (picture[..., 0] - picture[..., 2] > 90) & (picture[..., 1] - picture[..., 2] > 60)
    rows, columns = np.nonzero(yellow)
    assert abs(columns.min() - 0.4 * width) <= 3 and abs(columns.max() - 0.6 * width) <= 3
    assert abs(rows.min() - 0.25 * height) <= 3 and abs(rows.max() - 0.75 * height) <= 3


def test_worker_processes_draw_the_same_page(dataset, tmp_path, monkeypatch):
    from lapwan.caching import dataset_preview

    alone = sheet(dataset, tmp_path / "a.html").read_bytes()
    monkeypatch.setattr(dataset_preview, "_FEW", 0)
    assert sheet(dataset, tmp_path / "b.html").read_bytes() == alone


def test_a_cached_dataset_says_what_is_up_to_date(dataset, tmp_path):
    cache_tiny(dataset, tmp_path / "cache", skip_bad=True, frame_extraction="chunk")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    page = sheet(dataset, tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert page.count("cached</p>") == 2 and "not cached yet" not in page
    page = sheet(dataset, tmp_path / "other.html", size=(48, 48)).read_text(encoding="utf-8")
    assert page.count("not cached yet") == 2
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


def test_the_image_has_a_tile_for_each_clip(dataset, tmp_path):
    with Image.open(sheet(dataset, tmp_path / "sheet.png")) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (180 + 20 + 2 * 6, 5 * (240 + 6) + 6, 3)
    red = (pixels == (214, 69, 65)).all(axis=-1)
    framed = [bool(red[26, 6 + 246 * n : 240 + 246 * n].all()) for n in range(5)]
    assert framed == [False, False, True, True, True]


def test_what_is_refused(dataset, tmp_path):
    (tmp_path / "sheet.html").touch()
    with pytest.raises(UserError, match="output exists"):
        sheet(dataset, tmp_path / "sheet.html")
    for value in ("sheet.pdf", "-1", "many"):
        with pytest.raises(ValueError, match=r"a file ending in \.html or \.png, or a number"):
            cache_tiny(dataset, tmp_path / "cache", preview=value)
    with pytest.raises(ValueError, match="--dataset FILE is required"):
        cache_tiny(None, tmp_path / "cache", preview="sheet.html", model="tiny-t2v")
