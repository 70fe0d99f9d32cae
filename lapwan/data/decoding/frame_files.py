"""Folders of frames: their files in natural order, the numbers in their names, and the frames that are missing."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from lapwan.data.dropped_clips import BadClip
from lapwan.data.suffixes import IMAGE_SUFFIXES


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key in which 2 comes before 10: runs of digits count as numbers."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part)


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder of frames, in natural order of their names.

    Raises:
        BadClip: there are none.
    """
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES
                    and not file.name.startswith(".")), key=lambda file: (natural_key(file.stem), file.name))
    if not files:
        raise BadClip(f"the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def frame_number(name: str) -> int | None:
    """The last number of a frame file's name, by which frames are counted."""
    numbers = re.findall(r"\d+", Path(name).stem)
    return int(numbers[-1]) if numbers else None


def missing_frames(files: list[Path]) -> list[int]:
    """Numbers that are skipped in a numbered sequence whose other frames follow each other at an even distance."""
    numbers = [number for file in files if (number := frame_number(file.name)) is not None]
    if len(numbers) != len(files) or len(numbers) < 3:
        return []
    gaps = [after - before for before, after in itertools.pairwise(numbers)]
    usual = sorted(gaps)[len(gaps) // 2]
    if usual < 1 or min(gaps) < 1 or any(gap % usual for gap in gaps):
        return []
    return [number for before, after in itertools.pairwise(numbers)
            for number in range(before + usual, after, usual)]
