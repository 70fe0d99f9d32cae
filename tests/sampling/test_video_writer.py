"""Videos come back as they were written: pixels, frame count, rate and metadata; a failure leaves nothing behind."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lapwan.errors import UserError
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.result import Video
from lapwan.sampling.video import read_video_metadata, write_video

METADATA = {"prompt": "抓钳抓取标本袋", "seed": "42"}


def _flat(colour: tuple[int, int, int], frames: int = 5, height: int = 48, width: int = 64) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (frames, height, width, 3)).copy()


def _decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0), (0, 0, 255),
                                    (206, 98, 92), (250, 240, 20)])
def test_mp4_keeps_colours(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    frames = _flat(colour)
    write_video(tmp_path / "v.mp4", frames, 16)
    back = _decode(tmp_path / "v.mp4")
    assert back.shape == frames.shape
    # 8-bit limited-range YCbCr rounds each channel by up to about 2.
    assert np.abs(back.astype(int) - frames).max() <= 3


def test_mp4_keeps_a_gradient_and_a_coloured_edge(tmp_path: Path) -> None:
    frames = _flat((0, 0, 0))
    frames[:, :24] = np.linspace(0, 255, 64).astype(np.uint8)[None, None, :, None]
    frames[:, 24:, 32:] = (200, 30, 40)
    write_video(tmp_path / "v.mp4", frames, 16, crf=10)
    error = np.abs(_decode(tmp_path / "v.mp4").astype(int) - frames)
    assert error[:, :22].max() <= 8
    # Chroma is halved: only the pixels beside the coloured edge may be off.
    assert error[:, 28:, 36:].max() <= 6
    assert error[:, 28:, :28].max() <= 6


def test_mp4_says_what_it_is(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", _flat((200, 40, 40), frames=17), 23.976, METADATA)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (int(context.color_range), int(context.colorspace)) == (1, 1)  # limited, BT.709
        assert (int(context.color_primaries), int(context.color_trc)) == (1, 1)
        assert abs(float(stream.average_rate) - 23.976) < 1e-3
        assert stream.frames == 17
        times = [Fraction(frame.pts) * frame.time_base for frame in container.decode(video=0)]
    assert np.allclose(np.diff([float(t) for t in times]), 1 / 23.976, atol=1e-3)


@pytest.mark.parametrize("name", ["v.mp4", "one.png", "frames"])
def test_metadata_comes_back(tmp_path: Path, name: str) -> None:
    frames = _flat((10, 20, 30), frames=1 if name.endswith(".png") else 3)
    write_video(tmp_path / name, frames, 16, METADATA)
    found = read_video_metadata(tmp_path / name)
    assert found == (METADATA if "." in name else {**METADATA, "fps": "16"})


def test_metadata_of_others_is_no_error(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", _flat((1, 2, 3)), 16)
    assert read_video_metadata(tmp_path / "v.mp4") == {}
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_video_metadata(tmp_path / "plain.png") == {}


@pytest.mark.parametrize("name", ["broken.mp4", "broken.png", "missing.mp4", "empty"])
def test_metadata_of_what_is_no_video(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"this is no video")
    with pytest.raises(UserError, match=name):
        read_video_metadata(tmp_path / name)


def test_png_and_folder_are_exact(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 7, 9, 3), dtype=np.uint8)  # odd sizes are fine here
    write_video(tmp_path / "one.png", frames[:1], 16)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), frames[0])
    write_video(tmp_path / "many", frames, 16)
    files = sorted((tmp_path / "many").iterdir())
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(12)]
    assert np.array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), frames)


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 16, METADATA)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(("name", "shape", "said"), [
    ("v.mp4", (5, 31, 32, 3), "even height and width, got 31x32"),
    ("v.mp4", (5, 32, 33, 3), "even height and width, got 32x33"),
    ("v.avi", (5, 32, 32, 3), "'.avi'"),
    ("v.png", (5, 32, 32, 3), "5 frames"),
    ("v.mp4", (0, 32, 32, 3), "no frames"),
])
def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path, name: str, shape: tuple[int, ...],
                                                    said: str) -> None:
    with pytest.raises(UserError) as caught:
        write_video(tmp_path / name, np.zeros(shape, np.uint8), 16)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rate(tmp_path: Path, fps: float) -> None:
    with pytest.raises(UserError, match="frames a second"):
        write_video(tmp_path / "v.mp4", _flat((0, 0, 0)), fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 8, 8, 4), np.uint8)])
def test_frames_of_another_kind_are_a_fault_of_the_caller(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(TypeError, match="uint8"):
        write_video(tmp_path / "v.mp4", frames, 16)


class _Breaks(np.ndarray):
    """Frames that cannot be read to the end: the disk or the model failed half-way."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        for index in range(3):
            yield np.asarray(self)[index]
        raise OSError("half-way")


@pytest.mark.parametrize("name", ["v.mp4", "frames"])
def test_a_failure_half_way_keeps_the_old_output_and_leaves_nothing_else(tmp_path: Path, name: str) -> None:
    old = _flat((9, 9, 9))
    write_video(tmp_path / name, old, 16, METADATA)
    with pytest.raises(OSError, match="half-way"):
        write_video(tmp_path / name, _flat((200, 200, 200)).view(_Breaks), 16)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert read_video_metadata(tmp_path / name)["seed"] == "42"


def test_a_new_video_replaces_the_old(tmp_path: Path) -> None:
    for name in ("v.mp4", "frames"):
        write_video(tmp_path / name, _flat((0, 0, 0), frames=5), 16)
        write_video(tmp_path / name, _flat((255, 255, 255), frames=2), 16)
    assert _decode(tmp_path / "v.mp4").shape[0] == 2
    assert len(list((tmp_path / "frames").iterdir())) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frames", "v.mp4"]


def test_sheet_shows_first_and_last_frames() -> None:
    video = _flat((0, 0, 0), frames=9, height=10, width=12)
    video[0], video[-1] = (250, 0, 0), (0, 0, 250)
    sheet = np.asarray(contact_sheet([video, video[:2]], columns=3, scale=2))
    red, blue = (sheet == (250, 0, 0)).all(-1), (sheet == (0, 0, 250)).all(-1)
    # Two rows begin with the first frame; only the whole video reaches the last.
    assert red.sum() == 2 * 20 * 24
    assert blue.sum() == 20 * 24
    assert np.nonzero(blue)[1].min() > np.nonzero(red)[1].max()


def test_sheet_captions_need_no_system_font() -> None:
    video = _flat((0, 0, 0), frames=3, height=20, width=60)
    plain = contact_sheet([video], columns=3)
    captioned = contact_sheet([video], columns=3, captions=["hook 电凝钩 " * 40])
    assert captioned.width == plain.width
    assert captioned.height > plain.height
    with pytest.raises(ValueError, match="1 captions for 2 videos"):
        contact_sheet([video, video], columns=2, captions=["one"])


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp", "frames", "v.safetensors"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on a file's size stands for the disk's."""
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    video = Video(noise, 16, torch.zeros(1, 16, 2, 64, 64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: ."):
            video.save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
