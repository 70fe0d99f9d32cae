"""Video files: writes H.264 in MP4, GIF, WebP, one PNG or a folder of PNGs, and reads back their metadata.

How to add a container: its suffix in `SUFFIXES`, a function like `_encode_mp4`, a `case` in `write_video`, and its
reader in `read_video_metadata`.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from lapwan.documents import parse_json
from lapwan.errors import UserError
from lapwan.files import atomic_file, atomic_folder

SUFFIXES = (".mp4", ".png", ".gif", ".webp")
DEFAULT_CRF = 18  # visually lossless
FINE_CRF = 12  # for small frames, in which an instrument's head is a few dozen pixels
_KEY = "comment"  # a tag of MP4's ilst that players show, and a keyword of PNG
_BT709 = 1  # ITU-T H.273: 1 = BT.709 for primaries, transfer and matrix
_LIMITED = 1  # libavutil AVCOL_RANGE_MPEG: luma 16..235


def write_video(path: Path, frames_THWC: np.ndarray, fps: float, metadata: dict[str, str] | None = None,
                crf: int = DEFAULT_CRF) -> None:
    """Write frames as `.mp4`, `.gif`, `.webp`, `.png` (exactly one) or, without a suffix, a folder of PNG frames.

    MP4 is H.264 yuv420p, converted to and tagged as BT.709 limited range, so that 0 and 255 are decoded as 0 and 255.
    Equal frames, metadata and library versions give equal bytes (one encoder thread).

    Args:
        path: replaced atomically if it exists; call `lapwan.files.claim_output` first.
        frames_THWC: uint8 RGB.
        fps: frames a second; for a folder stored as metadata of the first frame.
        metadata: strings, stored as JSON in the MP4's `comment` tag, a PNG's `tEXt` chunk (a folder: its first frame),
            a GIF's comment or a WebP's XMP.
        crf: H.264 quality, 0 (lossless luma) to 51.

    Raises:
        UserError: an unknown suffix, several frames for a PNG, an odd size for MP4, no H.264 encoder.
        TypeError: frames that are not uint8 RGB.
    """
    check_video_path(path, len(frames_THWC), frames_THWC.shape[1:3])
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3:
        raise TypeError(f"frames must be uint8 [T, H, W, 3], got {frames_THWC.dtype} {list(frames_THWC.shape)}")
    metadata = metadata or {}
    match path.suffix.lower():
        case ".mp4":
            with atomic_file(path) as temporary:
                _encode_mp4(temporary, frames_THWC, fps, metadata, crf)
        case ".png":
            with atomic_file(path) as temporary:
                _save_png(temporary, frames_THWC[0], metadata)
        case ".gif" | ".webp" as kind:
            with atomic_file(path) as temporary:
                _save_animation(temporary, kind, frames_THWC, fps, metadata)
        case _:
            with atomic_folder(path) as folder:
                digits = max(5, len(str(len(frames_THWC) - 1)))
                for index, frame_HWC in enumerate(frames_THWC):
                    first = {**metadata, "fps": f"{fps:g}"} if index == 0 else {}
                    _save_png(folder / f"{index:0{digits}d}.png", frame_HWC, first)


def check_video_path(path: Path, frames: int, size: tuple[int, ...]) -> None:
    """Check, before any work, that `write_video` can write `frames` frames of `size` (H, W) to a path.

    Args:
        path: the file, or the folder of frames (a name without a suffix).
        frames: their number.
        size: height and width in pixels.

    Raises:
        UserError: an unknown suffix, no frames, several for a .png, or an odd height or width for an .mp4.
    """
    suffix = path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise UserError(f"cannot write {path}: videos are written as .mp4, .gif, .webp, one frame as .png, or a folder "
                        f"of frames (a name without a suffix), not {path.suffix!r}")
    if frames < 1:
        raise UserError(f"cannot write {path}: there are no frames")
    if suffix == ".png" and frames != 1:
        raise UserError(f"cannot write {frames} frames to {path}: a .png holds one; use .mp4, or a name without a "
                        "suffix for a folder of frames")
    height, width = size[0], size[1]
    if suffix == ".mp4" and (height % 2 or width % 2):
        raise UserError(f"cannot write {path}: H.264 (yuv420p) needs an even height and width, got {height}x{width}")


def _encode_mp4(path: Path, frames_THWC: np.ndarray, fps: float, metadata: dict[str, str], crf: int) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"cannot write {path.suffix} at {fps} frames a second: it must be above 0")
    if "libx264" not in av.codec.codecs_available:
        raise UserError("this PyAV has no H.264 encoder (libx264); install PyAV's own wheel: pip install av")
    # bitexact: no library version in the file, so that equal frames give equal bytes; faststart: the index comes first.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        if metadata:
            container.metadata[_KEY] = json.dumps(metadata, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # cpu-independent: the macroblock tree divides exactly; with x264's quick reciprocals equal frames have other
        # bytes now and then.
        stream.options = {"crf": str(crf), "preset": "medium", "x264-params": "cpu-independent=1"}
        context = stream.codec_context
        context.thread_count = 1
        context.color_range = _LIMITED
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        for frame_HWC in frames_THWC:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            yuv = rgb.reformat(format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709",
                               src_color_range="JPEG", dst_color_range="MPEG")
            container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))


def _save_animation(path: Path, kind: str, frames_THWC: np.ndarray, fps: float, metadata: dict[str, str]) -> None:
    """A looping animation. Durations are rounded to the format's unit so that their sum is right."""
    unit = 10 if kind == ".gif" else 1  # ms
    ends = np.round(np.arange(len(frames_THWC) + 1) * 1000 / fps / unit).astype(int) * unit
    text = json.dumps(metadata) if metadata else ""
    options = {"comment": text.encode()} if kind == ".gif" else {"xmp": text.encode(), "quality": 90, "method": 4}
    first, *rest = (Image.fromarray(frame) for frame in frames_THWC)
    first.save(path, save_all=True, append_images=rest, loop=0, duration=np.diff(ends).tolist(), **options)


def _save_png(path: Path, frame_HWC: np.ndarray, metadata: dict[str, str]) -> None:
    chunks = PngImagePlugin.PngInfo()
    if metadata:
        chunks.add_text(_KEY, json.dumps(metadata))  # ASCII escapes: a tEXt chunk is Latin-1
    Image.fromarray(frame_HWC).save(path, format="PNG", pnginfo=chunks)


def read_video_metadata(path: Path) -> dict[str, str]:
    """The metadata that `write_video` stored in a file or folder; {} for a video without it.

    Raises:
        UserError: the path is missing or is neither a video nor a PNG.
    """
    if not path.exists():
        raise UserError(f"no such video: {path}")
    if path.is_dir():
        first = min(path.glob("*.png"), default=None)
        if first is None:
            raise UserError(f"no PNG frames in the folder {path}")
        path = first
    try:
        if path.suffix.lower() in (".png", ".gif", ".webp"):
            with Image.open(path) as image:
                text = image.info.get("xmp" if path.suffix.lower() == ".webp" else _KEY, "")
        else:
            with av.open(str(path)) as container:
                text = container.metadata.get(_KEY, "")
    except (av.FFmpegError, UnidentifiedImageError) as error:
        raise UserError(f"cannot read {path}: not a video or PNG that can be opened ({error})") from error
    try:
        metadata = parse_json(text, path)
    except UserError:
        return {}  # a comment of another program
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
