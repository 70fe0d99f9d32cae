"""Lists of clips: JSON Lines, read as a stream, and the tables and folders of `clip_tables.py`.

`read_clips` gives the lines as they are, under lapwan's names. A line that cannot be used is left out or refused, with
its number and the reason.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwan.data.clip_tables import ClipRows, canonical, encoding_notes, folder_list, read_table
from lapwan.data.dropped_clips import DroppedClip
from lapwan.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from lapwan.data.text_encoding import AUTO, UnreadableText, decode
from lapwan.documents import LIST_BYTES, json_value, read_bytes
from lapwan.errors import UserError, nearest

MEDIA_KEYS = ("video_path", "image_path")
LONGEST_LINE = 16 << 20  # bytes; a longer line is no clip
_SHOWN = 60
_HEAD = 4096


@dataclass(frozen=True)
class Clip:
    """A line of a clips file. `data` is the JSON object: every field, in order, those that lapwan knows by its names.

    `location`: the file and line, or the file in a folder, for messages. `file`: the media file, where it is known.
    """

    line: int
    data: dict[str, Any]
    location: str = ""
    file: Path | None = None

    @property
    def caption(self) -> str:
        """The caption, which `read_clips` has checked to be text."""
        caption: str = self.data["caption"]
        return caption


class ClipFile:
    """Iterates over the clips of a file or folder; `bytes_read` of `bytes_total` is the progress of a JSONL file.

    Args:
        strict: a line that cannot be used is an error; else it is entered into `drops`, which holds all after a pass.
        encoding: of the text, where it is not told by the bytes (`text_encoding.py`).
        recursive: of a folder, the sub-folders too.
        rows: clips that have been read already, instead of those of `path`.

    Raises (while iterating):
        UserError: with `strict`, broken JSON, a line that is not an object, a missing or empty caption, each with its
            line number.
    """

    def __init__(
        self, path: Path, strict: bool = True, encoding: str = AUTO, recursive: bool = False,
        rows: ClipRows | None = None,
    ) -> None:
        self.path = (folder_list(path) or path) if path.is_dir() and rows is None else path
        self.strict, self.encoding = strict, encoding
        self.drops: list[DroppedClip] = []
        self.notes = [] if self.path == path else [f"{self.path.name} in {path} lists the clips"]
        self.encodings: Counter[str] = Counter()
        self.bytes_read = 0
        try:
            self.bytes_total = self.path.stat().st_size
            is_table = self.path.is_dir() or self._is_table()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        if rows is None and self.path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not self.path.is_dir():
            raise UserError(f"{self.path} is a video or an image; a list of clips, or their folder, is needed here")
        self._rows = read_table(self.path, encoding, recursive) if rows is None and is_table else rows
        if self._rows is not None:
            self.notes += self._rows.notes
            self.encodings = self._rows.encodings

    @property
    def anchor(self) -> Path:
        """A path in the folder that relative paths of the clips start from."""
        return self.path / "clips" if self.path.is_dir() else self.path

    def _is_table(self) -> bool:
        if self.path.suffix.lower() in (".csv", ".tsv"):
            return True
        with self.path.open("rb") as file:
            head = file.read(_HEAD)
        first = head.lstrip(codecs.BOM_UTF8).lstrip()
        if self.path.suffix.lower() == ".json":  # an object that fills the first line, and more below: JSON Lines
            line, _, rest = first.partition(b"\n")
            return not (rest.strip() and line.strip().startswith(b"{") and line.strip().endswith(b"}"))
        return first.startswith(b"[") and first[1:].lstrip()[:1] in (b"{", b"")

    def __iter__(self) -> Iterator[Clip]:
        self.bytes_read = 0
        self.drops = [] if self._rows is None else list(self._rows.drops)
        for drop in self.drops if self.strict else ():
            raise UserError(f"{self.path.parent / drop.name}: {drop.reason}")
        try:
            yield from self._json_lines() if self._rows is None else self._table()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        self.bytes_read = self.bytes_total

    def _table(self) -> Iterator[Clip]:
        assert self._rows is not None
        for number, (location, data, file) in enumerate(self._rows.rows, 1):
            if (reason := _caption_problem(data)) is not None:
                self._leave_out(location, reason, data)
            else:
                yield Clip(number, data, location, file)

    def _json_lines(self) -> Iterator[Clip]:
        self.encodings.clear()
        for number, raw in self._lines():
            if raw is not None and not raw.strip():
                continue
            location = f"{self.path.name}, line {number}"
            try:
                if raw is None:
                    raise _BadLine(f"longer than {LONGEST_LINE >> 20} MiB")
                data = canonical(self._parse(number, raw))
            except _BadLine as error:
                self._leave_out(location, str(error), {})
                continue
            if (reason := _caption_problem(data)) is not None:
                self._leave_out(location, reason, data)
            else:
                yield Clip(number, data, location)

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """The lines by number; None for one that is too long to be a clip."""
        with self.path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                try:
                    text, name = self._decode(read_bytes(self.path, LIST_BYTES))
                except _BadLine as error:
                    raise UserError(f"cannot read {self.path}: {error}") from None
                self.encodings[name] += 1
                yield from enumerate((line.encode("utf-8", "surrogatepass") for line in text.splitlines()), 1)
                return
            number = 0
            while raw := file.readline(LONGEST_LINE):
                number, skipped = number + 1, 0
                self.bytes_read += len(raw)
                if whole := raw.endswith(b"\n") or len(raw) < LONGEST_LINE:
                    yield number, raw
                while not whole and (rest := file.readline(LONGEST_LINE)):
                    self.bytes_read += len(rest)
                    whole = rest.endswith(b"\n")
                    if (skipped := skipped + len(rest)) > LIST_BYTES:
                        raise UserError(f"cannot read {self.path}, line {number}: it is longer than "
                                        f"{LIST_BYTES >> 20} MiB; is it the right file?")
                if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                    yield number, None

    def _decode(self, raw: bytes) -> tuple[str, str]:
        try:
            return decode(raw, self.encoding)
        except UnreadableText as error:
            raise _BadLine(str(error)) from None

    def _parse(self, number: int, raw: bytes) -> dict[str, Any]:
        text, encoding = self._decode(raw)
        if encoding:
            self.encodings[encoding] += 1
        try:
            data = json_value(text)
        except ValueError as error:
            # json's own "line 1" would be mistaken for the file's line
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at character {error.colno}"
            raise _BadLine(f"broken JSON, {reason}: {shortened(text.strip())}") from None
        except RecursionError:
            raise _BadLine(f"broken JSON, nested too deep: {shortened(text.strip())}") from None
        if not isinstance(data, dict):
            raise _BadLine(f"expected a JSON object, found {_kind(data)}: {shortened(text.strip())}")
        return data

    def _leave_out(self, location: str, reason: str, data: Mapping[str, Any]) -> None:
        if self.strict:
            raise UserError(f"{self.path.parent / location}: {reason}")
        media = next((data[key] for key in MEDIA_KEYS if isinstance(data.get(key), str)), None)
        self.drops.append(DroppedClip(location, encodable(reason), None if media is None else Path(media).stem))

    def encoding_notes(self) -> list[str]:
        """What a pass has read in another encoding than UTF-8."""
        return encoding_notes(self.encodings)


class _BadLine(Exception):
    """A line that is no clip, and why."""


def _caption_problem(data: Mapping[str, Any]) -> str | None:
    if "caption" not in data:
        return f"no 'caption'{nearest('caption', data)}; found: {', '.join(data) or 'nothing'}"
    caption = data["caption"]
    if not isinstance(caption, str):
        return f"'caption' must be text, found {_kind(caption)}: {shortened(json.dumps(caption))}"
    if not caption.strip():
        media = next((f" of {data[key]}" for key in MEDIA_KEYS if key in data), "")
        return f"empty caption{media}; write one or remove the line"
    if encodable(caption) != caption or "\0" in caption:
        return f"the caption holds half a character or NUL, which is no text: {shortened(ascii(caption))}"
    return None


def read_clips(
    path: Path, strict: bool = True, encoding: str = AUTO, recursive: bool = False, rows: ClipRows | None = None
) -> ClipFile:
    """The clips of a file or folder, streamed: `for clip in read_clips(path)`. Blank lines are skipped.

    Args and Raises: those of `ClipFile`.
    """
    return ClipFile(path, strict, encoding, recursive, rows)


def to_line(data: dict[str, Any]) -> str:
    """One line of JSONL, keys in their order, non-ASCII text unescaped."""
    line = json.dumps(data, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can carry
        line = json.dumps(data)
    return line + "\n"


def shortened(text: str) -> str:
    """A text shortened for messages: at most 60 characters."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def encodable(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")
