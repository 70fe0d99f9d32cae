"""Small videos as recorders, phones and editors make them, for `bench_videos.py` (needs ffmpeg)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Pattern = Callable[[int, int, int], np.ndarray]
X264 = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-threads", "1")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le", "-x265-params",
        "log-level=error:pools=1")
FIELDS = ("-flags", "+ilme+ildct")
TOP, BOTTOM = ("-vf", "interlace=scan=tff:lowpass=0"), ("-vf", "interlace=scan=bff:lowpass=0")


def tagged(matrix: str, full: bool, transfer: str = "", tag: str = "") -> tuple[str, ...]:
    """Options that convert to a colour matrix and range, and tag the file with them."""
    extra = ("-color_trc", transfer) if transfer else ()
    span = "pc" if full else "tv"
    return ("-vf", f"scale=out_color_matrix={matrix}:out_range={span}", "-colorspace", tag or matrix, "-color_range",
            span, *extra)


# name: frames, rate, ffmpeg's options, (width, height)
PLAIN: dict[str, tuple[int, str, Sequence[str], tuple[int, int]]] = {
    "h264_24.mp4": (60, "24", X264, (320, 240)),
    "h264_2997.mp4": (60, "30000/1001", X264, (320, 240)),
    "h264_60.mp4": (100, "60", X264, (320, 240)),
    "hevc10.mp4": (40, "24", X265, (320, 240)),
    "vp9.webm": (40, "24", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"), (320, 240)),
    "mjpeg.avi": (40, "24", ("-c:v", "mjpeg", "-q:v", "3"), (320, 240)),
    "mpeg2.mpg": (60, "25", ("-c:v", "mpeg2video", "-q:v", "3", "-bf", "2"), (320, 240)),
    "h264.ts": (60, "25", X264, (320, 240)),
    "xvid.avi": (60, "24", ("-c:v", "mpeg4", "-q:v", "3", "-bf", "2"), (320, 240)),
    "wmv2.wmv": (60, "24", ("-c:v", "wmv2", "-q:v", "3"), (320, 240)),
    "prores4444.mov": (30, "24", ("-c:v", "prores_ks", "-profile:v", "4", "-pix_fmt", "yuva444p10le"), (320, 240)),
    "ffv1.mkv": (40, "24", ("-c:v", "ffv1", "-pix_fmt", "bgr0"), (320, 240)),
    "x264_rgb.mp4": (40, "24", ("-c:v", "libx264rgb", "-preset", "veryfast", "-crf", "10"), (320, 240)),
    "odd.mkv": (40, "24", ("-c:v", "ffv1", "-pix_fmt", "yuv444p"), (321, 243)),
    "two.mp4": (2, "24", X264, (320, 240)),
    "opengop.mp4": (200, "25", ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-x264-params",
                                "open-gop=1:keyint=40:bframes=8:threads=1"), (320, 240)),
    "bt709.mp4": (40, "24", (*tagged("bt709", False), *X264), (320, 240)),
    "bt709full.mp4": (40, "24", (*tagged("bt709", True), *X264), (320, 240)),
    "bt601full.mp4": (40, "24", (*tagged("bt601", True, tag="smpte170m"), *X264), (320, 240)),
    "bt2020sdr.mp4": (40, "24", (*tagged("bt2020", False, tag="bt2020nc"), *X265), (320, 240)),
    "hd_untagged.mp4": (30, "24", X264, (1280, 720)),
    "hdr_pq.mp4": (40, "24", (*tagged("bt2020", False, "smpte2084", "bt2020nc"), *X265), (320, 240)),
    "hdr_hlg.mp4": (40, "24", (*tagged("bt2020", False, "arib-std-b67", "bt2020nc"), *X265), (320, 240)),
    "sar_pal.mp4": (60, "25", ("-vf", "setsar=16/11", *X264), (320, 240)),
    "interlaced.mp4": (120, "50", (*TOP, *X264, *FIELDS, "-x264opts", "tff=1"), (320, 240)),
    "vfr.mp4": (120, "60", ("-vf", "select='lt(n,30)+gte(n,30)*not(mod(n,4))'", "-vsync", "vfr", *X264), (320, 240)),
    "frag.mp4": (60, "24", (*X264, "-movflags", "frag_keyframe+empty_moov"), (320, 240)),
    # Further ones, of the same kinds.
    "dv_pal.avi": (50, "50", ("-target", "pal-dv", "-aspect", "16:9"), (720, 576)),
    "dv_ntsc.mov": (60, "60000/1001", ("-vf", "interlace=scan=bff:lowpass=0,setfield=bff", "-c:v", "dvvideo",
                                       "-pix_fmt", "yuv411p", "-aspect", "4:3"), (720, 480)),
    "dvd_pal.vob": (50, "25", ("-target", "pal-dvd", "-aspect", "16:9"), (720, 576)),
    "dvd_ntsc.vob": (60, "60000/1001", ("-vf", "interlace=scan=tff:lowpass=0,setfield=tff", "-target", "ntsc-dvd",
                                        "-aspect", "4:3", *FIELDS), (720, 480)),
    "hdv.ts": (40, "50", ("-vf", "interlace=scan=tff:lowpass=0,setsar=4/3", "-c:v", "mpeg2video", "-b:v", "20M",
                           *FIELDS), (1440, 1080)),
    "avchd.ts": (40, "50", (*TOP, *X264, *FIELDS, "-x264opts", "tff=1"), (1920, 1080)),
    "interlaced709.mov": (60, "50", ("-vf", "interlace=scan=bff:lowpass=0,scale=out_color_matrix=bt709:out_range=tv:"
                          "interl=1,setfield=bff", "-colorspace", "bt709", "-color_range", "tv", "-c:v", "prores_ks",
                                     *FIELDS), (320, 240)),
    "interlaced_ffv1.mkv": (60, "50", ("-vf", "interlace=scan=tff:lowpass=0", "-c:v", "ffv1", "-pix_fmt", "yuv422p"),
                            (320, 240)),
    "bt470bg.mkv": (40, "25", (*tagged("bt470bg", False), *X264), (320, 240)),
    "smpte240m.mp4": (40, "25", (*tagged("smpte240m", False), *X264), (320, 240)),
    "fcc.mkv": (40, "25", (*tagged("fcc", False), *X264), (320, 240)),
    "bt2020_8.mp4": (40, "25", (*tagged("bt2020", True, tag="bt2020nc"), *X264), (320, 240)),
    "yuv422p12.mkv": (40, "24", (*tagged("bt709", False), "-c:v", "ffv1", "-pix_fmt", "yuv422p12le"), (320, 240)),
    "gray16.mkv": (40, "24", ("-c:v", "ffv1", "-pix_fmt", "gray16le"), (320, 240)),
    "gray10.mkv": (40, "24", ("-c:v", "ffv1", "-pix_fmt", "gray10le"), (320, 240)),
    "gbrp12.mkv": (40, "24", ("-c:v", "ffv1", "-pix_fmt", "gbrp12le"), (320, 240)),
    "yuv410.avi": (40, "24", ("-c:v", "rawvideo", "-pix_fmt", "yuv410p"), (320, 240)),
    "uyvy.avi": (30, "25", ("-c:v", "rawvideo", "-pix_fmt", "uyvy422"), (320, 240)),
    "huffyuv.avi": (40, "24", ("-c:v", "huffyuv"), (320, 240)),
    "yuvj420.mp4": (40, "24", ("-vf", "scale=out_range=pc", "-c:v", "libx264", "-preset", "veryfast", "-pix_fmt",
                               "yuvj420p"), (320, 240)),
    "h263.3gp": (40, "25", ("-c:v", "h263", "-q:v", "3"), (352, 288)),
    "raw.h264": (60, "25", (*X264, "-bf", "2"), (320, 240)),
    "raw.m2v": (60, "25", ("-c:v", "mpeg2video", "-q:v", "3", "-bf", "2"), (320, 240)),
    "late_start.ts": (60, "25", (*X264, "-output_ts_offset", "30"), (320, 240)),
    "sar_tall.mp4": (40, "25", ("-vf", "setsar=2/3", *X264), (320, 240)),
    "sar_near.mp4": (40, "25", ("-vf", "setsar=321/320", *X264), (320, 240)),
    "gop250.mp4": (400, "25", (*X264, "-g", "250", "-bf", "3", "-sc_threshold", "0"), (160, 120)),
    "gop250.mkv": (400, "25", (*X264, "-g", "250", "-bf", "3", "-sc_threshold", "0"), (160, 120)),
    "intra_refresh.ts": (300, "25", (*X264, "-x264-params", "intra-refresh=1:keyint=50:bframes=0"), (320, 240)),
    "xvid_long.avi": (300, "25", ("-c:v", "mpeg4", "-q:v", "3", "-bf", "2", "-g", "60"), (160, 120)),
    "hold.mkv": (100, "25", ("-vf", "select='lt(n,20)+gt(n,70)'", "-vsync", "vfr", *X264), (320, 240)),
    "apng.png": (20, "10", ("-f", "apng", "-plays", "0"), (320, 240)),
    "animated.webp": (20, "10", ("-c:v", "libwebp_anim", "-lossless", "1"), (320, 240)),
    "gif.gif": (30, "20", (), (320, 240)),
    "alpha.mov": (20, "24", ("-vf", "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*X/W'", "-c:v", "png"),
                  (320, 240)),
    "alpha.gif": (20, "10", ("-vf", "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*gt(X,W/2)',split[a][b];"
                             "[a]palettegen[p];[b][p]paletteuse"), (320, 240)),
}


def make_videos(folder: Path, pattern: Pattern) -> None:
    """Write all videos that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (frames, rate, options, size) in PLAIN.items():
        if not (folder / name).exists():
            _encode(folder / name, frames, rate, options, size, pattern)
    _cut_and_joined(folder)
    _stills(folder, pattern)


def _encode(
    path: Path, frames: int, rate: str, options: Sequence[str], size: tuple[int, int], pattern: Pattern
) -> None:
    command = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r",
               rate, "-i", "-", *options, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        data = b"".join(pattern(number, *size).tobytes() for number in range(frames))
        _, errors = process.communicate(data)
    if process.returncode:
        print(f"{path.name}: ffmpeg cannot make it ({errors.decode().splitlines()[-1:]})")


def _cut_and_joined(folder: Path) -> None:
    """Cuts without re-encoding, rotations, mirrors, joined and damaged files."""
    plain, long = folder / "h264_24.mp4", folder / "opengop.mp4"

    def copy(name: str, *options: str, source: Path = long, before: Sequence[str] = ()) -> None:
        subprocess.run(["ffmpeg", "-v", "error", "-y", *before, "-i", str(source), "-c", "copy", *options,
                        str(folder / name)], check=True)

    for degrees in (90, 180, 270):
        copy(f"rot{degrees}.mp4", "-metadata:s:v:0", f"rotate={degrees}", source=plain)
    copy("cut.mp4", before=("-ss", "0.52"))
    copy("cut_negative.mkv", "-avoid_negative_ts", "disabled", before=("-ss", "0.52"))
    copy("cut_tail.mp4", "-t", "3", "-avoid_negative_ts", "disabled", before=("-ss", "2.6"))
    copy("delayed.mp4", source=plain, before=("-itsoffset", "1.5"))
    copy("delayed.mkv", source=plain, before=("-itsoffset", "1.5"))
    (folder / "joined.ts").write_bytes((folder / "h264.ts").read_bytes() * 2)
    (folder / "joined.vob").write_bytes((folder / "dvd_pal.vob").read_bytes() * 2)
    stream = (folder / "h264.ts").read_bytes()
    (folder / "truncated.ts").write_bytes(stream[: len(stream) * 2 // 3])
    (folder / "truncated.mp4").write_bytes(plain.read_bytes()[: plain.stat().st_size * 2 // 3])
    damaged = bytearray((folder / "h264_60.mp4").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 300] = np.random.default_rng(0).bytes(300)
    (folder / "damaged.mp4").write_bytes(damaged)
    mirrored = bytearray((folder / "rot180.mp4").read_bytes())
    at = mirrored.index(b"tkhd") + 44
    mirrored[at + 16 : at + 20] = (0x00010000).to_bytes(4, "big")  # (-1, 0, 0, 1)
    (folder / "mirrored.mp4").write_bytes(mirrored)


def _stills(folder: Path, pattern: Pattern) -> None:
    """A folder of frames that only natural order sorts."""
    frames = folder / "frames"
    frames.mkdir(exist_ok=True)
    for number in range(24):
        Image.fromarray(pattern(number, 320, 240)).save(frames / f"f{number}.png")
