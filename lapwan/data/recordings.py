"""Hours of video to clips of seconds, without decoding most of it and without re-encoding any.

A recording is sampled at its key frames as thumbnails of 64x36. With scenes, a large change of the colour histogram
between two samples is looked into frame by frame for a cut. Windows lie inside a scene; those that are black, or whose
samples are all alike (a paused picture), are left out. Written as parts of the recording, by start and duration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapwan.data.decoding.frame_stream import open_stream
from lapwan.data.decoding.images import short_reason
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import VideoFacts

_WIDTH, _HEIGHT = 64, 36
_STEP = 1.0  # seconds between samples, where there are as many key frames
_SPARSE = 15.0  # seconds without a key frame: then every frame is decoded
_BINS = 16
_SUSPICIOUS = 0.25  # share of the colour histogram that changes: look for a cut
_CERTAIN = 0.6  # a change as large is a new scene, even if it comes gradually
_CUT = 18.0  # levels: mean change of a thumbnail from one frame to the next in a cut
_ABRUPT = 4.0  # times the usual change from one frame to the next
_BLACK, _BRIGHTEST = 24.0, 48.0  # levels: mean, and 99th percentile, of a black picture
_STILL = 8  # levels: no part of a paused picture changes by more


@dataclass(frozen=True)
class Samples:
    """Thumbnails uint8 [N, 36, 64, 3] and their times in seconds from the first frame."""

    times: tuple[float, ...]
    thumbnails: np.ndarray


@dataclass(frozen=True)
class RecordingWindow:
    """`seconds` from `start` on, of scene number `scene`, counted from 0."""

    start: float
    seconds: float
    scene: int


@dataclass(frozen=True)
class SplitRule:
    """`seconds` of a window; `stride` between the starts of two that are considered, `every` at least between two that
    are kept; whether to split at scenes, and to keep black and still windows."""

    seconds: float
    stride: float
    every: float = 0.0
    scenes: bool = False
    keep_black: bool = False
    keep_still: bool = False


@dataclass(frozen=True)
class SplitResult:
    """The windows of a recording, its scenes as (start, end), and how many windows were left out and why."""

    windows: tuple[RecordingWindow, ...]
    scenes: tuple[tuple[float, float], ...]
    black: int
    still: int


def split_recording(path: Path, facts: VideoFacts, rule: SplitRule, advance: Callable[[float], None]) -> SplitResult:
    """The windows of a recording.

    Args:
        facts: of `probe`.
        advance: told of the time that has been sampled, in seconds.

    Raises:
        BadClip: it cannot be decoded.
    """
    import av

    try:
        samples = _samples(path, facts, advance)
        cuts = _cuts(path, facts, samples) if rule.scenes else []
    except (av.FFmpegError, OSError, EOFError) as error:
        raise BadClip(f"decoding fails ({short_reason(error)})") from None
    edges = [0.0, *cuts, facts.seconds]
    scenes = tuple((start, end) for start, end in itertools.pairwise(edges) if end > start)
    return _windows(samples, scenes, rule, 1 / facts.fps)


def _samples(path: Path, facts: VideoFacts, advance: Callable[[float], None]) -> Samples:
    times: list[float] = []
    thumbnails: list[np.ndarray] = []
    for at, thumbnail in _key_frames(path, facts):
        advance(at)
        times.append(at)
        thumbnails.append(thumbnail)
    gaps = [after - before for before, after in itertools.pairwise([*times, facts.seconds])]
    if max(gaps, default=facts.seconds) > _SPARSE:
        pairs = list(_thinned(_all_frames(path, facts, 0.0, facts.seconds, advance)))
        times, thumbnails = [at for at, _ in pairs], [thumbnail for _, thumbnail in pairs]
    if not times:
        raise BadClip("no frame can be decoded")
    return Samples(tuple(times), np.stack(thumbnails))


def _thinned(frames: Iterator[tuple[float, np.ndarray]]) -> Iterator[tuple[float, np.ndarray]]:
    last = -_STEP
    for at, thumbnail in frames:
        if at >= last + _STEP:
            yield at, thumbnail
            last = at


def _key_frames(path: Path, facts: VideoFacts) -> Iterator[tuple[float, np.ndarray]]:
    """Key frames at least a second apart; other packets are not decoded."""
    with open_stream(path) as (container, stream):
        base, last = float(stream.time_base or 1), -_STEP
        for packet in container.demux(stream):
            time = packet.pts if packet.pts is not None else packet.dts
            at = None if time is None else time * base - facts.origin
            flushing = packet.size == 0
            if not flushing and (not packet.is_keyframe or packet.is_discard or at is None or at < last + _STEP):
                continue
            last = last if at is None or flushing else at
            for frame in packet.decode():
                if frame.time is not None and not frame.is_corrupt:
                    yield frame.time - facts.origin, _thumbnail(frame)


def _all_frames(
    path: Path, facts: VideoFacts, start: float, end: float, advance: Callable[[float], None] | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame from the key frame before `start` to `end`."""
    with open_stream(path) as (container, stream):
        stream.codec_context.options = {"skip_loop_filter": "all"}  # thumbnails do not show it
        if start > 0 and facts.seekable:
            container.seek(int((start + facts.origin) / (stream.time_base or 1)), stream=stream, backward=True)
        for number, frame in enumerate(container.decode(stream)):
            at = frame.time - facts.origin if frame.time is not None else number / facts.fps
            if at > end:
                return
            if advance is not None:
                advance(at)
            if not frame.is_corrupt:
                yield at, _thumbnail(frame)


def _thumbnail(frame: Any) -> np.ndarray:
    pixels: np.ndarray = frame.to_ndarray(format="rgb24", width=_WIDTH, height=_HEIGHT, interpolation="AREA")
    return pixels


def _histogram(thumbnail: np.ndarray) -> np.ndarray:
    """Share of pixels by level, of the three channels: [3, 16]."""
    levels = thumbnail.reshape(-1, 3) // (256 // _BINS)
    return np.stack([np.bincount(levels[:, channel], minlength=_BINS) for channel in range(3)]) / len(levels)


def histogram_change(before: np.ndarray, after: np.ndarray) -> float:
    """Σ|h − h'| / 2 over the levels, mean over R, G, B: the share of pixels that changed level, whatever moved."""
    return float(np.abs(_histogram(before) - _histogram(after)).sum(axis=1).mean() / 2)


def _cuts(path: Path, facts: VideoFacts, samples: Samples) -> list[float]:
    """Times of the first frames of new scenes."""
    cuts = []
    pictures = samples.thumbnails
    for number, (start, end) in enumerate(itertools.pairwise(samples.times)):
        change = histogram_change(pictures[number], pictures[number + 1])
        if change <= _SUSPICIOUS:
            continue
        frames = [(at, picture) for at, picture in _all_frames(path, facts, start, end) if at >= start - facts.late]
        if (cut := abrupt_change(frames, certain=change > _CERTAIN)) is not None:
            cuts.append(cut)
    return cuts


def abrupt_change(frames: Sequence[tuple[float, np.ndarray]], certain: bool = False) -> float | None:
    """The time of the frame that differs most from the one before it; None if it differs little, or no more than
    others do.

    Args:
        certain: there is a new scene; the question is only where.
    """
    changes = [float(np.abs(after.astype(np.int16) - before).mean())
               for (_, before), (_, after) in itertools.pairwise(frames)]
    if not changes:
        return None
    largest = int(np.argmax(changes))
    usual = float(np.median(changes))
    sudden = changes[largest] > _CUT and changes[largest] > _ABRUPT * max(usual, 1.0)
    return frames[largest + 1][0] if sudden or certain else None


def _windows(
    samples: Samples, scenes: Sequence[tuple[float, float]], rule: SplitRule, frame: float
) -> SplitResult:
    windows: list[RecordingWindow] = []
    black = still = 0
    for number, (begin, end) in enumerate(scenes):
        # A window may end with the last frame's own display, up to half a frame by rounding.
        for step in range(int(max(0.0, end - begin - rule.seconds + frame / 2) / rule.stride) + 1):
            start = begin + step * rule.stride
            if end - start < rule.seconds - frame / 2:
                break
            if windows and start < windows[-1].start + rule.every - 1e-6:
                continue
            pictures = _pictures(samples, start, start + rule.seconds, begin, end)
            if not rule.keep_black and is_black(pictures):
                black += 1
            elif not rule.keep_still and is_still(pictures):
                still += 1
            else:
                windows.append(RecordingWindow(start, rule.seconds, number))
    return SplitResult(tuple(windows), tuple(scenes), black, still)


def _pictures(samples: Samples, start: float, end: float, begin: float, stop: float) -> np.ndarray:
    """The samples inside a window and the nearest on either side of it, of the same scene."""
    times = np.array(samples.times)
    first = max(int(np.searchsorted(times, start, "right")) - 1, int(np.searchsorted(times, begin, "left")), 0)
    last = min(int(np.searchsorted(times, end, "left")), int(np.searchsorted(times, stop, "left")) - 1)
    return samples.thumbnails[first : max(first, last) + 1]


def is_black(pictures_NHW3: np.ndarray) -> bool:
    """Whether at least half of the pictures are black."""
    flat = pictures_NHW3.reshape(len(pictures_NHW3), -1)
    dark = [picture.mean() < _BLACK and np.percentile(picture, 99) < _BRIGHTEST for picture in flat]
    return bool(dark) and 2 * sum(dark) >= len(dark)


def is_still(pictures_NHW3: np.ndarray) -> bool:
    """Whether two or more pictures are alike in every part."""
    if len(pictures_NHW3) < 2:
        return False
    change = pictures_NHW3.max(axis=0).astype(np.int16) - pictures_NHW3.min(axis=0)
    return bool(change.max() < _STILL)
