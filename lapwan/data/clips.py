"""clips.jsonl and labels.jsonl: one JSON object per line, read as a stream, with the line number in every error.

`read_clips` gives the lines as they are; `read_source_clips` resolves them to files with captions, labels and regions.
How to add a field: `lapwan label` copies unknown fields unchanged and in order, so nothing to do for that; a field that
caching uses is read in `_source_clip`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from lapwan.data.annotations import RoiEntry, RoiUnits, read_roi
from lapwan.data.dropped_clips import DroppedClip
from lapwan.data.frame_extraction import Extraction
from lapwan.errors import UserError, nearest

_SHOWN = 60
MEDIA_KEYS = ("video_path", "image_path")
PATH_KEYS = (*MEDIA_KEYS, "mask_path", "roi_path")


@dataclass(frozen=True)
class Clip:
    """A line of a clips file. `data` is the JSON object: every field, in order."""

    line: int
    data: dict[str, Any]

    @property
    def caption(self) -> str:
        """The caption, which `read_clips` has checked to be text."""
        caption: str = self.data["caption"]
        return caption


class ClipFile:
    """Iterates over the clips of a JSONL file; `bytes_read` of `bytes_total` is the progress.

    Raises (while iterating):
        UserError: broken JSON, a line that is not an object, a missing or empty caption, each with its line number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self.bytes_total = path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a JSONL file with one clip per line")

    def __iter__(self) -> Iterator[Clip]:
        self.bytes_read = 0
        try:
            with self.path.open("rb") as file:
                for number, raw in enumerate(file, 1):
                    self.bytes_read += len(raw)
                    if raw.strip():
                        yield Clip(number, self._parse(number, raw))
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None

    def _parse(self, number: int, raw: bytes) -> dict[str, Any]:
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            self._fail(number, f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
        try:
            data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        except ValueError as error:
            # json's own "line 1" would be mistaken for the file's line
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at character {error.colno}"
            self._fail(number, f"broken JSON, {reason}: {shortened(text.strip())}")
        except RecursionError:
            self._fail(number, f"broken JSON, nested too deep: {shortened(text.strip())}")
        if not isinstance(data, dict):
            hint = "; the file looks like a JSON array, one object per line is needed" if number == 1 else ""
            self._fail(number, f"expected a JSON object, found {_kind(data)}: {shortened(text.strip())}{hint}")
        self._check_caption(number, data)
        return data

    def _check_caption(self, number: int, data: dict[str, Any]) -> None:
        if "caption" not in data:
            guess = nearest("caption", data)
            self._fail(number, f"no 'caption'{guess}; found: {', '.join(data) or 'nothing'}")
        caption = data["caption"]
        if not isinstance(caption, str):
            self._fail(number, f"'caption' must be text, found {_kind(caption)}: {shortened(json.dumps(caption))}")
        if not caption.strip():
            media = next((f" of {data[key]}" for key in MEDIA_KEYS if key in data), "")
            self._fail(number, f"empty caption{media}; write one or remove the line")

    def _fail(self, number: int, message: str) -> NoReturn:
        raise UserError(f"{self.path}, line {number}: {message}")


def read_clips(path: Path) -> ClipFile:
    """The clips of a JSONL file, streamed: `for clip in read_clips(path)`. Blank lines are skipped."""
    return ClipFile(path)


def to_line(data: dict[str, Any]) -> str:
    """One line of JSONL, keys in their order, non-ASCII text unescaped."""
    line = json.dumps(data, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can carry
        line = json.dumps(data)
    return line + "\n"


def resolve_video(path: str | Path, jsonl: Path) -> Path:
    """The file that a path in a JSONL refers to: absolute, else beside the JSONL, else in the working directory.

    Raises:
        UserError: no such file (with the paths tried), or two different files match.
    """
    given = Path(path)
    if (existing := find_path(given, jsonl)) is not None:
        return existing
    if given.is_absolute():
        raise UserError(f"no such file: {given}")
    beside, here = jsonl.absolute().parent / given, Path.cwd() / given
    tried = f"{beside} and {here}" if beside != here else f"{beside}"
    raise UserError(f"no such file: {given}; looked for {tried}")


def find_path(given: Path, source: Path) -> Path | None:
    """What a path written in a file `source` refers to: absolute, else beside `source`, else in the working directory.

    Returns:
        None if there is nothing.

    Raises:
        UserError: both are there, and differ.
    """
    beside, here = source.absolute().parent / given, Path.cwd() / given
    existing = [candidate for candidate in (beside, here) if candidate.exists()]
    if len(existing) == 2 and not beside.samefile(here):
        raise UserError(f"'{given}' is ambiguous: both {beside} and {here} exist; write the absolute path")
    return existing[0] if existing else None


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
        if isinstance(value, str) and not Path(value).is_absolute() and (source / value).exists():
            out[key] = Path(os.path.relpath(source / value, target)).as_posix()
    return out


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def shortened(text: str) -> str:
    """A text shortened for messages: at most 60 characters."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


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


def read_source_clips(
    path: Path, roi_units: RoiUnits = "fractions"
) -> tuple[tuple[SourceClip, ...], tuple[DroppedClip, ...], str | None]:
    """(clips, clips without a file, the taxonomy's name if the lines have one) of a clips or labels JSONL.

    Args:
        roi_units: of the boxes of lines that do not say it.

    Raises:
        UserError: a broken line, a line without a media path, a field that Wan does not support, or no clips.
    """
    clips: list[SourceClip] = []
    drops: list[DroppedClip] = []
    taxonomy: str | None = None
    for clip in read_clips(path):
        name = f"{path.name}, line {clip.line}"
        key = next((key for key in MEDIA_KEYS if key in clip.data), None)
        media = clip.data.get(key) if key else None
        if not isinstance(media, str) or not media:
            raise UserError(f"{path}, line {clip.line}: no 'video_path' (or 'image_path') with a file name")
        for unsupported in ("control_path", *(k for k in clip.data if k.startswith("control_path_"))):
            if unsupported in clip.data:
                raise UserError(f"{path}, line {clip.line}: '{unsupported}' (control images) is not supported for Wan")
        try:
            file = resolve_video(media, path)
        except UserError as error:
            drops.append(DroppedClip(name, str(error), Path(media).stem))
            continue
        named = clip.data.get("instrument_taxonomy")
        taxonomy = taxonomy or (named if isinstance(named, str) else None)
        clips.append(_source_clip(path, clip, file, f"{name} ({media})", roi_units))
    if not clips and not drops:
        raise UserError(f"{path} holds no clips")
    return tuple(clips), tuple(drops), taxonomy


def _source_clip(path: Path, clip: Clip, file: Path, name: str, roi_units: RoiUnits) -> SourceClip:
    location, data = f"{path}, line {clip.line}", clip.data
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
    for key in ("start", "duration"):
        value = data.get(key, 1)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value < 0 or (key == "duration" and value == 0):
            raise UserError(f"{location}: {key} = {value!r} must be seconds{', more than 0' * (key == 'duration')}")
    duration = data.get("duration")
    return float(data["start"]), None if duration is None else float(duration)


def _folder_rate(data: Mapping[str, Any], location: str) -> float | None:
    rate = data.get("fps")
    if rate is None:
        return None
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not rate > 0:
        raise UserError(f"{location}: fps = {rate!r} must be the frame rate of the folder, above 0")
    return float(rate)


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
