"""Why a clip was dropped from a cache: `BadClip` is raised with the reason, a `DroppedClip` records it.

A dropped clip is listed by `lapwan cache` and in `lapwan_report.json`; the other clips are cached. The reasons:

- no caption, or no file where `video_path` points: reading the dataset (`musubi_dataset.py`, `clips.py`);
- unreadable, without a video stream, or truncated: `probe` in `video.py`;
- shorter than the shortest target: `caching/plan.py`;
- a damaged or missing frame while decoding: `read_frames` in `video.py`; a crash of the decoder: `caching/decoder.py`;
- a mask that cannot be read (`regions.py`), or features that are not finite: `caching/encode.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lapwan.errors import UserError

_LISTED = 20


class BadClip(UserError):
    """A clip cannot be used. The message is the reason, without the clip's name."""


@dataclass(frozen=True)
class DroppedClip:
    """A clip that is left out, and why. `name` is for messages; `stem` is that of its cache files, if it has one."""

    name: str
    reason: str
    stem: str | None = None


def dropped_lines(drops: Sequence[DroppedClip]) -> list[str]:
    """One line per dropped clip, at most 20, and the number of the others."""
    lines = [f"  dropped: {drop.name}: {drop.reason}" for drop in drops[:_LISTED]]
    if len(drops) > _LISTED:
        lines.append(f"  dropped: {len(drops) - _LISTED} more")
    return lines
