"""Pixels as players show them: square, whole frames, tagged colours, HDR, transparency, orientation, missing times."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lapwan.data.buckets import centre_crop
from lapwan.data.decoding.frame_files import frame_files, missing_frames
from lapwan.data.decoding.images import check_pixels, rgb_image
from lapwan.data.decoding.pixels import ReadOptions
from lapwan.data.decoding.timeline import PacketTime, make_timeline
from lapwan.data.dropped_clips import BadClip
from lapwan.data.regions import pixel_region
from lapwan.data.video import probe, read_frames

COLOURS = ((200, 40, 40), (40, 180, 60), (50, 60, 200), (200, 190, 60), (120, 120, 120), (20, 20, 20))


def write(
    path: Path, frames, codec="ffv1", pixel_format="yuv444p", rate=16, aspect=None, before=None, **context
) -> Path:
    """A video of uint8 [H, W, 3] frames; `before` changes a frame before it is encoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.options = context.pop("options", {})
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = before(frame) if before is not None else frame
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path: Path, count=1, options=None, source_fps=None) -> np.ndarray:
    facts = probe(path, 16, source_fps, options)
    size = (facts.width, facts.height)
    return read_frames(path, range(count), centre_crop(*size, size), 16, facts, source_fps)


def swatches() -> np.ndarray:
    """96x64: six squares of 32 pixels."""
    rows = np.array(COLOURS, np.uint8).reshape(2, 3, 3)
    return rows.repeat(32, axis=0).repeat(32, axis=1)


def squares(frame: np.ndarray) -> np.ndarray:
    return frame.reshape(2, 32, 3, 32, 3)[:, 8:24, :, 8:24].mean(axis=(1, 3)).reshape(6, 3)


@pytest.mark.parametrize(("aspect", "size"), [
    (Fraction(16, 15), (102, 64)), (Fraction(4, 3), (128, 64)), (Fraction(8, 9), (96, 72)), (Fraction(2, 3), (96, 96)),
    (Fraction(321, 320), (96, 64)), (Fraction(50, 1), (96, 64)),
])
def test_pixels_become_square(tmp_path, aspect, size):
    """The display's size decides the bucket; a ratio near 1 is rounding, an absurd one a mistake."""
    video = write(tmp_path / "a.mp4", [swatches()] * 2, codec="libx264", aspect=aspect, options={"crf": "2"})
    facts = probe(video, 16)
    assert (facts.width, facts.height) == size and facts.stored == (96, 64)
    assert facts.treatment == ("square pixels" if size != (96, 64) else "")
    assert np.abs(squares(np.asarray(Image.fromarray(read(video)[0]).resize((96, 64)))) - COLOURS).max() <= 3


def combed(path: Path, **options) -> Path:
    """Even rows show a bar at the left, odd rows, which are of another time, one at the right."""
    pixels = np.full((64, 96, 3), 30, np.uint8)
    pixels[::2, 16:32] = 220
    pixels[1::2, 64:80] = 220
    return write(path, [pixels] * 4, **options)



def comb(frame: np.ndarray) -> float:
    """Mean difference of neighbouring rows."""
    return float(np.abs(np.diff(frame[8:-8].astype(int), axis=0)).mean())


@pytest.mark.parametrize(("choice", "lines"), [("auto", False), ("never", True), ("always", False)])
def test_fields_become_whole_frames(tmp_path, choice, lines):
    video = combed(tmp_path / "a.mp4", codec="libx264", pixel_format="yuv420p",
                   options={"flags": "+ildct+ilme", "x264-params": "tff=1:crf=4"})
    facts = probe(video, 16, options=ReadOptions(deinterlace=choice))
    assert facts.traits == "interlaced" and ("yadif" in facts.treatment) is not lines
    frames = read(video, 4, ReadOptions(deinterlace=choice))
    assert (comb(frames[1]) > 40) is lines
    if not lines:  # one field is kept, and the other time is gone
        assert sorted(frames[1][32, [24, 72], 0] > 125) == [False, True]


def test_progressive_video_is_left_alone(tmp_path):
    video = combed(tmp_path / "a.mkv")
    assert probe(video, 16).treatment == ""
    assert comb(read(video)[0]) > 40
    assert probe(video, 16, options=ReadOptions(deinterlace="always")).treatment == "yadif"


MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def coded(pixels: np.ndarray, matrix: int, full: bool, depth: int) -> np.ndarray:
    """[3, H, W] Y'CbCr by the matrix's K_r and K_b, from the formula."""
    red_share, blue_share = MATRICES[matrix]
    red, green, blue = np.moveaxis(pixels.astype(np.float64) / 255, -1, 0)
    luma = red_share * red + (1 - red_share - blue_share) * green + blue_share * blue
    chroma = [(blue - luma) / (2 - 2 * blue_share), (red - luma) / (2 - 2 * red_share)]
    unit = 2 ** (depth - 8)
    if full:
        top = 2**depth - 1
        planes = [luma * top, *(c * top + 2 ** (depth - 1) for c in chroma)]
    else:
        planes = [unit * (16 + 219 * luma), *(unit * (128 + 224 * c) for c in chroma)]
    return np.stack(planes).round()


@pytest.mark.parametrize("depth", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 6, 7, 9])
def test_tagged_matrices_and_ranges(tmp_path, matrix, full, depth):
    planes = coded(swatches(), matrix, full, depth)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p" if depth == 8 else "yuv444p10le"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        frame = av.VideoFrame(96, 64, stream.pix_fmt)
        frame.colorspace, frame.color_range = matrix, 2 if full else 1
        for plane, values in zip(frame.planes, planes, strict=True):
            data = values.astype(np.uint8 if depth == 8 else np.uint16)
            padded = np.zeros((64, plane.line_size // data.itemsize), data.dtype)
            padded[:, :96] = data
            plane.update(padded.tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(squares(read(tmp_path / "a.mkv")[0]) - COLOURS).max() <= 3


def hdr(path: Path, transfer: int, level: float = 0.5) -> Path:
    """A grey video of a signal level, tagged BT.2020 with a transfer."""
    def tagged(frame):
        deep = frame.reformat(format="yuv444p10le", dst_colorspace=9)
        deep.colorspace, deep.color_trc, deep.color_primaries = 9, transfer, 9
        return deep

    grey = np.full((64, 96, 3), round(255 * level), np.uint8)
    return write(path, [grey] * 2, pixel_format="yuv444p10le", before=tagged, color_trc=transfer, color_primaries=9,
                 colorspace=9)


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name_or_tone_mapped(tmp_path, transfer, name):
    video = hdr(tmp_path / "a.mkv", transfer)
    with pytest.raises(BadClip, match=rf"HDR \({name}\).*hdr = \"tonemap\""):
        probe(video, 16)
    options = ReadOptions(hdr="tonemap")
    assert probe(video, 16, options=options).treatment == f"{name} tone-mapped"
    frame = read(video, 1, options)[0]
    signal = 128 / 255
    expected = sdr_of(pq(signal) if name == "PQ" else hlg(signal))
    assert np.abs(frame.astype(float) - expected).max() <= 3


def pq(signal: float) -> float:
    power = signal ** (32 / 2523)
    return 10000 * (max(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)


def inverse_pq(light: float) -> float:
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(signal: float) -> float:
    scene = signal**2 / 3 if signal <= 0.5 else (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return 1000 * scene**1.2


def sdr_of(light: float) -> float:
    """BT.2390's curve from 1000 to 203 cd/m² on a grey, then gamma 2.4; from the formula, in fp64."""
    target, signal = inverse_pq(203) / inverse_pq(1000), min(inverse_pq(light) / inverse_pq(1000), 1)
    knee = 1.5 * target - 0.5
    if signal > knee:
        t = (signal - knee) / (1 - knee)
        signal = ((2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
                  + (-2 * t**3 + 3 * t**2) * target)
    return 255 * (pq(signal * inverse_pq(1000)) / 203) ** (1 / 2.4)


@pytest.mark.parametrize("light", [0.1, 10, 83, 150, 203, 600, 1000, 4000])
def test_the_tone_curve(light):
    from lapwan.data.decoding.hdr import tone_mapped

    pixels = np.full((2, 2, 3), round(65535 * inverse_pq(light)), np.uint16)
    np.testing.assert_allclose(tone_mapped(pixels, "PQ"), sdr_of(light), atol=1)


def test_saturated_bt2020_colours_stay_in_range():
    from lapwan.data.decoding.hdr import tone_mapped

    pixels = np.zeros((1, 3, 3), np.uint16)
    pixels[0, range(3), range(3)] = round(65535 * inverse_pq(80))
    mapped = tone_mapped(pixels, "PQ")[0].astype(int)
    assert (mapped.argmax(axis=1) == [0, 1, 2]).all() and (mapped[~np.eye(3, dtype=bool)] == 0).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_pictures_are_scaled(tmp_path, mode):
    ramp = np.linspace(0, 65535, 256).reshape(1, 256).repeat(32, axis=0)
    path = tmp_path / "a.png" if mode == "I;16" else tmp_path / "a.tif"
    values = ramp.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    Image.fromarray(values / 65535 if mode == "F" else values).save(path)
    assert np.abs(np.asarray(rgb_image(path))[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    if mode == "I;16":
        assert probe(path, 16).treatment == "16 bits scaled"


def test_transparency_is_composited(tmp_path):
    rgba = np.full((32, 48, 4), 200, np.uint8)
    rgba[:, :24, 3] = 0
    rgba[:, 24:, 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    palette = Image.fromarray(rgba[..., :3]).quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    write(tmp_path / "a.mov", [rgba[..., :3]] * 2, codec="png", pixel_format="rgba",
          before=lambda _: av.VideoFrame.from_ndarray(rgba, format="rgba"))
    for name in ("a.png", "a.mov"):
        for background, levels in (("black", (0, 100)), ("white", (255, 227))):
            options = ReadOptions(background=background)
            assert probe(tmp_path / name, 16, options=options).treatment == f"alpha over {background}"
            frame = read(tmp_path / name, 1, options)[0]
            assert np.abs(frame[16, [12, 36], 0].astype(int) - levels).max() <= 1
    assert read(tmp_path / "p.png")[0].max() == 0


def test_opaque_pictures_are_not_touched(tmp_path):
    """Their caches stay valid."""
    rgba = np.full((32, 48, 4), 200, np.uint8)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba[..., :3]).convert("CMYK").save(tmp_path / "a.jpg")
    Image.fromarray(rgba[..., :3]).save(tmp_path / "a.gif")
    for name in ("a.png", "a.jpg", "a.gif"):
        assert probe(tmp_path / name, 16).treatment == ""
        assert np.abs(read(tmp_path / name)[0].astype(int) - 200).max() <= 4


def cornered(height: int = 64, width: int = 96) -> np.ndarray:
    pixels = np.full((height, width, 3), 30, np.uint8)
    pixels[: height // 2, : width // 2] = (220, 30, 30)
    pixels[: height // 2, width // 2 :] = (30, 220, 30)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(cornered()).save(tmp_path / "a.png", exif=exif)
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
               6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}[orientation]
    np.testing.assert_array_equal(read(tmp_path / "a.png")[0], upright(cornered()))


@pytest.mark.parametrize(("matrix", "upright"), [
    ((-1, 0, 0, 1), np.fliplr), ((1, 0, 0, -1), np.flipud), ((0, 1, 1, 0), lambda a: a.swapaxes(0, 1)),
    ((0, -1, -1, 0), lambda a: np.rot90(a, 2).swapaxes(0, 1)), ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
    ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
])
def test_display_matrices(tmp_path, matrix, upright):
    """QuickTime's matrix: x' = a·x + c·y, y' = b·x + d·y."""
    video = write(tmp_path / "a.mp4", [cornered()] * 2, codec="libx264", pixel_format="yuv420p")
    data = bytearray(video.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    video.write_bytes(bytes(data))
    expected = upright(cornered())
    facts = probe(video, 16)
    assert (facts.height, facts.width) == expected.shape[:2]
    assert ("mirrored" in facts.treatment) == (matrix[0] * matrix[3] - matrix[1] * matrix[2] < 0)
    assert np.abs(read(video)[0].astype(int) - expected).mean() < 6


@pytest.mark.parametrize(("aspect", "matrix"), [
    (None, (1, 0, 0, 1)), (Fraction(4, 3), (1, 0, 0, 1)), (Fraction(2, 3), (0, 1, -1, 0)), (None, (-1, 0, 0, 1)),
])
@pytest.mark.parametrize("bucket", [(48, 32), (32, 48), (64, 64)])
def test_a_box_stays_on_its_square(tmp_path, aspect, matrix, bucket):
    """Through pixel aspect, display matrix, resize and crop: a box in pixels of the upright frame, and in fractions."""
    stored = np.full((64, 96, 3), 20, np.uint8)
    stored[20:44, 36:60] = 230
    video = write(tmp_path / "a.mp4", [stored] * 2, codec="libx264", pixel_format="yuv420p", aspect=aspect,
                  options={"crf": "4"})
    data = bytearray(video.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    video.write_bytes(bytes(data))
    facts = probe(video, 16)
    assert ("square pixels" in facts.treatment) == (aspect is not None)
    turned = matrix[0] == 0
    box = [20, 36, 44, 60] if turned else [36, 20, 60, 44]
    crop = centre_crop(facts.width, facts.height, bucket)
    frame = read_frames(video, [0], crop, 16, facts)[0]
    pixels = ({"frame": 0, "box": box, "pixels": True},)
    polygon = ({"frame": 0, "pixels": True,
                "polygon": [[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]]]},)
    fractions = ({"frame": 0, "box": [v / s for v, s in zip(box, facts.stored * 2, strict=True)]},)
    bright = frame.mean(axis=-1) > 125
    for roi in (pixels, polygon, fractions):
        region = pixel_region(roi, None, video, [0], crop, 16, facts)[0]
        assert bright.sum() > 100
        assert (bright != (region > 0.5)).sum() <= 0.05 * bright.size


def test_joined_recordings_go_on(tmp_path):
    """Two transport streams in one file: the second's times begin anew."""
    frames = [np.full((48, 64, 3), 20 + 4 * i, np.uint8) for i in range(24)]
    single = write(tmp_path / "a.ts", frames, codec="libx264", pixel_format="yuv420p")
    (tmp_path / "b.ts").write_bytes(single.read_bytes() * 2)
    facts = probe(tmp_path / "b.ts", 16)
    assert (facts.frames, facts.seekable) == (48, False) and facts.seconds == pytest.approx(3, abs=0.01)
    levels = np.median(read(tmp_path / "b.ts", 47).reshape(47, -1), axis=1)
    assert np.abs(levels - [20 + 4 * (i % 24) for i in range(47)]).max() <= 3


def test_elementary_streams_have_no_times(tmp_path):
    frames = [np.full((48, 64, 3), 20 + 4 * i, np.uint8) for i in range(24)]
    video = write(tmp_path / "a.ts", frames, codec="libx264", pixel_format="yuv420p")
    with av.open(str(video)) as source, (tmp_path / "a.h264").open("wb") as raw:
        for packet in source.demux(video=0):
            raw.write(bytes(packet))
    levels = np.median(read(tmp_path / "a.h264", 23, source_fps=16).reshape(23, -1), axis=1)
    assert np.abs(levels - [20 + 4 * i for i in range(23)]).max() <= 3


def test_packets_without_times_follow_each_other():
    packets = [PacketTime(None, None)] * 3 + [PacketTime(0.1 * i, 0.1 * i) for i in range(7)]
    timeline = make_timeline(packets, "matroska,webm", 10)
    assert (timeline.frames, timeline.times, timeline.seekable) == (10, None, False)
    assert timeline.origin == pytest.approx(-0.3) and timeline.seconds == pytest.approx(1.0)


def test_a_long_hold_is_a_break_only_in_broadcast_containers():
    packets = [PacketTime(t, t) for t in (0, 0.1, 0.2, 30.0, 30.1)]
    assert make_timeline(packets, "matroska,webm", 10).seconds == pytest.approx(30.2)
    assert make_timeline(packets, "mpegts", 10).seconds == pytest.approx(0.5)


def test_folders_are_read_in_natural_order(tmp_path):
    for number in (1, 2, 3, 9, 10, 11, 20):
        Image.fromarray(np.full((32, 48, 3), 10 * number, np.uint8)).save(tmp_path / f"f{number}.png")
    files = frame_files(tmp_path)
    assert [file.stem for file in files] == ["f1", "f2", "f3", "f9", "f10", "f11", "f20"]
    assert missing_frames(files) == [4, 5, 6, 7, 8, *range(12, 20)]
    assert probe(tmp_path, 16).traits == "13 missing from 4 on"
    assert read(tmp_path, 7)[:, 0, 0, 0].tolist() == [10, 20, 30, 90, 100, 110, 200]


def test_every_fifth_frame_is_not_a_gap(tmp_path):
    assert missing_frames([Path(f"{n}.png") for n in range(0, 50, 5)]) == []
    assert missing_frames([Path(f"{n}.png") for n in (0, 5, 10, 25, 30)]) == [15, 20]
    assert missing_frames([Path("a.png"), Path("b.png"), Path("c.png")]) == []


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_animated_pictures_are_clips(tmp_path, suffix):
    frames = [Image.fromarray(np.full((32, 48, 3), 20 * i, np.uint8)) for i in range(1, 9)]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, lossless=True)
    facts = probe(path, 16)
    assert (facts.frames, facts.count_at(16)) == (8, 16) and facts.fps == pytest.approx(8)
    assert read(path, 16)[:, 0, 0, 0].tolist() == [20 * i for i in range(1, 9) for _ in range(2)]
    still = probe(path, 16, still=True)
    assert still.is_image and read_frames(path, [0], centre_crop(48, 32, (48, 32)), 16, still)[0, 0, 0, 0] == 20


def test_absurd_sizes_are_refused_before_decoding(tmp_path, monkeypatch):
    header = struct.pack(">4sIIBBBBB", b"IHDR", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4sI", 0, b"IEND", 0xAE426082))
    with pytest.raises(BadClip, match="LAPWAN_MAX_PIXELS"):
        probe(tmp_path / "bomb.png", 16)
    with pytest.raises(BadClip, match=r"16385x8192.*LAPWAN_MAX_PIXELS=134225920"):
        check_pixels(16385, 8192)
    monkeypatch.setenv("LAPWAN_MAX_PIXELS", "134225920")
    check_pixels(16385, 8192)
    monkeypatch.setenv("LAPWAN_MAX_PIXELS", "1000")
    with pytest.raises(BadClip, match="96x64"):
        probe(write(tmp_path / "a.mkv", [swatches()]), 16)
