"""Decoding real files: frame rates, rotation, pixel formats, odd sizes, damage."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from cache_clips import level, make_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lapwan.data.buckets import centre_crop
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import probe, read_frames


def shown(path: Path, indices, fps=16.0, source_fps=None) -> list[int]:
    """Which frames of `make_video` came out, by their grey."""
    facts = probe(path, fps, source_fps)
    size = (facts.width, facts.height)
    frames = read_frames(path, list(indices), centre_crop(*size, size), fps, facts, source_fps)
    grey = np.median(frames.reshape(len(frames), -1), axis=1)
    levels = np.array([level(i) for i in range(30)])
    assert np.abs(levels[None] - grey[:, None]).min(axis=1).max() <= 2  # each is one of the frames, not a blend
    return [int(np.abs(levels - value).argmin()) for value in grey]


def test_equal_rates_give_every_frame_once(tmp_path):
    video = make_video(tmp_path / "a.mp4", frames=20, fps=16)
    facts = probe(video, 16)
    assert (facts.width, facts.height, facts.frames, facts.count_at(16)) == (96, 64, 20, 20)
    assert facts.fps == pytest.approx(16)
    assert shown(video, range(20)) == list(range(20))
    assert shown(video, [3, 7, 19]) == [3, 7, 19]


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi", ".mov"])
def test_containers(tmp_path, suffix):
    """mkv and webm round times to milliseconds; the frames must still come one to one."""
    codec = {"codec": "libvpx-vp9"} if suffix == ".webm" else {"codec": "ffv1"} if suffix == ".avi" else {}
    video = make_video(tmp_path / f"a{suffix}", frames=20, fps=16, **codec)
    assert probe(video, 16).count_at(16) == 20
    if suffix != ".webm":
        assert shown(video, range(20)) == list(range(20))


@pytest.mark.parametrize(("source", "expected"), [
    (32, [0, 2, 4, 6, 8, 10, 12, 14]),
    (8, [0, 0, 1, 1, 2, 2, 3, 3]),
    (24, [0, 1, 3, 4, 6, 7, 9, 10]),
    (25, [0, 1, 3, 4, 6, 7, 9, 10]),
])
def test_resampling_shows_what_is_on_display(tmp_path, source, expected):
    """Frame k at 16 fps is source frame floor(k · source / 16)."""
    video = make_video(tmp_path / "a.mp4", frames=28, fps=source)
    assert shown(video, range(8)) == expected
    assert probe(video, 16).count_at(16) == 28 * 16 // source + (28 * 16 % source > 0.95 * source)


def test_source_fps_overrides_the_file(tmp_path):
    video = make_video(tmp_path / "a.mp4", frames=20, fps=16)
    assert probe(video, 16, source_fps=32).count_at(16) == 10
    assert shown(video, range(8), source_fps=32) == [0, 2, 4, 6, 8, 10, 12, 14]


def test_variable_frame_rate_follows_the_timestamps(tmp_path):
    # Frames 0..3 at 100 ms, then 4..9 at 25 ms.
    pts = [0, 100, 200, 300, 400, 425, 450, 475, 500, 525]
    video = make_video(tmp_path / "a.mkv", frames=10, pts=pts)
    # At 16 fps: 0, 62.5, 125, 187.5, 250, 312.5, 375, 437.5, 500 ms.
    assert shown(video, range(9)) == [0, 0, 1, 1, 2, 3, 3, 5, 8]


def test_a_late_window_seeks_to_the_same_frames(tmp_path):
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "8", "g": "12", "bf": "2"}
        for index in range(96):
            pixels = np.full((48, 64, 3), 20 + 2 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    facts, crop = probe(path, 16), centre_crop(64, 48, (64, 48))
    late = read_frames(path, range(60, 77), crop, 16, facts)
    whole = read_frames(path, range(96), crop, 16, facts)
    np.testing.assert_array_equal(late, whole[60:77])
    assert abs(int(np.median(late[0])) - 140) <= 2


def rotate(path: Path, degrees: int) -> None:
    """Set the display matrix of an MP4's only track."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    one, minus = 0x00010000, 0xFFFF0000
    a, b, c, d = {90: (0, one, minus, 0), 180: (minus, 0, 0, minus), 270: (0, minus, one, 0)}[degrees]
    matrix_at = at + 4 + 20 + 16  # version and flags, times and ids (version 0), reserved and layer fields
    data[matrix_at : matrix_at + 36] = struct.pack(">9I", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(bytes(data))


def corner_video(path: Path) -> Path:
    """96x64, dark, with a bright top left corner."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(5):
            pixels = np.full((64, 96, 3), 30, np.uint8)
            pixels[:32, :48] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("degrees", "size", "bright"), [
    (90, (64, 96), (0, 1)), (180, (96, 64), (1, 1)), (270, (64, 96), (1, 0)),
])
def test_rotation_is_applied_as_a_player_does(tmp_path, degrees, size, bright):
    """A clockwise turn by 90 brings the top left corner to the top right."""
    video = corner_video(tmp_path / "a.mp4")
    rotate(video, degrees)
    facts = probe(video, 16)
    assert (facts.width, facts.height) == size
    frame = read_frames(video, [0], centre_crop(*size, size), 16, facts)[0]
    half_h, half_w = size[1] // 2, size[0] // 2
    quarters = {(r, c): frame[r * half_h : (r + 1) * half_h, c * half_w : (c + 1) * half_w].mean()
                for r in (0, 1) for c in (0, 1)}
    assert max(quarters, key=quarters.get) == bright and quarters[bright] > 180


@pytest.mark.parametrize(("codec", "pixel_format", "suffix"), [
    ("libx264", "yuv444p", ".mp4"), ("ffv1", "gray", ".mkv"),
    ("png", "rgba", ".mov"), ("ffv1", "yuva420p", ".mkv"), ("libx264", "yuv420p10le", ".mp4"),
])
def test_pixel_formats(tmp_path, codec, pixel_format, suffix):
    video = make_video(tmp_path / f"a{suffix}", frames=9, codec=codec, pixel_format=pixel_format)
    assert shown(video, range(9)) == list(range(9))


def test_odd_sizes(tmp_path):
    video = make_video(tmp_path / "a.mkv", frames=5, size=(97, 63), codec="ffv1", pixel_format="yuv444p")
    facts = probe(video, 16)
    assert (facts.width, facts.height) == (97, 63)
    frames = read_frames(video, range(5), centre_crop(97, 63, (48, 32)), 16, facts)
    assert frames.shape == (5, 32, 48, 3)


def test_resizing_does_not_alias(tmp_path):
    """One-pixel stripes shrunk by 4 must come out grey, not as stripes."""
    stripes = np.zeros((128, 192, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    facts = probe(tmp_path / "a.png", 16)
    small = read_frames(tmp_path / "a.png", [0], centre_crop(192, 128, (48, 32)), 16, facts)[0]
    assert np.abs(small[4:-4, 4:-4].astype(float) - 127.5).max() < 10


def test_images_and_folders_of_frames(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(9):
        Image.fromarray(np.full((32, 48), level(index), np.uint8)).save(folder / f"{index:03d}.png")  # grey files
    assert shown(folder, range(9)) == list(range(9))
    assert shown(folder, range(4), source_fps=32) == [0, 2, 4, 6]
    rgba = np.full((32, 48, 4), level(5), np.uint8)
    rgba[..., 3] = 255
    Image.fromarray(rgba, "RGBA").save(tmp_path / "one.png")
    facts = probe(tmp_path / "one.png", 16)
    assert facts.is_image and facts.count_at(16) == 1
    assert shown(tmp_path / "one.png", [0]) == [5]


def damage(kind: str, path: Path) -> Path:
    data = path.read_bytes()
    if kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(len(data)))
    elif kind == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        path.write_text("not a video")
    elif kind == "no video":
        with av.open(str(path), "w", format="wav") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
    else:
        path.unlink()
    return path


@pytest.mark.parametrize("kind", ["zero bytes", "noise", "cut short", "text", "no video", "missing"])
def test_damaged_files_say_why(tmp_path, kind):
    video = damage(kind, make_video(tmp_path / "a.mp4"))
    with pytest.raises(BadClip) as error:
        probe(video, 16)
    assert "\n" not in str(error.value) and len(str(error.value)) > 5


def test_a_stream_cut_in_the_middle_is_not_padded(tmp_path):
    """With the index in front the head of a cut file still opens: the missing frames must be missed."""
    whole = make_video(tmp_path / "a.mp4", frames=28, codec="libx264")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 3])
    with pytest.raises(BadClip, match=r"truncated|decod|missing|read"):
        facts = probe(tmp_path / "b.mp4", 16)
        read_frames(tmp_path / "b.mp4", range(25), centre_crop(96, 64, (96, 64)), 16, facts)


def test_frames_beyond_the_end_are_refused(tmp_path):
    video = make_video(tmp_path / "a.mp4", frames=10)
    facts = probe(video, 16)
    with pytest.raises(BadClip, match="missing"):
        read_frames(video, range(17), centre_crop(96, 64, (96, 64)), 16, facts)


def test_frames_that_an_edit_list_hides_are_not_missed(tmp_path):
    """A clip cut without re-encoding begins before its first shown frame: nothing of it is lost, nothing is shown."""
    whole = make_video(tmp_path / "a.mp4", frames=28)
    with av.open(str(whole)) as source, av.open(
        str(tmp_path / "b.mp4"), "w", options={"avoid_negative_ts": "disabled"}
    ) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                late = int(5 / 16 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - late, packet.dts - late, stream
                out.mux(packet)
    facts = probe(tmp_path / "b.mp4", 16)
    assert facts.frames == 23
    assert shown(tmp_path / "b.mp4", range(21)) == list(range(5, 26))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return [make_video(folder / "a.mp4", frames=16), make_video(folder / "b.mkv", frames=16),
            make_video(folder / "c.avi", frames=16, codec="mpeg4")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_give_frames_or_a_reason(originals, tmp_path, data):
    """Whatever is damaged, nothing but BadClip comes out, and frames come whole or not at all."""
    source = data.draw(st.sampled_from(originals))
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path / f"x{source.suffix}"
    path.write_bytes(bytes(raw))
    try:
        facts = probe(path, 16)
        if facts.width * facts.height > 4_000_000:
            return
        frames = read_frames(path, range(min(9, facts.count_at(16))), centre_crop(facts.width, facts.height, (48, 32)),
                             16, facts)
    except BadClip as error:
        assert str(error)
    else:
        assert frames.shape[1:] == (32, 48, 3)


def test_a_title_in_another_encoding_is_no_obstacle(tmp_path):
    video = tmp_path / "a.mp4"
    with av.open(str(make_video(tmp_path / "plain.mp4", frames=9))) as source, av.open(str(video), "w") as out:
        out.metadata["title"] = "TITLE123"
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = video.read_bytes()
    assert data.count(b"TITLE123") == 1
    video.write_bytes(data.replace(b"TITLE123", "剪刀电凝".encode("gbk")))
    assert shown(video, range(9)) == list(range(9))
