"""clips.jsonl: one JSON object a line, read as a stream, with line numbers in every complaint.

How to add a field: nothing to do here. Unknown fields travel through `label` unchanged and in order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lapwan.errors import UserError, nearest

_SHOWN = 60  # characters of a broken line that an error shows
MEDIA_KEYS = ("video_path", "image_path")
PATH_KEYS = (*MEDIA_KEYS, "mask_path")


@dataclass(frozen=True)
class Clip:
    """A line of a clips file. `data` is the object as it stands there: every field, in order."""

    line: int
    data: dict[str, Any]

    @property
    def caption(self) -> str:
        """The caption, which `read_clips` has checked to be text."""
        caption: str = self.data["caption"]
        return caption


class ClipFile:
    """Iterates over the clips of a JSONL file; `bytes_read` tells how far, for progress.

    Raises (while iterating):
        UserError: broken JSON, a line that is no object, a missing or empty caption, each with its line number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self.bytes_total = path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if path.is_dir():
            raise UserError(f"{path} is a folder; expected a JSONL file with one clip a line")

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
            said = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            self._fail(number, f"broken JSON, {said}: {_short(text)}")
        except RecursionError:
            self._fail(number, f"broken JSON, nested too deep: {_short(text)}")
        if not isinstance(data, dict):
            hint = "; the file looks like a JSON array, one object a line is needed" if number == 1 else ""
            self._fail(number, f"expected a JSON object, found {_kind(data)}: {_short(text)}{hint}")
        self._check_caption(number, data)
        return data

    def _check_caption(self, number: int, data: dict[str, Any]) -> None:
        if "caption" not in data:
            guess = nearest("caption", data)
            self._fail(number, f"no 'caption'{guess}; found: {', '.join(data) or 'nothing'}")
        caption = data["caption"]
        if not isinstance(caption, str):
            self._fail(number, f"'caption' must be text, found {_kind(caption)}: {_short(json.dumps(caption))}")
        if not caption.strip():
            media = next((f" of {data[key]}" for key in MEDIA_KEYS if key in data), "")
            self._fail(number, f"empty caption{media}; write one or remove the line")

    def _fail(self, number: int, message: str) -> NoReturn:
        raise UserError(f"{self.path}, line {number}: {message}")


def read_clips(path: Path) -> ClipFile:
    """The clips of a JSONL file, streamed: `for clip in read_clips(path)`. Blank lines are skipped."""
    return ClipFile(path)


def to_line(data: dict[str, Any]) -> str:
    """One line of JSONL, keys in their order, Chinese as it is."""
    line = json.dumps(data, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can carry
        line = json.dumps(data)
    return line + "\n"


def resolve_video(path: str | Path, jsonl: Path) -> Path:
    """The file a `video_path` means: absolute, else beside the JSONL file, else in the working directory.

    Raises:
        UserError: no such file (with the places tried), or two different files fit.
    """
    given = Path(path)
    if given.is_absolute():
        if not given.exists():
            raise UserError(f"no such file: {given}")
        return given
    beside, here = jsonl.absolute().parent / given, Path.cwd() / given
    found = [candidate for candidate in (beside, here) if candidate.exists()]
    if not found:
        places = f"{beside} and {here}" if beside != here else f"{beside}"
        raise UserError(f"no such file: {given}; looked for {places}")
    if len(found) == 2 and not beside.samefile(here):
        raise UserError(f"'{given}' is ambiguous: both {beside} and {here} exist; write the absolute path")
    return found[0]


def relocated(data: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """The fields for a JSONL in folder `target`, from one in `source`: paths beside the old file still lead there.

    Only relative paths that exist beside the old file change; the order of the fields stays.
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


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
