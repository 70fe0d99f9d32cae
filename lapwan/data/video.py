"""Decoding: a video, an image or a folder of images to upright RGB frames at the model's frame rate.

Time 0 is the first frame. Frame k at `fps` is the frame on display at k / fps, by timestamps, so a variable frame rate
is resampled evenly. No torch here: worker processes start fast.

How to add a container: its suffix in `suffixes.py`, if FFmpeg (PyAV) reads it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapwan.data.buckets import Crop
from lapwan.data.dropped_clips import BadClip
from lapwan.data.suffixes import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

_LATE = 0.0011  # seconds a timestamp may be late: containers round to milliseconds
_SEEK_AFTER = 2.0  # seconds; before that, decoding from the start is as cheap as a seek, and safer


@dataclass(frozen=True)
class VideoFacts:
    """Facts of a media file. `width`, `height`: upright pixels; `fps`: mean source rate (0 for an image);
    `frames`: source frames; `seconds`: duration; `origin`: the file's timestamp of its first frame."""

    width: int
    height: int
    fps: float
    frames: int
    seconds: float
    origin: float = 0.0

    @property
    def is_image(self) -> bool:
        """An image file, not a video of one frame."""
        return self.fps == 0

    def count_at(self, fps: float) -> int:
        """The number of frames the clip has at `fps`."""
        if self.is_image:
            return 1
        return max(1, int((self.seconds + 2 * self.late) * fps))

    @property
    def late(self) -> float:
        """Seconds that a frame's timestamp may be late."""
        return min(0.1 / self.fps, _LATE) if self.fps else 0.0


def probe(path: Path, fps: float, source_fps: float | None = None) -> VideoFacts:
    """Read a file's facts. Only the first frame is decoded; packets are counted.

    Args:
        fps: the model's rate, which a folder of images without `source_fps` is assumed to have.
        source_fps: the true rate, overriding the file's.

    Raises:
        BadClip: missing, unreadable, truncated, or without video.
    """
    if path.is_dir():
        images = frame_files(path)
        with _open_image(images[0]) as image:
            width, height = image.size
        rate = source_fps or fps
        return VideoFacts(width, height, rate, len(images), len(images) / rate)
    if not path.exists():
        raise BadClip("no such file")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        with _open_image(path) as image:
            return VideoFacts(image.width, image.height, fps=0.0, frames=1, seconds=0.0)
    return _probe_video(path, source_fps)


def _probe_video(path: Path, source_fps: float | None) -> VideoFacts:
    import av

    try:
        with _open(path) as container:
            stream = _video_stream(container)
            packets, times, skipped = _packet_times(container, stream)
            declared = stream.frames - skipped
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            container.seek(0)
            first = next(container.decode(stream), None)
    except (av.FFmpegError, OSError, EOFError) as error:
        raise BadClip(f"cannot be read as video ({_short(error)})") from None
    if first is None or packets == 0:
        raise BadClip("no frame can be decoded")
    if declared > packets + 1:
        raise BadClip(f"truncated: only {packets} of its {declared} frames are present")
    width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
    return _timed(width, height, packets, times, rate, source_fps)


def _open(path: Path) -> Any:
    """An open container; metadata that is not UTF-8 (GBK is common) does not fail."""
    import av

    return av.open(str(path), metadata_errors="replace")


def _video_stream(container: Any) -> Any:
    """The video stream, not a cover image that comes before it."""
    stream = container.streams.best("video")
    if stream is None:
        raise BadClip("the file has no video stream")
    return stream


def _packet_times(container: Any, stream: Any) -> tuple[int, list[float], int]:
    """(number of shown packets, times of those that have one in display order, number hidden by an edit list)."""
    packets, skipped = 0, 0
    times: list[float] = []
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.is_discard:
            skipped += 1
            continue
        packets += 1
        if packet.pts is not None and packet.time_base is not None:
            times.append(float(packet.pts * packet.time_base))
    return packets, sorted(times), skipped


def source_times(path: Path, facts: VideoFacts, fps: float, source_fps: float | None) -> list[float]:
    """The display time of each source frame, in seconds from the first; annotations refer to frames by number."""
    if facts.is_image:
        return [0.0]
    if path.is_file() and source_fps is None:
        import av

        try:
            with _open(path) as container:
                packets, times, _ = _packet_times(container, _video_stream(container))
        except (av.FFmpegError, OSError) as error:
            raise BadClip(f"cannot be read as video ({_short(error)})") from None
        if len(times) == packets:
            return [time - times[0] for time in times]
    return [index / facts.fps for index in range(facts.frames)]


def _timed(
    width: int, height: int, packets: int, times: list[float], rate: float, source_fps: float | None
) -> VideoFacts:
    if source_fps is not None:
        return VideoFacts(width, height, source_fps, packets, packets / source_fps, times[0] if times else 0.0)
    if len(times) == packets and packets > 1:
        gaps = [after - before for before, after in itertools.pairwise(times)]
        seconds = times[-1] - times[0] + statistics.median(gaps)
        if seconds > 0:
            return VideoFacts(width, height, packets / seconds, packets, seconds, times[0])
    if rate <= 0:
        raise BadClip("the file gives no frame rate; set source_fps")
    return VideoFacts(width, height, rate, packets, packets / rate, times[0] if times else 0.0)


def read_frames(
    path: Path, indices: Sequence[int], crop: Crop, fps: float, facts: VideoFacts, source_fps: float | None = None
) -> np.ndarray:
    """Frames `indices` (ascending, counted at `fps`) as uint8 [T, H, W, 3], resized and cropped by `crop`.

    Raises:
        BadClip: a frame is damaged or missing.
    """
    out = np.empty((len(indices), crop.bucket[1], crop.bucket[0], 3), np.uint8)
    times = [index / fps for index in indices]
    position, shown, shown_at = 0, None, 0.0
    for at, frame in _timed_frames(path, facts, times[0], source_fps):
        while shown is not None and position < len(times) and at > times[position] + facts.late:
            position = _store(out, position, shown, crop)
        if position == len(times):
            return out
        shown, shown_at = frame, at
    # The last frame stays on display for its own duration, and no longer.
    while shown is not None and position < len(times) and times[position] <= shown_at + 1.5 / (facts.fps or 1.0):
        position = _store(out, position, shown, crop)
    if position < len(times):
        raise BadClip(f"decoding ends at {shown_at:.2f} s, frame {indices[position]} "
                      f"({times[position]:.2f} s at {fps:g} fps) is missing")
    return out


def _store(out: np.ndarray, position: int, frame: Any, crop: Crop) -> int:
    out[position] = resize_and_crop(_upright(frame), crop)
    return position + 1


def _timed_frames(
    path: Path, facts: VideoFacts, start: float, source_fps: float | None
) -> Iterator[tuple[float, Any]]:
    """(seconds from the first frame, frame) in display order, from a key frame before `start` on."""
    if path.is_dir() or facts.is_image:
        files = frame_files(path) if path.is_dir() else [path]
        for index, file in enumerate(files):
            if facts.is_image or (index + 1) / facts.fps > start:
                with _open_image(file) as image:
                    yield (index / facts.fps if facts.fps else 0.0), image
        return
    import av

    try:
        with _open(path) as container:
            stream = _video_stream(container)
            stream.thread_type = "AUTO"
            use_timestamps = source_fps is None
            if use_timestamps and start > _SEEK_AFTER and stream.time_base:
                target = int((start + facts.origin - 0.5) / stream.time_base)
                container.seek(target, stream=stream, backward=True)
            for index, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise BadClip(f"frame {index} is damaged")
                timed = use_timestamps and frame.time is not None
                yield (frame.time - facts.origin if timed else index / facts.fps), frame
    except (av.FFmpegError, OSError, EOFError) as error:
        raise BadClip(f"decoding fails ({_short(error)})") from None


def _upright(frame: Any) -> Image.Image:
    """An RGB image as a player shows it: rotated by the metadata, grey repeated, alpha dropped."""
    from PIL import Image

    if isinstance(frame, Image.Image):
        return frame if frame.mode == "RGB" else frame.convert("RGB")
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels)


def resize_and_crop(image: Image.Image, crop: Crop) -> np.ndarray:
    """uint8 [H, W, 3]: resized with antialias (bicubic down, Lanczos up), then cropped."""
    from PIL import Image

    if image.size != crop.resized:
        larger = crop.resized[0] > image.width
        image = image.resize(crop.resized, Image.Resampling.LANCZOS if larger else Image.Resampling.BICUBIC)
    width, height = crop.bucket
    if crop.resized != crop.bucket:
        image = image.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    return np.asarray(image)


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder of frames, by name.

    Raises:
        BadClip: there are none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise BadClip(f"the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def rgb_image(path: Path) -> Image.Image:
    """An image as RGB, with its EXIF rotation applied.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read as an image.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _open_image(path: Path) -> Image.Image:
    try:
        return rgb_image(path)
    except FileNotFoundError:
        raise BadClip("no such file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadClip(f"{path.name} cannot be read as an image ({_short(error)})") from None


def _short(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0][:120] if str(text) else type(error).__name__
