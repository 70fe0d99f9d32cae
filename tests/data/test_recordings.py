"""Long recordings: scenes, windows, black and still material; parts are read frame by frame, wherever they begin."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from lapwan.commands.split import run
from lapwan.data.buckets import centre_crop
from lapwan.data.clips import read_source_clips
from lapwan.data.dropped_clips import BadClip
from lapwan.data.recordings import (
    SplitRule,
    abrupt_change,
    histogram_change,
    is_black,
    is_still,
    split_recording,
)
from lapwan.data.video import probe, read_frames
from lapwan.errors import UserError
from lapwan.settings.base import RunOptions
from lapwan.settings.split import SplitSettings

FPS, SCENE = 10, 8.0  # seconds of each scene below


def pattern(number: int, kind: str) -> np.ndarray:
    """uint8 [48, 64, 3]: a scene, and the frame's number as eight bars across the middle."""
    rng = np.random.default_rng(7 if kind == "still" else number)
    base = {"red": (180, 60, 60), "blue": (60, 60, 180), "still": (90, 140, 90), "black": (4, 4, 4)}[kind]
    pixels = np.full((48, 64, 3), base, np.uint8)
    if kind == "black":
        return pixels
    at = 0 if kind == "still" else 4 * number % 48
    pixels[4:12, at : at + 16] = rng.integers(100, 255, 3)
    if kind != "still":
        for bit in range(8):
            pixels[18:30, 8 * bit : 8 * bit + 8] = 230 if number >> (7 - bit) & 1 else 20
    return pixels


def number_of(frame: np.ndarray) -> int:
    return sum(int(frame[24, 8 * bit + 4].mean() > 125) << (7 - bit) for bit in range(8))


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Red, black, blue, still: 8 seconds each at 10 fps, a key frame every 2 s, which is not where scenes change."""
    path = tmp_path_factory.mktemp("recording") / "operation.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "8", "x264-params": "keyint=19:min-keyint=19:scenecut=0:bframes=2"}
        for number in range(int(4 * SCENE * FPS)):
            kind = ("red", "black", "blue", "still")[int(number / FPS / SCENE)]
            frame = av.VideoFrame.from_ndarray(pattern(number % 256, kind), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def split(path: Path, **rule) -> tuple[list[tuple[float, int]], object]:
    facts = probe(path, 16)
    result = split_recording(path, facts, SplitRule(**{"seconds": 2.0, "stride": 2.0} | rule), lambda _: None)
    return [(round(window.start, 3), window.scene) for window in result.windows], result


def test_scenes_are_cut_at_their_first_frame(recording):
    windows, result = split(recording, scenes=True)
    assert [round(end, 3) for _, end in result.scenes] == [8.0, 16.0, 24.0, 32.0]
    assert windows == [(0.0, 0), (2.0, 0), (4.0, 0), (6.0, 0), (16.0, 2), (18.0, 2), (20.0, 2), (22.0, 2)]
    assert (result.black, result.still) == (4, 4)


def test_without_scenes_windows_follow_the_clock(recording):
    assert [start for start, _ in split(recording, seconds=3.0, stride=3.0)[0]][:3] == [0, 3, 6]
    assert [start for start, _ in split(recording, stride=1.0, every=5.0)[0]] == [0, 5, 16, 21]
    kept, result = split(recording, keep_black=True, keep_still=True)
    assert len(kept) == 16 and (result.black, result.still) == (0, 0)


def test_a_recording_shorter_than_a_window_has_none(recording):
    assert split(recording, seconds=40.0, stride=40.0)[0] == []
    assert len(split(recording, seconds=32.0, stride=32.0, keep_black=True)[0]) == 1


def test_measures_of_change():
    grey = np.full((36, 64, 3), 100, np.uint8)
    moved, other = grey.copy(), grey.copy()
    moved[:, :8], other[:, 8:16] = 200, 200
    assert histogram_change(moved, other) == 0  # movement alone
    assert histogram_change(grey, np.full_like(grey, 200)) == 1
    cut = [(0.1 * i, np.full((36, 64, 3), 40 if i < 5 else 160, np.uint8)) for i in range(10)]
    assert abrupt_change(cut) == pytest.approx(0.5)
    fade = [(0.1 * i, np.full((36, 64, 3), 40 + 12 * i, np.uint8)) for i in range(10)]
    assert abrupt_change(fade) is None and abrupt_change(fade, certain=True) is not None
    assert is_black(np.stack([grey // 20, grey // 20, grey])) and not is_black(grey[None])
    small = grey.copy()
    small[10:12, 10:12] += 20
    assert is_still(np.stack([grey, grey + 2])) and not is_still(np.stack([grey, small])) and not is_still(grey[None])


@pytest.mark.parametrize("start", [0.0, 0.35, 1.9, 5.5, 17.0, 21.33])
def test_parts_are_read_from_their_first_frame(recording, start):
    """The frames are those on display, as if the whole recording were read."""
    part = probe(recording, 16).part(start, 2.0)
    assert part.count_at(16) == 32
    frames = read_frames(recording, range(32), centre_crop(64, 48, (64, 48)), 16, part)
    shown = [int((start + k / 16 + 0.001) * FPS) for k in range(32)]
    scenes = [k for k, number in enumerate(shown) if int(number / FPS / SCENE) in (0, 2)]
    assert [number_of(frames[k]) for k in scenes] == [shown[k] for k in scenes]


def test_a_part_beyond_the_end(recording):
    facts = probe(recording, 16)
    assert facts.part(31, 2).seconds == pytest.approx(1.0)
    assert facts.part(30, None).seconds == pytest.approx(2.0)
    with pytest.raises(BadClip, match="start = 32 s is not before its end"):
        facts.part(32, 2)


def settings(recording: Path, output: Path, **given) -> SplitSettings:
    return SplitSettings(recordings=(recording,), output=output, **{"seconds": 2.0} | given)


def test_the_command_writes_lines_that_cache_reads(recording, tmp_path):
    output = tmp_path / "clips.jsonl"
    run(settings(recording, output, caption="抓钳抓取标本袋", scenes=True), RunOptions())
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["start"] for row in rows] == [0, 2, 4, 6, 16, 18, 20, 22]
    assert rows[4] | {"video_path": ""} == {"video_path": "", "start": 16.0, "duration": 2.0,
                                            "caption": "抓钳抓取标本袋", "scene": 2}
    source = read_source_clips(output)
    clips = source.clips
    assert not source.drops and [clip.start for clip in clips] == [row["start"] for row in rows]
    assert all(clip.path.samefile(recording) for clip in clips)
    assert len({clip.stem for clip in clips}) == len({clip.key for clip in clips}) == 8
    with pytest.raises(UserError, match="exists"):
        run(settings(recording, output), RunOptions())


def test_a_recording_that_cannot_be_read_is_named_and_the_others_are_split(recording, tmp_path):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"no video")
    both = {"recordings": (recording, damaged), "seconds": 2.0, "caption": "x"}
    with pytest.raises(UserError, match=r"1 of the recordings could not be read: .*damaged\.mp4.*pass --skip-bad"):
        run(SplitSettings(output=tmp_path / "a.jsonl", **both), RunOptions())
    run(SplitSettings(output=tmp_path / "b.jsonl", skip_bad=True, **both), RunOptions())
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() != b""


def test_the_caption_is_the_text_beside_the_recording(recording, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(recording.read_bytes())
    (folder / "a.txt").write_text("dissection\n")
    (folder / "notes.md").write_text("x")
    run(settings(folder, tmp_path / "c.jsonl", every=10.0), RunOptions())
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {row["caption"] for row in rows} == {"dissection"}
    assert {row["video_path"] for row in rows} == {"recordings/a.mp4"}


def test_captions_beside_recordings_of_another_encoding(recording, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    (folder / "op.mp4").write_bytes(recording.read_bytes())
    (folder / "op.txt").write_bytes("电凝钩分离".encode("gb18030"))
    run(settings(folder, tmp_path / "c.jsonl", every=10.0), RunOptions())
    assert {json.loads(line)["caption"] for line in (tmp_path / "c.jsonl").read_text("utf-8").splitlines()} == {
        "电凝钩分离"}
    (folder / "op.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match=r"op\.txt is no text in UTF-8"):
        run(settings(folder, tmp_path / "d.jsonl"), RunOptions())


def test_what_cannot_be_read_is_named(recording, tmp_path):
    (tmp_path / "bad.mp4").write_text("x")
    with pytest.raises(UserError, match=r"no recording can be read: .*bad\.mp4"):
        run(settings(tmp_path / "bad.mp4", tmp_path / "c.jsonl"), RunOptions())
    with pytest.raises(UserError, match="no such file"):
        run(settings(tmp_path / "none.mp4", tmp_path / "c.jsonl"), RunOptions())
    with pytest.raises(UserError, match="no window was kept"):
        run(settings(recording, tmp_path / "c.jsonl", seconds=60.0), RunOptions())


def test_duration_without_start_is_a_remark(tmp_path, recording):
    (tmp_path / "c.jsonl").write_text(json.dumps({"video_path": str(recording), "caption": "x", "duration": 3}) + "\n")
    clip = read_source_clips(tmp_path / "c.jsonl").clips[0]
    assert clip.start is None and clip.duration is None and clip.key == str(recording)
    for wrong in ({"start": -1}, {"start": "soon"}, {"start": 1, "duration": 0}):
        row = {"video_path": str(recording), "caption": "x"} | wrong
        (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match="must be seconds"):
            read_source_clips(tmp_path / "c.jsonl")
