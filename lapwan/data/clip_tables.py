"""Lists of clips as other tools write them: CSV and TSV, JSON arrays, folders with captions beside the files.

Every reader gives rows under lapwan's own names. The layouts: diffusers' and Hugging Face's `metadata.jsonl` and
`metadata.csv` (`file_name`, `text`), DiffSynth-Studio's `metadata.csv` (`video`, `prompt`), finetrainers'
`prompts.txt` with `videos.txt`, kohya's and musubi-tuner's captions in `.txt` or `.caption` files.

How to add a column name: its row of `NAMES`. A layout: a reader of `ClipRows`, and its case in `read_table`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapwan.data.dropped_clips import DroppedClip
from lapwan.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from lapwan.data.text_encoding import AUTO, UnreadableText, decode
from lapwan.documents import LIST_BYTES, parse_json, read_bytes
from lapwan.errors import UserError

CAPTION = "caption"
# Names of a field in other tools' files, the first that is there counts.
NAMES: dict[str, tuple[str, ...]] = {
    "video_path": ("video_path", "video", "video_file", "video_name", "videos", "clip_path", "clip", "视频",
                   "视频路径"),
    "image_path": ("image_path", "image", "image_file", "image_name", "图片", "图像"),
    CAPTION: (CAPTION, "text", "prompt", "description", "sentence", "标注", "描述", "文本", "提示词"),
}
# A file that may be a video or an image: its suffix decides.
_FILE_NAMES = ("file_name", "filename", "file_path", "filepath", "path", "file", "media_path", "media", "local_path",
               "文件", "文件名", "路径", "文件路径")
_LISTS = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
_ARRAY_KEYS = ("data", "clips", "items", "videos", "annotations", "samples")
CAPTION_SUFFIXES = (".txt", ".caption")
_DELIMITERS = ",;\t|"
_LONGEST_RECORD = 50  # lines; a quote that is still open then was never meant to open
_KINDS_SHOWN = 6


@dataclass
class ClipRows:
    """Clips of a list: `rows` as (location, fields, file), where the file is known; what is left out; what to say.

    `locations` name a file and its line, or a file of a folder.
    """

    rows: list[tuple[str, dict[str, Any], Path | None]] = field(default_factory=list)
    drops: list[DroppedClip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    encodings: Counter[str] = field(default_factory=Counter)

    def decoded(self, raw: bytes, encoding: str) -> str:
        """A text of these rows, its encoding counted if it is not UTF-8."""
        text, name = decode(raw, encoding)
        if name:
            self.encodings[name] += 1
        return text

    def encoding_notes(self) -> list[str]:
        """What has been read in another encoding than UTF-8."""
        return encoding_notes(self.encodings)


def encoding_notes(encodings: Mapping[str, int]) -> list[str]:
    """One line for each encoding other than UTF-8, with the number of texts in it."""
    return [f"{count} read as {name}, not UTF-8; caption_encoding sets another"
            for name, count in sorted(encodings.items())]


def canonical(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a clip under lapwan's names, in their order; fields that lapwan does not know stay as they are."""
    renamed = column_names(data)
    if "video_path" not in renamed.values() and "image_path" not in renamed.values():
        given = {_plain(key): key for key in data}
        for name in _FILE_NAMES:
            if (key := given.get(name)) is not None:
                is_image = Path(str(data[key])).suffix.lower() in IMAGE_SUFFIXES
                renamed[key] = "image_path" if is_image else "video_path"
                break
    return {renamed.get(key, key): value for key, value in data.items()}


def column_names(columns: Iterable[str]) -> dict[str, str]:
    """lapwan's name of each column that has one; of several for one name the usual one."""
    given = {_plain(column): column for column in reversed(list(columns))}
    return {given[alias]: name for name, aliases in NAMES.items()
            if (alias := next((alias for alias in aliases if alias in given), None)) is not None}


def _is_media(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _plain(column: str) -> str:
    return re.sub(r"[\s-]+", "_", str(column).strip().lower())


def read_table(path: Path, encoding: str = AUTO, recursive: bool = False) -> ClipRows:
    """The clips of a CSV, TSV or JSON file, or of a folder.

    Args:
        encoding: of the text, `auto` or a name.
        recursive: of a folder, the sub-folders too.

    Raises:
        UserError: it cannot be read, has no columns that name clips and captions, or holds nothing.
    """
    if path.is_dir():
        return _folder(path, encoding, recursive)
    rows = ClipRows()
    try:
        text = rows.decoded(read_bytes(path, LIST_BYTES), encoding)
    except UnreadableText as error:
        raise UserError(f"{path}: {error}") from None
    if text.lstrip()[:1] in ("[", "{"):
        _read_array(path, text, rows)
    else:
        _read_csv(path, text, rows)
    return rows


def _read_array(path: Path, text: str, rows: ClipRows) -> None:
    value = parse_json(text, path, non_finite=True)
    if isinstance(value, dict):
        key = next((key for key in _ARRAY_KEYS if isinstance(value.get(key), list)), None)
        if key is None and value and all(map(_is_media, value)):
            value = [{"file_name": name, **(entry if isinstance(entry, dict) else {CAPTION: entry})}
                     for name, entry in value.items()]
        else:
            value = value[key] if key is not None else None
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects with a video and a caption, an object with such a list as "
                        f"{', '.join(map(repr, _ARRAY_KEYS))}, or [general] and [[datasets]] of a musubi-tuner dataset")
    for number, entry in enumerate(value, 1):
        location = f"{path.name}, entry {number}"
        if isinstance(entry, dict):
            rows.rows.append((location, canonical(entry), None))
        else:
            rows.drops.append(DroppedClip(location, f"expected an object, not {json.dumps(entry)[:40]}"))


def _read_csv(path: Path, text: str, rows: ClipRows) -> None:
    lines = text.splitlines(keepends=True)
    start = next((at for at, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise UserError(f"{path} is empty; its first line names the columns, such as video,caption")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(
        _DELIMITERS, key=lambda sign: (_fields_of(lines[start], sign), -_DELIMITERS.index(sign)))
    records = _records(lines[start:], delimiter, start + 1)
    _, header = next(records)
    columns = [column.strip() for column in header]
    names = _check_columns(path, columns)
    rows.notes.append(f"columns of {path.name}: {', '.join(f'{new} = {old!r}' for old, new in names.items())}")
    for number, record in records:
        location = f"{path.name}, line {number}"
        if isinstance(record, str):
            rows.drops.append(DroppedClip(location, record))
        elif len(record) != len(columns) and any(record):
            rows.drops.append(DroppedClip(location, f"{len(record)} columns where the header has {len(columns)}; a "
                                                    f"caption with {delimiter!r} in it needs quotes around it"))
        elif any(cell.strip() for cell in record):
            data = {key: cell for key, cell in zip(columns, record, strict=True) if key}
            rows.rows.append((location, canonical(data), None))


def _fields_of(line: str, delimiter: str) -> int:
    return len(next(csv.reader([line], delimiter=delimiter)))


def _check_columns(path: Path, columns: list[str]) -> dict[str, str]:
    names = column_names(columns)
    if not {"video_path", "image_path"} & set(names.values()):
        names |= {column: "file" for column in columns if _plain(column) in _FILE_NAMES}
    media = {"video_path", "image_path", "file"} & set(names.values())
    if media and CAPTION in names.values():
        return names
    if any(map(_is_media, columns)):
        raise UserError(f"{path} begins with a clip; its first line must name the columns, such as video,caption")
    missing = "captions (caption, text, prompt)" if media else "videos (video, path, file_name)"
    listed = ", ".join(map(repr, columns))[:200]
    raise UserError(f"{path}: no column of {missing} among {listed}; rename one in the first line")


def _records(lines: list[str], delimiter: str, first: int) -> Iterator[tuple[int, Any]]:
    """(line number, cells) of each record, or (line number, reason) of one that cannot be read.

    A quoted cell may go on over lines. A quote that never closes makes one bad line, not a bad rest of the file.
    """
    at = 0
    while at < len(lines):
        end = at + 1
        while _is_open("".join(lines[at:end]), delimiter):
            if end == len(lines) or end - at > _LONGEST_RECORD:
                yield first + at, "a quote that opens here is never closed"
                end = 0
                break
            end += 1
        if end:
            try:
                yield first + at, next(csv.reader(["".join(lines[at:end])], delimiter=delimiter), [])
            except csv.Error as error:
                yield first + at, f"not readable as CSV ({error})"
        at = end or at + 1


def _is_open(record: str, delimiter: str) -> bool:
    """Whether a quoted cell is still open at the end of the text."""
    inside, begins = False, True
    at = 0
    while at < len(record):
        sign = record[at]
        if inside and sign == '"':
            if record[at + 1:at + 2] == '"':
                at += 1
            else:
                inside = False
        elif not inside and sign == '"' and begins:
            inside = True
        begins = not inside and sign in (delimiter, "\n")
        at += 1
    return inside


def _folder(folder: Path, encoding: str, recursive: bool) -> ClipRows:
    for name in _LISTS:
        if (listed := folder / name).is_file():
            rows = read_table(listed, encoding) if listed.suffix != ".jsonl" else ClipRows()
            rows.notes.insert(0, f"{name} in {folder} lists the clips")
            return rows
    if (videos := folder / "videos.txt").is_file():
        prompts = next((file for name in ("prompts.txt", "prompt.txt", "captions.txt")
                        if (file := folder / name).is_file()), None)
        if prompts is not None:
            return _two_lists(videos, prompts, encoding)
    return _files(folder, encoding, recursive)


def folder_list(folder: Path) -> Path | None:
    """The `metadata.jsonl` of a folder, if that is what lists its clips."""
    listed = folder / _LISTS[0]
    return listed if listed.is_file() else None


def _two_lists(videos: Path, prompts: Path, encoding: str) -> ClipRows:
    rows = ClipRows(notes=[f"{prompts.name} and {videos.name} in {videos.parent} list the clips"])
    try:
        paths, texts = (rows.decoded(read_bytes(file, LIST_BYTES), encoding).strip().splitlines()
                        for file in (videos, prompts))
    except UnreadableText as error:
        raise UserError(f"{videos.name} or {prompts.name} in {videos.parent}: {error}") from None
    if len(paths) != len(texts):
        raise UserError(f"{videos} has {len(paths)} lines and {prompts} {len(texts)}; each video needs its caption in "
                        "the same line")
    for number, (path, text) in enumerate(zip(paths, texts, strict=True), 1):
        rows.rows.append((f"{videos.name}, line {number}", canonical({"file": path.strip(), CAPTION: text}), None))
    return rows


def _files(folder: Path, encoding: str, recursive: bool) -> ClipRows:
    rows = ClipRows()
    media, skipped = media_files(folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES, recursive)
    for file in media:
        text, reason = caption_beside(file, CAPTION_SUFFIXES, rows, encoding)
        name = file.relative_to(folder).as_posix()
        if text is None:
            rows.drops.append(DroppedClip(name, reason, file.stem))
        else:
            key = "image_path" if file.suffix.lower() in IMAGE_SUFFIXES else "video_path"
            rows.rows.append((name, {key: name, CAPTION: text}, file))
    if not media:
        deeper = skipped["sub-folder"] and "; it has sub-folders: add --recursive, or name one of them"
        raise UserError(f"{folder} holds no videos or images{deeper or ''}")
    if skipped:
        shown = [f"{count} {kind}" for kind, count in skipped.most_common(_KINDS_SHOWN)]
        rows.notes.append(f"left out of {folder}: {', '.join(shown)}"
                          + (f" and {len(skipped) - _KINDS_SHOWN} more kinds" if len(skipped) > _KINDS_SHOWN else ""))
    return rows


def media_files(
    folder: Path, suffixes: Iterable[str], recursive: bool = False
) -> tuple[list[Path], Counter[str]]:
    """The files of these suffixes in a folder, by name, and what else is there: sub-folders, hidden files, suffixes.

    Args:
        suffixes: in lower case, with the dot.
        recursive: the sub-folders too.

    Raises:
        UserError: the folder cannot be read.
    """
    wanted, files = frozenset(suffixes), list[Path]()
    skipped: Counter[str] = Counter()
    captions = set[Path]()

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        skipped["hidden"] += len(hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if not recursive:
            skipped["sub-folder"] += len(folders)
            folders.clear()
        for name in names:
            file = Path(parent, name)
            suffix = file.suffix.lower()
            if name.startswith("."):
                continue
            if suffix in wanted:
                files.append(file)
            elif suffix in CAPTION_SUFFIXES:
                captions.add(file)
            else:
                skipped[f"{suffix} file" if suffix else "file without a suffix"] += 1
    used = {file.with_name(stem + suffix) for file in files for stem in (file.stem, file.name)
            for suffix in CAPTION_SUFFIXES}
    skipped["caption of no clip"] += len(captions - used)
    return sorted(files), +skipped


def caption_beside(
    file: Path, suffixes: Iterable[str], rows: ClipRows, encoding: str = AUTO
) -> tuple[str | None, str]:
    """(caption, reason why there is none) of a clip, from `clip.txt` or `clip.mp4.txt` beside it.

    Args:
        suffixes: of caption files, the first that is there counts.
        rows: where the encoding is counted.
        encoding: of the text, `auto` or a name.
    """
    suffixes = list(suffixes)
    candidates = [file.with_name(stem + suffix) for stem in (file.stem, file.name) for suffix in suffixes]
    for caption in candidates:
        try:
            if not caption.is_file():
                continue
            text = rows.decoded(read_bytes(caption), encoding).strip()
        except UserError as error:
            return None, f"caption {caption.name}: {error}"
        except OSError as error:
            return None, f"caption {caption.name} cannot be read ({error.strerror})"
        return (text, "") if text else (None, f"empty caption {caption.name}")
    return None, f"no caption file {' or '.join(file.stem + suffix for suffix in suffixes)}"
