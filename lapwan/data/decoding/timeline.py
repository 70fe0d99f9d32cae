"""Display times of a video's frames, from its packets: gaps, missing timestamps and joined recordings.

Time 0 is the first frame. A packet without a timestamp follows the frame before it by the usual gap; timestamps that
jump back, or in broadcast containers forward by more than ten seconds, as where recordings were joined, go on there.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_JUMP = 10.0  # seconds forward that are a break in MPEG streams; other containers may hold a frame as long
_BACK = 0.5  # seconds back that are a break: decoding times never go back otherwise
_BROKEN_UP = ("mpegts", "mpeg", "mpegvideo", "vob")  # FFmpeg's names of containers whose times may start anew


@dataclass(frozen=True)
class PacketTime:
    """Presentation and decoding time of a packet in seconds, None where the container gives none."""

    shown: float | None
    decoded: float | None


@dataclass(frozen=True)
class Timeline:
    """Times of the frames of a file.

    `frames`: number of shown frames; `times`: seconds from the first, None if some have no timestamp; `seconds`: with
    the last frame's own duration, 0 if unknown; `origin`: the file's timestamp of its first frame; `seekable`: a
    timestamp names one frame, so that reading may begin at it.
    """

    frames: int
    times: tuple[float, ...] | None
    seconds: float
    origin: float
    seekable: bool


def make_timeline(packets: Sequence[PacketTime], container: str, rate: float) -> Timeline:
    """The timeline of packets in their order in the file.

    Args:
        container: FFmpeg's name of the format.
        rate: frames a second by the file's header, 0 if it has none.
    """
    segments = _segments(packets, container)
    known = [sorted(packet.shown for packet in segment if packet.shown is not None) for segment in segments]
    gaps = [after - before for times in known for before, after in itertools.pairwise(times)]
    step = statistics.median(gaps) if gaps else 0.0
    if step <= 0:
        step = 1 / rate if rate > 0 else 0.0
    seconds = sum(max(times[-1] - times[0] + step, 0.0) for times in known if times)
    leading = next((number for number, packet in enumerate(packets) if packet.shown is not None), len(packets))
    complete = all(packet.shown is not None for packet in packets)
    origin = known[0][0] - leading * step if known and known[0] and leading < len(packets) else 0.0
    if not complete:
        # Frames without a timestamp between two that have one are covered already.
        seconds = seconds + leading * step if leading < len(packets) and leading else len(packets) * step
    times: list[float] = []
    if complete:
        for segment in known:
            start = times[-1] + step if times else 0.0
            times += [start + time - segment[0] for time in segment]
    dated = all(packet.shown is not None or packet.decoded is not None for packet in packets)
    return Timeline(len(packets), tuple(times) if complete else None, seconds if gaps else 0.0, origin,
                    len(segments) == 1 and dated)


def _segments(packets: Sequence[PacketTime], container: str) -> list[list[PacketTime]]:
    """Packets between the breaks of the file's times."""
    broken_up = bool(set(container.split(",")) & set(_BROKEN_UP))
    segments: list[list[PacketTime]] = []
    last: float | None = None
    for packet in packets:
        time = packet.decoded if packet.decoded is not None else packet.shown
        breaks = last is not None and time is not None and (
            time < last - _BACK or (broken_up and time > last + _JUMP))
        if not segments or breaks:
            segments.append([])
        segments[-1].append(packet)
        last = time if time is not None else last
    return segments


class FrameClock:
    """Seconds from the first frame for frames in display order, by the rules of `Timeline`.

    Args:
        origin: the file's timestamp of its first frame.
        step: seconds from a frame to the next where timestamps are missing.
        breaks: the file's times have breaks, which go on at the usual gap.
    """

    def __init__(self, origin: float, step: float, breaks: bool) -> None:
        self._offset, self._step, self._breaks = origin, step, breaks
        self._last: float | None = None

    def at(self, frame: Any) -> float:
        """The time of the next frame; `frame.time` is its timestamp in seconds, or None."""
        after = 0.0 if self._last is None else self._last + self._step
        time = after if frame.time is None else frame.time - self._offset
        if self._breaks and self._last is not None and frame.time is not None and (
                time < self._last or time > self._last + _JUMP):
            self._offset += time - after
            time = after
        self._last = time
        return time
