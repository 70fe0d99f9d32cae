"""musubi-tuner's dataset file, unchanged: `[general]` and `[[datasets]]`, TOML or JSON.

`SharedKeys` and `DatasetEntry` are its keys; `read_musubi_dataset` gives the clips to cache. Fallback of the shared
keys: dataset, then general, then default. Source: musubi-tuner's dataset documentation.

How to add a key: a field of `DatasetEntry`, or of `SharedKeys` if `[general]` may give it too.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from lapwan import console
from lapwan.data.buckets import Buckets
from lapwan.data.clips import CacheSet, SourceClip, find_path, read_source_clips
from lapwan.data.dropped_clips import DroppedClip
from lapwan.data.frame_extraction import Extraction, FrameExtraction, round_frames
from lapwan.data.frame_files import IMAGE_SUFFIXES
from lapwan.data.video import VIDEO_SUFFIXES
from lapwan.errors import UserError, nearest
from lapwan.settings.base import Settings
from lapwan.settings.load import reason

# Valid in such files, but for other architectures or for control videos: refused by name rather than ignored.
UNSUPPORTED: dict[str, str] = {
    "control_directory": "control images and videos",
    "control_resolution": "control images and videos",
    "no_resize_control": "control images and videos",
    "multiple_target": "several target images",
    "fp_latent_window_size": "FramePack",
    "fp_1f_clean_indices": "FramePack",
    "fp_1f_target_index": "FramePack",
    "fp_1f_no_post": "FramePack",
    "skip_corrupted_cache": "skipping damaged cache files: lapwan cache finds and replaces them",
}

Positive = Annotated[int, Field(ge=1)]


class SharedKeys(Settings):
    """The keys that `[general]` may give for all datasets. `resolution` is (width, height)."""

    resolution: tuple[Positive, Positive] = (960, 544)
    caption_extension: str | None = None
    batch_size: Positive = 1
    num_repeats: Positive = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False

    @field_validator("resolution", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class DatasetEntry(SharedKeys):
    """One of `[[datasets]]`: exactly one of the four sources."""

    image_directory: Path | None = None
    image_jsonl_file: Path | None = None
    video_directory: Path | None = None
    video_jsonl_file: Path | None = None
    cache_directory: Path | None = None
    target_frames: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    frame_extraction: FrameExtraction = "head"
    frame_stride: Positive = 1
    frame_sample: Positive = 1
    max_frames: Positive = 129
    source_fps: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DatasetEntry:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(SOURCES)}; found {' and '.join(given) or 'none'}")
        if given[0].startswith("image"):
            video_only = [key for key in _VIDEO_KEYS if key in self.model_fields_set]
            if video_only:
                raise ValueError(f"{', '.join(video_only)}: only for videos, but this is {given[0]}")
        if given[0].endswith("directory") and not self.caption_extension:
            raise ValueError(f"{given[0]} needs caption_extension, such as \".txt\"")
        return self


SOURCES = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")
_VIDEO_KEYS = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")


def read_entries(path: Path) -> list[DatasetEntry]:
    """The datasets of a file, with `[general]` filled in.

    Raises:
        UserError: all problems at once, each with its key and value.
    """
    tree = _parse(path)
    general, entries = tree.pop("general", {}), tree.pop("datasets", None)
    problems = [f"unknown key '{key}'{nearest(key, ('general', 'datasets'))}; the file has [general] and [[datasets]]"
                for key in tree]
    if not isinstance(general, dict):
        problems.append("[general] must be a table")
        general = {}
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        problems.append("no [[datasets]]")
        entries = []
    problems += _validated(SharedKeys, general, "general")[1]
    valid: list[DatasetEntry] = []
    for number, entry in enumerate(entries):
        model, wrong = _validated(DatasetEntry, general | entry if not problems else entry, f"datasets[{number}]")
        problems += wrong
        if isinstance(model, DatasetEntry):
            valid.append(model)
    if problems:
        raise UserError(f"{path}: {problems[0]}" if len(problems) == 1 else
                        f"{path}: {len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))
    return valid


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected [general] and [[datasets]]")
    return tree


def _validated(model: type[SharedKeys], data: dict[str, Any], table: str) -> tuple[SharedKeys | None, list[str]]:
    problems = [f"{table}.{key}: {UNSUPPORTED[key]} are not supported for Wan; remove the key"
                for key in data if key in UNSUPPORTED]
    rest = {key: value for key, value in data.items() if key not in UNSUPPORTED}
    try:
        return model.model_validate(rest), problems
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            message = reason(item)
            if item["type"] == "extra_forbidden":
                only = "" if key not in DatasetEntry.model_fields else f"; it belongs in [[datasets]], not [{table}]"
                guess = nearest(key, model.model_fields) or only or f"; known: {', '.join(model.model_fields)}"
                problems.append(f"{table}: unknown key '{key}'{only or guess}")
            elif key:
                problems.append(f"{table}.{key} = {rest.get(key)!r}: {message}")
            else:
                problems.append(f"{table}: {message}")
        return None, problems


def read_musubi_dataset(path: Path, output: Path | None, step: int, stride: int) -> list[CacheSet]:
    """One CacheSet per dataset.

    Args:
        output: the cache folder of a dataset without `cache_directory`; several get numbered folders in it.
        step: the size step of buckets, in pixels.
        stride: pixel frames per latent frame.

    Raises:
        UserError: a wrong file, a missing folder, or two datasets with one cache folder.
    """
    entries = read_entries(path)
    without_folder = sum(entry.cache_directory is None for entry in entries)
    sets: list[CacheSet] = []
    for number, entry in enumerate(entries):
        location = f"{path}, datasets[{number}]"
        clips, drops, taxonomy = _clips(entry, path, location)
        folder = _cache_folder(entry, path, output, number if without_folder > 1 else None, location)
        same = next((at for at, other in enumerate(sets) if other.folder.absolute() == folder.absolute()), None)
        if same is not None:
            raise UserError(f"{location}: cache folder {folder} is that of datasets[{same}] too; give each its own")
        sets.append(CacheSet(folder, path, _extraction(entry, step, stride, location), clips, drops, entry.num_repeats,
                             taxonomy))
    if any(entry.batch_size > 1 for entry in entries):
        console.log(f"{path}: batch_size is for training; set it in the training settings")
    return sets


def _extraction(entry: DatasetEntry, step: int, stride: int, location: str) -> Extraction:
    width, height = entry.resolution
    if not entry.enable_bucket and (width % step or height % step):
        near = [max(step, round(side / step) * step) for side in entry.resolution]
        raise UserError(f"{location}: resolution [{width}, {height}] ([width, height]): both must be multiples of "
                        f"{step}; try {near}, or enable_bucket")
    rounded = tuple(sorted({round_frames(frames, stride) for frames in entry.target_frames}))
    if rounded != tuple(sorted(set(entry.target_frames))):
        console.warn(f"{location}: target_frames {list(entry.target_frames)} are rounded down to {list(rounded)} "
                     f"({stride}N+1)")
    return Extraction(Buckets(entry.resolution, entry.enable_bucket, entry.bucket_no_upscale, step), rounded,
                      entry.frame_extraction, entry.frame_stride, entry.frame_sample, entry.max_frames,
                      entry.source_fps)


def _clips(
    entry: DatasetEntry, path: Path, location: str
) -> tuple[tuple[SourceClip, ...], tuple[DroppedClip, ...], str | None]:
    key = next(key for key in SOURCES if getattr(entry, key) is not None)
    source = _existing(getattr(entry, key), path, f"{location}.{key}")
    if key.endswith("jsonl_file"):
        if not source.is_file():
            raise UserError(f"{location}.{key}: {source} is not a file")
        return read_source_clips(source)
    if not source.is_dir():
        raise UserError(f"{location}.{key}: {source} is not a folder")
    suffixes = IMAGE_SUFFIXES if key.startswith("image") else VIDEO_SUFFIXES
    clips: list[SourceClip] = []
    drops: list[DroppedClip] = []
    for file in sorted(source.iterdir()):
        if file.suffix.lower() not in suffixes or not file.is_file():
            continue
        caption = file.with_name(file.stem + str(entry.caption_extension))
        text = caption.read_text(encoding="utf-8-sig").strip() if caption.is_file() else None
        if text:
            clips.append(SourceClip(file, str(file), text, still=key.startswith("image")))
        else:
            reason = f"empty caption {caption.name}" if text == "" else f"no caption file {caption.name}"
            drops.append(DroppedClip(str(file), reason, file.stem))
    if not clips and not drops:
        raise UserError(f"{location}.{key}: {source} holds none of {', '.join(sorted(suffixes))}")
    return tuple(clips), tuple(drops), None


def _cache_folder(entry: DatasetEntry, path: Path, output: Path | None, number: int | None, location: str) -> Path:
    if entry.cache_directory is not None:
        beside = path.absolute().parent / entry.cache_directory
        return beside if beside.is_dir() and not entry.cache_directory.is_dir() else entry.cache_directory
    if output is not None:
        return output if number is None else output / f"{number}"
    media = entry.video_directory or entry.image_directory
    if media is None:
        raise UserError(f"{location}: a JSONL dataset needs cache_directory (or --output DIR)")
    return _existing(media, path, location)


def _existing(given: Path, path: Path, location: str) -> Path:
    """A path beside the dataset file, else in the working directory, where musubi-tuner looks."""
    try:
        existing = find_path(given, path)
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    if existing is None:
        raise UserError(f"{location}: no such path: {given}; looked beside {path.name} and in the working directory")
    return existing
