"""Decoding: a video, an image or a folder of images to upright RGB frames at the model's frame rate.

Time 0 is the first frame. Frame k at `fps` is the frame on display at k / fps, by timestamps, so a variable frame rate
is resampled evenly. Which time a frame has and its colours: `decoding/`. No torch here, save
for tone-mapping HDR: worker processes start fast.

How to add a container: its suffix in `suffixes.py`, if FFmpeg (PyAV) reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapwan.data.buckets import Crop
from lapwan.data.decoding.frame_files import frame_files, missing_frames
from lapwan.data.decoding.frame_stream import frames_from_seek, frames_from_start, open_container, video_stream
from lapwan.data.decoding.images import (
    animation,
    image_traits,
    open_frame,
    short_reason,
)
from lapwan.data.decoding.pixels import (
    ReadOptions,
    deinterlaced,
    display_size,
    file_traits,
    pixel_aspect,
    rgb_frame,
    treatment_of,
    turns_sideways,
)
from lapwan.data.decoding.timeline import PacketTime, Timeline, make_timeline
from lapwan.data.dropped_clips import BadClip
from lapwan.data.suffixes import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

_LATE = 0.0011  # seconds a timestamp may be late: containers round to milliseconds


@dataclass(frozen=True)
class VideoFacts:
    """Facts of a media file, or of a part of it.

    `width`, `height`: upright, with square pixels, `stored_width`, `stored_height` upright as stored (0: the same);
    `fps`: mean source rate (0 for an image); `frames`: source frames; `seconds`: duration; `origin`: the file's
    timestamp of its first frame; `begin`: seconds from there at which the part begins; `traits`: what the file is
    (`file_traits`), None if an older version has not looked; `treatment`: what is done to its pixels; `seekable`:
    reading may begin at a timestamp.
    """

    width: int
    height: int
    fps: float
    frames: int
    seconds: float
    origin: float = 0.0
    begin: float = 0.0
    stored_width: int = 0
    stored_height: int = 0
    traits: str | None = None
    treatment: str = ""
    seekable: bool = True

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


    @property
    def stored(self) -> tuple[int, int]:
        """(width, height) upright, as the pixels are stored."""
        return self.stored_width or self.width, self.stored_height or self.height

    def read_with(self, options: ReadOptions) -> VideoFacts:
        """These facts with the treatment that options ask for.

        Raises:
            BadClip: an HDR video that is not to be tone-mapped.
        """
        square = self.stored == (self.width, self.height)
        video = not self.is_image and "animated" not in (self.traits or "")
        return replace(self, treatment=treatment_of(self.traits or "", square, options, video))

    def part(self, start: float, duration: float | None) -> VideoFacts:
        """The facts of `duration` seconds from `start` on; None: to the end.

        Raises:
            BadClip: the part begins at or after the end.
        """
        rest = self.seconds - start
        if self.is_image or rest <= self.late:
            raise BadClip(f"start = {start:g} s is not before its end at {self.seconds:.2f} s")
        seconds = rest if duration is None else min(duration, rest)
        return replace(self, begin=start, seconds=seconds, frames=max(1, round(seconds * self.fps)))


def probe(
    path: Path, fps: float, source_fps: float | None = None, options: ReadOptions | None = None, still: bool = False
) -> VideoFacts:
    """Read a file's facts. Only the first frame is decoded; packets are counted.

    Args:
        fps: the model's rate, which a folder of images without `source_fps` is assumed to have.
        source_fps: the true rate, overriding the file's.
        options: what to do with interlaced and HDR material and with transparency.
        still: of an animated picture only its first frame counts.

    Raises:
        BadClip: missing, unreadable, truncated, without video, too large, or HDR that is to be refused.
    """
    return _facts(path, fps, source_fps, still).read_with(options or ReadOptions())


def _facts(path: Path, fps: float, source_fps: float | None, still: bool) -> VideoFacts:
    if path.is_dir():
        images = frame_files(path)
        width, height = open_frame(images[0]).size
        rate = source_fps or fps
        gaps = missing_frames(images)
        words = [image_traits(images[0]), f"{len(gaps)} missing from {gaps[0]} on" if gaps else ""]
        return VideoFacts(width, height, rate, len(images), len(images) / rate, traits=",".join(filter(None, words)))
    if not path.exists():
        raise BadClip("no such file")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        traits = image_traits(path)
        if traits == "animated" and not still:
            return _animation_facts(path, source_fps)
        width, height = open_frame(path).size
        return VideoFacts(width, height, fps=0.0, frames=1, seconds=0.0, traits=traits.replace("animated", ""))
    stat = path.stat()
    return _probe_video(path, source_fps, stat.st_size, stat.st_mtime_ns)


def _animation_facts(path: Path, source_fps: float | None) -> VideoFacts:
    try:
        frames = [(shown, image.size) for shown, image in animation(path)]
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadClip(f"{path.name} cannot be read as an image ({short_reason(error)})") from None
    seconds = frames[-1][0].at + frames[-1][0].seconds
    rate = source_fps or len(frames) / seconds
    width, height = frames[0][1]
    return VideoFacts(width, height, rate, len(frames), len(frames) / rate, traits="animated", seekable=False)


@functools.lru_cache(maxsize=2)  # the parts of a recording follow each other
def _probe_video(path: Path, source_fps: float | None, size: int, changed: int) -> VideoFacts:
    """`size`, `changed`: of the file, so that another one under its name is read anew."""
    import av

    try:
        with open_container(path) as container:
            stream = video_stream(container)
            timeline, skipped = _timeline(container, stream)
            declared = stream.frames - skipped
            rate = float(stream.average_rate or stream.guessed_rate or 0)
        with open_container(path) as container:  # opened anew: elementary streams cannot seek
            stream = video_stream(container)
            first = next(container.decode(stream), None)
            if first is None or timeline.frames == 0:
                raise BadClip("no frame can be decoded")
            aspect, traits = pixel_aspect(stream, first), file_traits(stream, first)
    except (av.FFmpegError, OSError, EOFError) as error:
        raise BadClip(f"cannot be read as video ({short_reason(error)})") from None
    if declared > timeline.frames + 1:
        raise BadClip(f"truncated: only {timeline.frames} of its {declared} frames are present")
    stored, shown = (first.width, first.height), display_size(first.width, first.height, aspect)
    if turns_sideways(first):
        stored, shown = stored[::-1], shown[::-1]
    facts = VideoFacts(*shown, 0.0, timeline.frames, 0.0, timeline.origin, 0.0, *stored, traits,
                       seekable=timeline.seekable)
    return _timed(facts, timeline, rate, source_fps)


def _timeline(container: Any, stream: Any) -> tuple[Timeline, int]:
    """(the timeline of the shown packets, the number of those that an edit list hides)."""
    skipped = 0
    packets: list[PacketTime] = []
    base = float(stream.time_base or 1)
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.is_discard:
            skipped += 1
            continue
        packets.append(PacketTime(None if packet.pts is None else packet.pts * base,
                                  None if packet.dts is None else packet.dts * base))
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    return make_timeline(packets, container.format.name, rate), skipped


def source_times(path: Path, facts: VideoFacts, fps: float, source_fps: float | None) -> Sequence[float]:
    """The display time of each source frame, in seconds from the first; annotations refer to frames by number."""
    if facts.is_image:
        return (0.0,)
    if path.is_file() and source_fps is None:
        stat = path.stat()
        times = _file_times(path, facts.traits or "", stat.st_size, stat.st_mtime_ns)
        if times is not None:
            return times
    return [index / facts.fps for index in range(round((facts.begin + facts.seconds) * facts.fps) + 1)]


@functools.lru_cache(maxsize=2)
def _file_times(path: Path, traits: str, size: int, changed: int) -> tuple[float, ...] | None:
    import av

    if "animated" in traits:
        return tuple(shown.at for shown, _ in animation(path))
    try:
        with open_container(path) as container:
            return _timeline(container, video_stream(container))[0].times
    except (av.FFmpegError, OSError) as error:
        raise BadClip(f"cannot be read as video ({short_reason(error)})") from None


def _timed(facts: VideoFacts, timeline: Timeline, rate: float, source_fps: float | None) -> VideoFacts:
    """The facts with rate and duration: by `source_fps`, else by the timestamps, else by the header's rate."""
    frames = timeline.frames
    if source_fps is None and frames > 1 and timeline.seconds > 0:
        return replace(facts, fps=frames / timeline.seconds, seconds=timeline.seconds)
    rate = source_fps or rate
    if rate <= 0:
        raise BadClip("the file gives no frame rate; set source_fps")
    return replace(facts, fps=rate, seconds=frames / rate)


def read_frames(
    path: Path, indices: Sequence[int], crop: Crop, fps: float, facts: VideoFacts, source_fps: float | None = None
) -> np.ndarray:
    """Frames `indices` (ascending, counted at `fps`) as uint8 [T, H, W, 3], resized and cropped by `crop`.

    Raises:
        BadClip: a frame is damaged or missing.
    """
    out = np.empty((len(indices), crop.bucket[1], crop.bucket[0], 3), np.uint8)
    times = [facts.begin + index / fps for index in indices]
    position, shown, shown_at = 0, None, 0.0
    for at, frame in _timed_frames(path, facts, times[0], source_fps):
        while shown is not None and position < len(times) and at > times[position] + facts.late:
            position = _store(out, position, shown, crop, facts)
        if position == len(times):
            return out
        shown, shown_at = frame, at
    # The last frame stays on display for its own duration, and no longer.
    while shown is not None and position < len(times) and times[position] <= shown_at + 1.5 / (facts.fps or 1.0):
        position = _store(out, position, shown, crop, facts)
    if position < len(times):
        raise BadClip(f"decoding ends at {shown_at:.2f} s, frame {indices[position]} "
                      f"({times[position]:.2f} s at {fps:g} fps) is missing")
    return out


def _store(out: np.ndarray, position: int, frame: Any, crop: Crop, facts: VideoFacts) -> int:
    out[position] = resize_and_crop(rgb_frame(frame, facts.treatment) if hasattr(frame, "planes") else frame, crop)
    return position + 1


def _timed_frames(
    path: Path, facts: VideoFacts, start: float, source_fps: float | None
) -> Iterator[tuple[float, Any]]:
    """(seconds from the first frame, frame) in display order, from a key frame before `start` on."""
    background = "white" if "over white" in facts.treatment else "black"
    if path.is_dir() or facts.is_image:
        files = frame_files(path) if path.is_dir() else [path]
        for index, file in enumerate(files):
            if facts.is_image or (index + 1) / facts.fps > start:
                yield (index / facts.fps if facts.fps else 0.0), open_frame(file, background)
        return
    if "animated" in (facts.traits or ""):
        for index, (shown, image) in enumerate(animation(path, background)):
            yield (shown.at if source_fps is None else index / source_fps), image
        return
    import av

    try:
        frames = (frames_from_seek(path, facts, start) if source_fps is None else
                  frames_from_start(path, facts, source_fps))
        yield from deinterlaced(frames) if "yadif" in facts.treatment else frames
    except (av.FFmpegError, OSError, EOFError) as error:
        raise BadClip(f"decoding fails ({short_reason(error)})") from None


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
