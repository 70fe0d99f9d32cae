"""Clips that are the same file twice, or look the same: they are drawn twice, and leak from training into validation.

Equal files are told by size, then SHA-256. Clips that look the same: the difference hash (64 bits: whether a pixel of
the 9x8 grey picture is brighter than its right neighbour) of three frames, compared clip by clip.

Source: N. Krawetz, "Kind of Like That" (2013), for the difference hash.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lapwan.data.suffixes import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import av
    import numpy as np

_AT = (0.1, 0.5, 0.9)  # of the clip's length
_NEAR = 6  # bits of 64 that may differ in each frame; unrelated pictures differ in 32 on average
_FLAT = 3.0  # grey levels of standard deviation below which a frame is black or fog and says nothing


def same_files(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files with equal bytes, in the order of `paths`; a path that occurs twice is one file."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        try:
            if path.is_file():
                by_size[path.stat().st_size].append(path)
        except OSError:
            continue
    groups: dict[tuple[int, str], list[Path]] = defaultdict(list)
    for size, same in by_size.items():
        if len(same) > 1 and size:
            for path in same:
                groups[size, _digest(path)].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return str(path)  # equal to no other


def look_alikes(paths: Iterable[Path], advance: Callable[[], None] = lambda: None) -> list[list[Path]]:
    """Groups of clips that look the same: each as another of its group does, in the order of `paths`.

    Args:
        advance: called after each clip, for a progress bar.
    """
    import numpy as np

    clips = list(dict.fromkeys(paths))

    def hashed(path: Path) -> list[int] | None:
        hashes = frame_hashes(path)
        advance()
        return hashes

    with ThreadPoolExecutor(os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count()) as pool:
        hashes = list(pool.map(hashed, clips))
    usable = [(path, values) for path, values in zip(clips, hashes, strict=True) if values is not None]
    if len(usable) < 2:
        return []
    table_NF = np.array([values for _, values in usable], dtype=np.uint64)
    group = list(range(len(usable)))
    for at in range(len(usable) - 1):
        differing_N = np.bitwise_count(table_NF[at + 1:] ^ table_NF[at]).max(axis=1)
        for other in np.flatnonzero(differing_N <= _NEAR) + at + 1:
            if group[other] != group[at]:
                joined, kept = sorted((group[other], group[at]), reverse=True)
                group = [kept if number == joined else number for number in group]
    members: dict[int, list[Path]] = defaultdict(list)
    for (path, _), number in zip(usable, group, strict=True):
        members[number].append(path)
    return [same for same in members.values() if len(same) > 1]


def frame_hashes(path: Path) -> list[int] | None:
    """The difference hashes of three frames of a clip, three times that of an image; None if there is nothing to tell.
    """
    import av
    import numpy as np
    from PIL import Image

    try:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(path) as image:
                grey = [np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)] * len(_AT)
        else:
            grey = [np.asarray(frame.to_image().convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
                    for frame in _frames(path)]
    except (OSError, ValueError, av.FFmpegError, Image.DecompressionBombError):
        return None
    if len(grey) < len(_AT) or all(picture.std() < _FLAT for picture in grey):
        return None
    return [_difference_hash(picture) for picture in grey]


def _difference_hash(grey_HW: np.ndarray) -> int:
    brighter_HW = grey_HW[:, :-1] > grey_HW[:, 1:]
    return sum(1 << at for at, bit in enumerate(brighter_HW.flat) if bit)


def _frames(path: Path) -> list[av.VideoFrame]:
    """The frames at 10, 50 and 90 % of a video's length, by their times; decoding goes from key frame to frame."""
    import av

    frames: list[av.VideoFrame] = []
    with av.open(str(path)) as container:
        if not container.streams.video:
            return []
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        length = float(container.duration or 0) / av.time_base
        begin = float(container.start_time or 0) / av.time_base
        for share in _AT:
            time = begin + share * length
            container.seek(int(time * av.time_base))
            frame = None
            for frame in container.decode(stream):
                if frame.time is None or frame.time >= time - 0.5 / float(stream.average_rate or 25):
                    break
            if frame is not None:
                frames.append(frame)
    return frames
