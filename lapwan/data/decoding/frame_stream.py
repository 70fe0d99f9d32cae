"""Decoded frames of a video file with their times, from the start or from a seek that leads to the right frame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapwan.data.decoding.images import check_pixels, largest_pixels
from lapwan.data.decoding.timeline import FrameClock
from lapwan.data.dropped_clips import BadClip

if TYPE_CHECKING:
    from lapwan.data.video import VideoFacts

_SEEK_AFTER = 2.0  # seconds; before that, decoding from the start is as cheap as a seek, and safer
_SEEK_BEFORE = (0.5, 10.0)  # seconds before the frame wanted: a container's index may lead behind it


def open_container(path: Path) -> Any:
    """An open container; metadata that is not UTF-8 (GBK is common) does not fail, a frame of absurd size does."""
    import av

    # FFmpeg's own limit, for frames of which the header does not tell the size, is far from the one that is explained.
    limit = max(4 * largest_pixels(), 2**29)
    return av.open(str(path), metadata_errors="replace", options={"max_pixels": str(limit)})


def video_stream(container: Any) -> Any:
    """The video stream, not a cover image that comes before it.

    Raises:
        BadClip: none, of an unknown codec, or of an absurd size.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise BadClip("the file has no video stream")
    if stream.codec_context is None:
        raise BadClip("its video codec is unknown to this FFmpeg")
    check_pixels(stream.codec_context.width, stream.codec_context.height)
    return stream


def _intact(frame: Any, index: int) -> Any:
    if frame.is_corrupt:
        raise BadClip(f"frame {index} is damaged")
    return frame


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file, decoded on all cores."""
    with open_container(path) as container:
        yield container, _threaded(container)


def frames_from_start(
    path: Path, facts: VideoFacts, source_fps: float | None = None
) -> Iterator[tuple[float, Any]]:
    """All frames with their times in seconds.

    Args:
        source_fps: times are counted at this rate, whatever the file says.

    Yields:
        (time, frame of PyAV).
    """
    clock = FrameClock(facts.origin, 1 / facts.fps, breaks=not facts.seekable)
    with open_container(path) as container:
        for index, frame in enumerate(container.decode(_threaded(container))):
            yield clock.at(frame) if source_fps is None else index / source_fps, _intact(frame, index)


def frames_from_seek(path: Path, facts: VideoFacts, start: float) -> Iterator[tuple[float, Any]]:
    """Frames from at or before `start` on. A seek that leads behind it is tried from farther back, then given up.

    Args:
        start: seconds from the first frame.

    Yields:
        (time, frame of PyAV).
    """
    for before in _SEEK_BEFORE if start > _SEEK_AFTER and facts.seekable else ():
        with open_container(path) as container:
            stream = _threaded(container)
            frames = _sought(container, stream, facts, start, max(0.0, start - before) + facts.origin)
            first = next(frames, None)
            if first is not None and first[0] <= start + facts.late:
                yield first
                yield from frames
                return
    yield from frames_from_start(path, facts)


def _threaded(container: Any) -> Any:
    stream = video_stream(container)
    stream.thread_type = "AUTO"
    return stream


def _sought(
    container: Any, stream: Any, facts: VideoFacts, start: float, timestamp: float
) -> Iterator[tuple[float, Any]]:
    """Frames from the key frame before a timestamp on; none where the container cannot seek. Frames before `start`
    that lack what they are predicted from are left out."""
    import av

    try:
        container.seek(int(timestamp / (stream.time_base or 1)), stream=stream, backward=True)
    except av.FFmpegError:
        return
    clock = FrameClock(facts.origin, 1 / facts.fps, breaks=False)
    for index, frame in enumerate(container.decode(stream)):
        if index == 0 and frame.time is None:
            return
        at = clock.at(frame)
        if not (frame.is_corrupt and at < start):
            yield at, _intact(frame, index)
