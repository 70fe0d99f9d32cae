"""The base of every command's settings: frozen models, command-line flags as field metadata, and TOML output."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Self, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from lapwan.console import NO_BREAK, PlanRow
from lapwan.files import expand_setting, expand_user

# Least and largest whole numbers by key, where a field's own bounds are wider. They lie far beyond what is of use, and
# below what would fill the memory before anything else can refuse it.
_ANY = (-(2**63), 10_000_000)
_RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("steps", "start", "stop", "high", "low", "joint"), (0, 1_000_000)),
    **dict.fromkeys(("every", "save_every", "log_every", "keep_last", "keep_best", "turn", "patience", "after"),
                    (0, 2**63 - 1)),  # never, all
    "seed": (-(2**63), 2**63 - 1), "workers": (0, 1024), "sheet": (0, 1000), "samples": (1, 1_000_000),
    **dict.fromkeys(("size", "resolution"), (1, 8192)),
    **dict.fromkeys(("num_frames", "target_frames", "frames"), (1, 10_001)),
    **dict.fromkeys(("rank", "patterns", "q", "k", "v", "o", "ffn_in", "ffn_out"), (0, 16_384)),
    **dict.fromkeys(("batch_size", "images", "top_k"), (0, 4096)),
    **dict.fromkeys(("accumulate", "clips", "prompts", "preview", "frame_sample", "max_frames",
                     "num_repeats", "seeds"), (0, 100_000)),
    **dict.fromkeys(("strata", "knots", "bins", "sigma_bins", "sigmas", "draws"), (0, 10_000)),
}
_PIXELS = 2**31  # of a clip: frames x height x width


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(item)
    elif type(value) is int:
        yield value


class Settings(BaseModel):
    """Base of all settings: frozen, an unknown key is an error, and every whole number has bounds."""

    # defer_build: the validators are built by the first run that needs them, not by --help. A section's default is a
    # default_factory for the same reason: an instance in the class body would build them at import.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False,
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_paths(cls, data: Any) -> Any:
        """`~` and `$NAME` at the begin of a path, which a shell fills in and a TOML file does not."""
        return {key: _expanded(value) for key, value in data.items()} if isinstance(data, dict) else data

    @field_validator("*")
    @classmethod
    def _in_bounds(cls, value: Any, info: ValidationInfo) -> Any:
        least, most = _RANGES.get(info.field_name or "", _ANY)
        for number in _whole_numbers(value):
            if not least <= number <= most:
                raise ValueError(f"must be at most {most:,}" if number > most else f"must be at least {least:,}")
        return value

    @model_validator(mode="after")
    def _few_pixels(self) -> Self:
        sides, frames = ([number for key in keys for number in _whole_numbers(getattr(self, key, None))]
                         for keys in (("size", "resolution"), ("num_frames", "target_frames")))
        if sides and (pixels := math.prod(sides) * max([1, *frames])) > _PIXELS:
            raise ValueError(f"clips of {max([1, *frames])} frames of {sides[0]}x{sides[1]} have {pixels:,} pixels; at "
                             f"most {_PIXELS:,} are allowed: give a smaller size or fewer frames")
        return self


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return expand_setting(value)
    if isinstance(value, Path):
        return expand_user(value)
    return [_expanded(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Flag:
    """Marks a settings field as a command-line option: `output: Annotated[Path, Flag("-o")]`.

    The long name is the field's (`--num-frames`) unless `names` holds one. Values arrive as strings and are parsed by
    the field's validators, so that a file and the command line accept the same forms.
    """

    names: tuple[str, ...]
    positional: bool
    metavar: str | None

    def __init__(self, *names: str, positional: bool = False, metavar: str | None = None) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "positional", positional)
        object.__setattr__(self, "metavar", metavar)


@dataclass(frozen=True)
class FlagField:
    """A settings field that has a flag, with its dotted key."""

    key: str
    info: FieldInfo
    flag: Flag

    @property
    def long_name(self) -> str:
        """`--num-frames`: the flag's long name if it has one, else the field's name."""
        long_names = [name for name in self.flag.names if name.startswith("--")]
        return long_names[0] if long_names else "--" + self.key.rsplit(".", 1)[-1].replace("_", "-")


def text_encoding(name: str) -> str:
    """The name of a text encoding, or auto.

    Raises:
        ValueError: Python knows no such encoding.
    """
    try:
        if name == "auto" or "x".encode(name):
            return name
    except (LookupError, UnicodeError):
        pass
    raise ValueError("must be auto, or a text encoding such as utf-8, gb18030, cp1252, big5 or utf-16")


def height_width(value: Any) -> Any:
    """Parse the text `480x832` as (height, width); any other type is returned unchanged.

    Raises:
        ValueError: a text of another form.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×*]\s*(\d{1,9})\s*", value)
    if match is None:
        raise ValueError("must be HEIGHTxWIDTH in pixels, such as 480x832")
    return int(match[1]), int(match[2])


def submodel(annotation: Any) -> type[Settings] | None:
    """The Settings class inside an annotation such as `Section`, `Section | None`; None if there is not exactly one."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        sections = [section for a in get_args(annotation) if (section := submodel(a))]
        return sections[0] if len(sections) == 1 else None
    return None


def type_of(kind: type[Settings]) -> str:
    """The `type` of a kind of settings, a literal that distinguishes it from the other kinds of a union."""
    return str(kind.model_fields["type"].default)


def union_of(kinds: Sequence[type[Settings]], default: str | None = None) -> Any:
    """The annotation of a value of one of these kinds, by its `type`; `default`: the type where none is given."""

    def tag(value: Any) -> str | None:
        given = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
        return None if given is None else str(given)

    members = tuple(Annotated[kind, Tag(type_of(kind))] for kind in kinds)
    return Annotated[Union[members], Discriminator(tag)]  # noqa: UP007 - made at run time


def union_members(annotation: Any) -> list[type[Settings]]:
    """The members of a union of Settings classes; none if it holds anything else."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return []
    kinds = [submodel(get_args(a)[0] if get_origin(a) is Annotated else a) for a in get_args(annotation)]
    return [kind for kind in kinds if kind is not None] if None not in kinds else []


def flag_fields(model: type[Settings], prefix: str = "") -> Iterator[FlagField]:
    """Every field with a Flag, also those of sections, in the order of declaration."""
    for name, info in model.model_fields.items():
        flag = next((m for m in info.metadata if isinstance(m, Flag)), None)
        if flag is not None:
            yield FlagField(prefix + name, info, flag)
        elif (section := submodel(info.annotation)) is not None:
            yield from flag_fields(section, f"{prefix}{name}.")
        elif (kinds := union_members(info.annotation)):  # of a union the options that all members have
            common = set.intersection(*({field.key for field in flag_fields(kind)} for kind in kinds))
            yield from (f for f in flag_fields(kinds[0], f"{prefix}{name}.") if f.key.rsplit(".", 1)[-1] in common)


def to_plain(value: Any) -> Any:
    """Settings, or a value of theirs, in the types of TOML: absolute paths, None left out."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {str(to_plain(k)): to_plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value.absolute())  # so that the file reproduces the run from any working directory
    if isinstance(value, Enum):
        return value.value
    return value


def to_toml(settings: Settings, header: str = "") -> str:
    """The settings as TOML that reproduces the run: every field, absolute paths, None left out."""
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    text: str = tomli_w.dumps(to_plain(settings))
    return comment + text


def changed_settings(settings: Settings, default: Settings | None = None) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of the fields that differ from their defaults; fields without a default are left out.

    Args:
        default: the section that is the default, if its fields have other values than their own defaults.
    """
    for name, info in type(settings).model_fields.items():
        value, kind = getattr(settings, name), type(settings)
        usual = getattr(default, name) if isinstance(default, kind) else (
            value if info.is_required() else info.get_default(call_default_factory=True))
        if isinstance(value, Settings):
            if type(usual) is not type(value) and "type" in type(value).model_fields:
                yield f"{name}.type", value.type  # type: ignore[attr-defined]
            yield from ((f"{name}.{key}", item) for key, item in changed_settings(
                value, usual if isinstance(usual, Settings) else None))
        elif value != usual:
            yield from _flat(name, value)


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The items of nested tables under dotted keys."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"[\w-]+", str(to_plain(name))) for name in value):
        for name, item in value.items():
            yield from _flat(f"{key}.{to_plain(name)}", item)
    else:
        yield key, value


_LONGEST_VALUE = 60  # characters of a value in the plan


def settings_row(settings: Settings, *shown: str) -> PlanRow:
    """The settings that differ from the defaults, for the plan of a command.

    Args:
        shown: keys that have a row of their own there, besides model and output.
    """
    left_out = {"model", "output", *shown}
    texts = [f"{key} = {_value_text(value)}".replace(" ", NO_BREAK) for key, value in changed_settings(settings)
             if key not in left_out]
    return PlanRow("settings", ", ".join(texts) or "all defaults", detail=not texts)


def _value_text(value: Any) -> str:
    plain = str(value) if isinstance(value, Path) else to_plain(value)
    if isinstance(plain, list) and plain and isinstance(plain[0], dict):
        return f"[{len(plain)} tables]"
    text = json.dumps(plain, ensure_ascii=False) if not isinstance(plain, float) else f"{plain:g}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


@dataclass(frozen=True)
class RunOptions:
    """The options every command has; they are not written into the resolved settings.

    `dry_run`: check everything that can be checked without doing the work, print the resolved settings and the plan.
    `overwrite`: replace an existing output.
    `lock`: hold the lock of an output folder; only commands that have `--no-lock` do.
    """

    dry_run: bool = False
    overwrite: bool = False
    lock: bool = True
