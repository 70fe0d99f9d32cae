"""The clips of a dataset, resolved to files with captions, labels and regions.

A line that cannot be used is left out, with the reason; only if no line can be used is that an error.
How to add a field: `lapwan label` copies unknown fields unchanged and in order, so nothing to do for that; a field that
caching uses is read in `_source_clip`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lapwan.data.annotations import RoiEntry, RoiUnits, read_roi
from lapwan.data.clip_file import MEDIA_KEYS, Clip, encodable, read_clips
from lapwan.data.dropped_clips import DroppedClip
from lapwan.data.frame_extraction import Extraction
from lapwan.data.text_encoding import AUTO
from lapwan.errors import UserError
from lapwan.files import expand_user

_LONGEST_SHOWN = 300
PATH_KEYS = (*MEDIA_KEYS, "mask_path", "roi_path")


def resolve_video(path: str | Path, jsonl: Path) -> Path:
    """The file that a path in a JSONL refers to: absolute, else beside the JSONL, else in the working directory.

    Raises:
        UserError: no such file (with the paths tried), or two different files match.
    """
    given = expand_user(path)
    if (existing := find_path(given, jsonl)) is not None:
        return existing
    shown = encodable(str(given))
    if given.is_absolute() or len(shown) > _LONGEST_SHOWN:
        raise UserError(f"no such file: {shown[:_LONGEST_SHOWN]}")
    beside, here = jsonl.absolute().parent / shown, Path.cwd() / shown
    tried = f"{beside} and {here}" if beside != here else f"{beside}"
    raise UserError(f"no such file: {shown}; looked for {tried}")


def find_path(given: Path, source: Path) -> Path | None:
    """What a path written in a file `source` refers to: absolute, else beside `source`, else in the working directory.

    Returns:
        None if there is nothing.

    Raises:
        UserError: both are there, and differ.
    """
    given = expand_user(given)
    beside, here = source.absolute().parent / given, Path.cwd() / given
    existing = [candidate for candidate in (beside, here) if _exists(candidate)]
    if len(existing) == 2 and not beside.samefile(here):
        raise UserError(f"'{given}' is ambiguous: both {beside} and {here} exist; write the absolute path")
    return existing[0] if existing else None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than the file system allows, NUL, half a character
        return False


def empty_split(source: object, split: str | None, splits: Iterable[str | None], advice: str) -> UserError:
    """The error of a split without clips; `splits` are those that there are."""
    available = ", ".join(sorted(map(str, splits)))
    return UserError(f"{source} has no clips of split '{split}' (it has: {available}); {advice}")


def relocated(data: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """The fields of a line moved from a JSONL in folder `source` to one in `target`: its paths lead to the same files.

    Only relative paths that exist beside the old file change; the order of the fields is kept.
    """
    out = dict(data)
    for key in PATH_KEYS:
        value = data.get(key)
        if isinstance(value, str) and not Path(value).is_absolute() and _exists(source / value):
            out[key] = Path(os.path.relpath(source / value, target)).as_posix()
    return out


@dataclass(frozen=True)
class SourceClip:
    """A clip of a dataset, resolved to its file. `name` is for messages; `labels` are CachedItem's label fields.

    `start`, `duration` in seconds: a part of a recording. `fps`: of a folder of frames. `still`: an animated picture
    counts as its first frame.
    """

    path: Path
    name: str
    caption: str
    labels: Mapping[str, Any] = field(default_factory=dict)
    roi: tuple[RoiEntry, ...] = ()
    mask: Path | None = None
    split: str | None = None
    source: str | None = None
    start: float | None = None
    duration: float | None = None
    fps: float | None = None
    still: bool = False

    @property
    def stem(self) -> str:
        """The stem of its cache files, before it is made unique: that of its file, with the start of a part in ms."""
        return self.path.stem if self.start is None else f"{self.path.stem}_{round(self.start * 1000):09d}"

    @property
    def key(self) -> str:
        """The file, and of a part of a recording its times as in a media fragment URI: unique in a dataset."""
        if self.start is None:
            return str(self.path)
        end = "" if self.duration is None else f",{self.start + self.duration:g}"
        return f"{self.path}#t={self.start:g}{end}"


@dataclass(frozen=True)
class CacheSet:
    """The clips that go into one cache folder."""

    folder: Path
    dataset: Path
    extraction: Extraction
    clips: tuple[SourceClip, ...]
    drops: tuple[DroppedClip, ...] = ()
    repeats: int = 1
    taxonomy: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceClips:
    """Clips of a list, those left out, the taxonomy's name if the lines have one, and what the plan should say."""

    clips: tuple[SourceClip, ...]
    drops: tuple[DroppedClip, ...]
    taxonomy: str | None
    notes: tuple[str, ...] = ()


def read_source_clips(
    path: Path, encoding: str = AUTO, recursive: bool = False, roi_units: RoiUnits = "fractions"
) -> SourceClips:
    """The clips of a JSONL, CSV, TSV or JSON file, or of a folder.

    Args:
        roi_units: of the boxes of lines that do not say it.

    Raises:
        UserError: the list cannot be read, is empty, or has no line that can be used.
    """
    clips: list[SourceClip] = []
    drops: list[DroppedClip] = []
    taxonomy: str | None = None
    source = read_clips(path, strict=False, encoding=encoding, recursive=recursive)
    missing = 0
    for clip in source:
        key = next((key for key in MEDIA_KEYS if key in clip.data), None)
        media = clip.data.get(key) if key else None
        if not isinstance(media, str) or not media:
            drops.append(DroppedClip(clip.location, "no 'video_path' (or 'image_path') with a file name"))
            continue
        stem = Path(media).stem
        if control := next((k for k in clip.data if k == "control_path" or k.startswith("control_path_")), None):
            drops.append(DroppedClip(clip.location, f"'{control}' (control images) is not supported for Wan", stem))
            continue
        try:
            file = resolve_video(media, source.anchor) if clip.file is None else clip.file.absolute()
        except UserError as error:
            missing += 1
            drops.append(DroppedClip(clip.location, str(error), encodable(stem)))
            continue
        try:
            clips.append(_source_clip(source.anchor, clip, file, _name(clip, media), roi_units))
        except UserError as error:
            # The plan shows the line in front of the reason.
            reason = str(error).removeprefix(f"{clip.location}: ")
            drops.append(DroppedClip(clip.location, reason, stem))
            continue
        named = clip.data.get("instrument_taxonomy")
        taxonomy = taxonomy or (named if isinstance(named, str) else None)
    drops += source.drops
    if not clips and not missing:
        what = "clip" if path.is_dir() else "line"
        first = f"no {what} of it can be used; {drops[0].name}: {drops[0].reason}" if drops else "holds no clips"
        raise UserError(f"{path}: {first}" if drops else f"{path} {first}")
    return SourceClips(tuple(clips), tuple(drops), taxonomy, (*source.notes, *source.encoding_notes()))


def _name(clip: Clip, media: str) -> str:
    return clip.location if clip.file is not None else f"{clip.location} ({media})"


def _source_clip(path: Path, clip: Clip, file: Path, name: str, roi_units: RoiUnits) -> SourceClip:
    location, data = clip.location, clip.data
    mask = data.get("mask_path")
    source = SourceClip(
        file, name, clip.caption, labels=label_fields(data, location), roi=read_roi(data, location, path, roi_units),
        split=_text(data.get("split")), source=_text(data.get("source")), still="image_path" in data,
        fps=_folder_rate(data, location) if file.is_dir() else None,
    )
    if (part := part_fields(data, location)) is not None:
        source = replace(source, start=part[0], duration=part[1])
    return replace(source, mask=resolve_video(str(mask), path)) if mask else source


def part_fields(data: Mapping[str, Any], location: str) -> tuple[float, float | None] | None:
    """`start` and `duration` in seconds of a line that is a part of a recording.

    `duration` without `start` is a remark on the whole file.

    Raises:
        UserError: not seconds.
    """
    if data.get("start") is None:
        return None
    duration = data.get("duration")
    return _seconds(data["start"], "start", location), None if duration is None else _seconds(
        duration, "duration", location)


def _seconds(value: Any, key: str, location: str) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # a table's numbers are text
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or seconds < 0 or (key == "duration" and seconds == 0):
        raise UserError(f"{location}: {key} = {value!r} must be seconds{', more than 0' * (key == 'duration')}")
    return seconds


def _folder_rate(data: Mapping[str, Any], location: str) -> float | None:
    rate = data.get("fps")
    if rate is None:
        return None
    if (frames := _seconds(rate, "fps", location)) == 0:
        raise UserError(f"{location}: fps = {rate!r} must be the frame rate of the folder, above 0")
    return frames


def label_fields(data: Mapping[str, Any], location: str) -> dict[str, Any]:
    """The fields that `lapwan label` adds, under CachedItem's names.

    Args:
        location: file and line, for messages.

    Raises:
        UserError: weights that are not a distribution, or a label index beyond them.
    """
    fields: dict[str, Any] = {}
    label, weights = data.get("instrument_label"), data.get("instrument_logits")
    if label is not None:
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise UserError(f"{location}: instrument_label = {label!r} must be a whole number from 0 on")
        fields["label"] = label
    if weights is not None:
        numbers = isinstance(weights, list) and all(isinstance(w, int | float) and w >= 0 for w in weights)
        if not numbers or abs(sum(weights) - 1) > 1e-3:
            raise UserError(f"{location}: instrument_logits = {weights!r} must be weights of at least 0 that sum to 1")
        if label is not None and label >= len(weights):
            raise UserError(f"{location}: instrument_label = {label}, but there are {len(weights)} instrument_logits")
        fields["label_weights"] = tuple(float(w) for w in weights)
    if (name := _text(data.get("instrument_name"))) is not None:
        fields["label_name"] = name
    if data.get("label_fallback") is True:
        fields["fallback"] = True
    return fields


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
