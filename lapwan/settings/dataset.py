"""musubi-tuner's dataset file, as it is: `[general]` and `[[datasets]]`, TOML or JSON.

Fallback of the shared keys: dataset, then general, then default. Source: musubi-tuner's dataset documentation.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

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
    """The six keys that `[general]` may give for all datasets. `resolution` is (width, height)."""

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
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = "head"
    frame_stride: Positive = 1
    frame_sample: Positive = 1
    max_frames: Positive = 129
    source_fps: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DatasetEntry:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            said = " and ".join(given) if given else "none"
            raise ValueError(f"needs exactly one of {', '.join(SOURCES)}; found {said}")
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
        UserError: all problems at once, each with its place and value.
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
    _, bad = _validated(SharedKeys, general, "general")
    problems += bad
    found: list[DatasetEntry] = []
    for number, entry in enumerate(entries):
        model, bad = _validated(DatasetEntry, general | entry if not problems else entry, f"datasets[{number}]")
        problems += bad
        if isinstance(model, DatasetEntry):
            found.append(model)
    if problems:
        raise UserError(f"{path}: {problems[0]}" if len(problems) == 1 else
                        f"{path}: {len(problems)} problems:\n" + "\n".join(f"  {problem}" for problem in problems))
    return found


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


def _validated(model: type[SharedKeys], data: dict[str, Any], place: str) -> tuple[SharedKeys | None, list[str]]:
    problems = [f"{place}.{key}: {UNSUPPORTED[key]} are not supported for Wan; remove the key"
                for key in data if key in UNSUPPORTED]
    rest = {key: value for key, value in data.items() if key not in UNSUPPORTED}
    try:
        return model.model_validate(rest), problems
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            said = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                only = "" if key not in DatasetEntry.model_fields else f"; it belongs into [[datasets]], not [{place}]"
                guess = nearest(key, model.model_fields) or only or f"; known: {', '.join(model.model_fields)}"
                problems.append(f"{place}: unknown key '{key}'{only or guess}")
            elif key:
                problems.append(f"{place}.{key} = {rest.get(key)!r}: {said[0].lower() + said[1:]}")
            else:
                problems.append(f"{place}: {said}")
        return None, problems
