"""musubi-tuner's dataset file, unchanged: `[general]` and `[[datasets]]`, TOML or JSON.

`SharedKeys` and `DatasetEntry` are its keys; `read_musubi_dataset` gives the clips to cache. Fallback of the shared
keys: dataset, then general, then default. Source: musubi-tuner's dataset documentation.

How to add a key: a field of `DatasetEntry`, or of `SharedKeys` if `[general]` may give it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from lapwan import console
from lapwan.data.buckets import Buckets
from lapwan.data.clip_file import read_clips
from lapwan.data.clip_tables import ClipRows, caption_beside, media_files
from lapwan.data.clips import PATH_KEYS, CacheSet, SourceClip, SourceClips, find_path, read_source_clips
from lapwan.data.dropped_clips import DroppedClip
from lapwan.data.frame_extraction import Extraction, FrameExtraction, round_frames
from lapwan.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from lapwan.data.text_encoding import AUTO
from lapwan.documents import read_json, read_toml, reason
from lapwan.errors import UserError, nearest
from lapwan.settings.base import Settings

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
    caption_extension: Annotated[str, Field(pattern=r"^[^/\\\n]+$")] | None = None
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
    source_fps: Annotated[float, Field(ge=0.01, le=1000)] | None = None

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
        if len(problems) == 1:
            raise UserError(f"{path}: {problems[0]}")
        raise UserError(f"{path}: {len(problems)} problems:", *(f"  {problem}" for problem in problems))
    return valid


def _parse(path: Path) -> dict[str, Any]:
    tree = read_json(path) if path.suffix.lower() == ".json" else read_toml(path)
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


def is_musubi(path: Path) -> bool:
    """Whether a file is musubi-tuner's dataset file: TOML, or JSON with [general] or [[datasets]].

    A JSON file that is none of a list's forms counts as one, so that its mistakes are named.
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        return path.suffix.lower() == ".toml"
    try:
        tree = read_json(path)
    except UserError:
        return False
    return isinstance(tree, dict) and bool({"general", "datasets"} & set(tree))


def musubi_rows(path: Path, encoding: str = AUTO) -> ClipRows:
    """The clips of all datasets of a file as rows with absolute paths, for `lapwan label`.

    Raises:
        UserError: a wrong file, or a missing folder.
    """
    rows = ClipRows()
    for number, entry in enumerate(read_entries(path)):
        location = f"{path}, datasets[{number}]"
        source = _source(entry, path, location)
        if source.is_file():
            clips = read_clips(source, strict=False, encoding=encoding)
            for clip in clips:
                given = {key: str(_absolute(clip.data[key], source)) for key in PATH_KEYS if key in clip.data}
                rows.rows.append((clip.location, clip.data | given, None))
            rows.drops += clips.drops
            rows.notes += [*clips.notes, *clips.encoding_notes()]
            continue
        key = "image_path" if entry.image_directory is not None else "video_path"
        folder = _folder_clips(entry, source, location, encoding)
        rows.rows += [(clip.name, {key: str(clip.path.absolute()), "caption": clip.caption}, None)
                      for clip in folder.clips]
        rows.drops += folder.drops
        rows.notes += folder.notes
    return rows


def _absolute(given: Any, source: Path) -> Any:
    """A line's path as an absolute one, if it leads to a file."""
    existing = find_path(Path(given), source) if isinstance(given, str) else None
    return given if existing is None else existing.absolute()


def read_musubi_dataset(
    path: Path, output: Path | None, step: int, stride: int, encoding: str = AUTO
) -> list[CacheSet]:
    """One CacheSet per dataset.

    Args:
        encoding: of captions, where their bytes do not tell it.
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
        source = _source(entry, path, location)
        source_clips = read_source_clips(source, encoding) if source.is_file() else (
            _folder_clips(entry, source, location, encoding))
        folder = _cache_folder(entry, path, output, number if without_folder > 1 else None, location)
        same = next((at for at, other in enumerate(sets) if other.folder.absolute() == folder.absolute()), None)
        if same is not None:
            raise UserError(f"{location}: cache folder {folder} is that of datasets[{same}] too; give each its own")
        sets.append(CacheSet(folder, path, _extraction(entry, step, stride, location), source_clips.clips,
                             source_clips.drops, entry.num_repeats, source_clips.taxonomy, source_clips.notes))
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
    buckets = given = Buckets(entry.resolution, entry.enable_bucket, entry.bucket_no_upscale, step)
    if entry.video_directory is not None or entry.video_jsonl_file is not None:
        # musubi-tuner's code does not pass the two bucket keys on for videos: they always go into buckets.
        buckets = Buckets(entry.resolution, True, False, step)
    return Extraction(buckets, rounded, entry.frame_extraction, entry.frame_stride, entry.frame_sample,
                      entry.max_frames, entry.source_fps, given)


def _source(entry: DatasetEntry, path: Path, location: str) -> Path:
    """The file or folder of a dataset."""
    key = next(key for key in SOURCES if getattr(entry, key) is not None)
    source = _existing(getattr(entry, key), path, f"{location}.{key}")
    if key.endswith("jsonl_file") and not source.is_file():
        raise UserError(f"{location}.{key}: {source} is not a file")
    if key.endswith("directory") and not source.is_dir():
        raise UserError(f"{location}.{key}: {source} is not a folder")
    return source


def _folder_clips(entry: DatasetEntry, folder: Path, location: str, encoding: str) -> SourceClips:
    suffixes = IMAGE_SUFFIXES if entry.image_directory is not None else VIDEO_SUFFIXES
    clips: list[SourceClip] = []
    drops: list[DroppedClip] = []
    rows = ClipRows()
    media, _ = media_files(folder, suffixes)
    for file in media:
        text, reason = caption_beside(file, [str(entry.caption_extension)], rows, encoding)
        if text is None:
            drops.append(DroppedClip(str(file), reason, file.stem))
        else:
            clips.append(SourceClip(file, str(file), text, still=entry.image_directory is not None))
    if not media:
        raise UserError(f"{location}: {folder} holds none of {', '.join(sorted(suffixes))}")
    return SourceClips(tuple(clips), tuple(drops), None, tuple(rows.encoding_notes()))


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
        raise error.within(location) from None
    if existing is None:
        raise UserError(f"{location}: no such path: {given}; looked beside {path.name} and in the working directory")
    return existing
