"""The index of a cache folder: its format, writing and parsing. No torch.

`lapwan_index.jsonl`: the first line describes the cache, each other line is an item; file names are relative to the
folder. Labels are stored by the keys of the taxonomy's families (`"label": "hook"`, `"label_weights": {"hook": 1.0}`),
whose order and fingerprint the first line has; older indices have numbers and lists in an order that they do not state.
`read.py` reads a folder; one made by musubi-tuner has no index (`musubi_cache.py`).

How to add a field of an item: a field of `CachedItem` with a default, set in `_index_item` of `plan.py`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from lapwan import files
from lapwan.data.clip_file import to_line
from lapwan.data.video import VideoFacts
from lapwan.documents import LIST_BYTES, parse_json, read_bytes
from lapwan.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

T = TypeVar("T")

INDEX_FILE = "lapwan_index.jsonl"
_NUMBERED, _BY_FAMILY = 1, 2  # formats: how labels are stored
_LARGEST = 1 << 40  # of a number of frames, pixels or repeats
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class CachedItem:
    """One training item. `id` is unique in its cache and stable; `latents`, `text`, `roi` are file names.

    `frames`, `height`, `width` are the bucket's, in pixels; `start` counts frames at the model's rate;
    `label_weights` sum to 1 in the taxonomy's order; `repeats` is how often an epoch shows the item.
    """

    id: str
    latents: str
    text: str
    caption: str
    frames: int
    height: int
    width: int
    roi: str | None = None
    condition: bool = False
    last_image: bool | None = None  # True: the condition holds the last frame too
    start: int = 0
    label: int | None = None
    label_name: str | None = None
    label_weights: tuple[float, ...] | None = None
    fallback: bool = False
    split: str | None = None
    source: str | None = None
    clip: str | None = None
    repeats: int = 1
    probe: str | None = None  # fingerprint of the source file
    facts: dict[str, Any] | None = None  # VideoFacts of the source file
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(frames, height, width): items of one bucket can share a batch."""
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class CacheIndex:
    """A cache folder. For caches of musubi-tuner, fields it does not store are None and `verified` is False."""

    folder: Path
    items: tuple[CachedItem, ...]
    task: str | None = None
    fps: float | None = None
    vae: str | None = None
    text_encoder: str | None = None
    text_dim: int | None = None
    taxonomy: str | None = None
    taxonomy_fingerprint: str | None = None
    families: tuple[str, ...] | None = None  # the taxonomy's keys, in the order of label numbers and weights
    stems: dict[str, str] = field(default_factory=dict)  # by path: of clips that are not among the items yet
    dataset: str | None = None
    prompts: str | None = None
    pixels_per_second: float | None = None  # of the last encoding, for the next plan's estimate
    verified: bool = True


_NOT_STORED = ("folder", "items", "verified")


def write_index(index: CacheIndex) -> None:
    """Write the index atomically."""
    head: dict[str, Any] = {"lapwan_index": _NUMBERED if index.families is None else _BY_FAMILY}
    stored = {f.name: getattr(index, f.name) for f in fields(CacheIndex) if f.name not in _NOT_STORED}
    head |= {name: value for name, value in stored.items() if value or name not in ("stems", "families")}
    lines = [head, *(_stored_item(item, index.families) for item in index.items)]
    files.write_text(index.folder / INDEX_FILE, "".join(map(to_line, lines)))


def _stored_item(item: CachedItem, families: tuple[str, ...] | None) -> dict[str, Any]:
    row = {key: value for key, value in asdict(item).items() if value is not None}
    if families is not None:
        if item.label is not None:
            row["label"] = families[item.label]
        if item.label_weights is not None:
            row["label_weights"] = {
                key: weight for key, weight in zip(families, item.label_weights, strict=True) if weight}
    return row


def parse_index(path: Path) -> CacheIndex:
    """The index at `path`, checked line by line.

    Raises:
        UserError: a damaged index (with line and key), one of another format, or one that names files outside the
            folder.
    """
    try:
        text = read_bytes(path, LIST_BYTES).decode("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        raise _damaged(path, 1, str(error)) from None
    lines = text.split("\n")  # not splitlines: a caption may hold a line separator of Unicode
    head = _object(path, 1, lines[0])
    if head.get("lapwan_index") not in (_NUMBERED, _BY_FAMILY) or isinstance(head["lapwan_index"], bool):
        raise UserError(f"{path}, line 1: lapwan_index = {_brief(head.get('lapwan_index'))} is not a format that this "
                        f"version of lapwan reads ({_NUMBERED}, {_BY_FAMILY}); delete it and run lapwan cache again")
    families = head.get("families")
    if families is not None:
        if not isinstance(families, list) or not all(isinstance(key, str) for key in families):
            raise _damaged(path, 1, f"families = {_brief(families)} must be a list of names")
        head["families"] = families = tuple(families)
    known = {f.name for f in fields(CacheIndex)} - set(_NOT_STORED)
    content = {key: value for key, value in head.items() if key in known}
    index: CacheIndex = _typed(path, 1, CacheIndex, content | {"folder": path.parent, "items": ()})
    for name in (index.prompts, *index.stems.values()):
        if name is not None:
            files.inside(path.parent, name, path)
    items = tuple(_item(path, number, _object(path, number, line), families)
                  for number, line in enumerate(lines[1:], 2) if line)
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UserError(f"{path} is damaged: it has the item '{item.id}' twice; delete the index and run lapwan "
                            "cache again, which keeps the other files")
        seen.add(item.id)
    return replace(index, items=items)


def _item(path: Path, number: int, row: dict[str, Any], families: tuple[str, ...] | None) -> CachedItem:
    for key in ("latents", "text", "roi"):
        if row.get(key) is not None:
            files.inside(path.parent, row[key], path)
    try:
        _numbered(row, families)
    except ValueError as error:
        raise _damaged(path, number, str(error)) from None
    if row.get("facts") is not None:
        _typed(path, number, VideoFacts, row["facts"], "facts.")
    item = _typed(path, number, CachedItem, row)
    smallest = {"frames": 1, "height": 1, "width": 1, "repeats": 1, "start": 0, "label": 0}
    for key, least in smallest.items():
        if (value := getattr(item, key)) is not None and not least <= value <= _LARGEST:
            limit = f"at least {least}" if value < least else f"at most {_LARGEST}"
            raise _damaged(path, number, f"{key} = {value} must be {limit}")
    count = len(item.label_weights or families or ())
    if count and item.label is not None and item.label >= count:
        raise _damaged(path, number, f"label = {item.label}, but there are {count} families")
    return item


def _numbered(row: dict[str, Any], families: tuple[str, ...] | None) -> None:
    """Change labels by key into numbers and weights in the order of `families`.

    Raises:
        ValueError: a key that is not a family, or labels by key in an index without families.
    """
    label, weights = row.get("label"), row.get("label_weights")
    by_key = [label] if isinstance(label, str) else []
    by_key += list(weights) if isinstance(weights, dict) else []
    for key in by_key:
        if families is None or key not in families:
            raise ValueError(f"{_brief(key)} is not one of its families ({', '.join(families or ()) or 'none'})")
    if families is not None and isinstance(label, str):
        row["label"] = families.index(label)
    if isinstance(weights, dict):
        row["label_weights"] = tuple(weights.get(key, 0.0) for key in families or ())
    elif isinstance(weights, list):
        row["label_weights"] = tuple(weights)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = parse_json(line, "it")
    except UserError as error:
        raise _damaged(path, number, str(error)) from None
    if not isinstance(value, dict):
        raise _damaged(path, number, "not an object")
    return value


@functools.cache
def _checkers() -> dict[type[Any], type[BaseModel]]:
    return {kind: _checker(kind) for kind in (CacheIndex, CachedItem, VideoFacts)}


def _checker(kind: type[Any]) -> type[BaseModel]:
    """A model with the fields of a dataclass that converts nothing and ignores keys that newer versions add."""
    from pydantic import ConfigDict, create_model  # here: not needed to name the classes above

    types = get_type_hints(kind)
    required = (MISSING, MISSING)
    content: dict[str, Any] = {
        f.name: (types[f.name], ... if (f.default, f.default_factory) == required else f.default) for f in fields(kind)}
    config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())
    return create_model(kind.__name__, __config__=config, **content)


def _typed(path: Path, number: int, kind: type[T], value: object, prefix: str = "") -> T:
    """`value`, an object of JSON, as an instance of the dataclass `kind`."""
    from pydantic import ValidationError

    if not isinstance(value, dict):
        raise _damaged(path, number, f"{prefix.rstrip('.')} = {_brief(value)} must be an object")
    try:
        model = _checkers()[kind].model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" = {_brief(first['input'])}"
        raise _damaged(path, number, f"{prefix}{key}{given}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    return kind(**{name: getattr(model, name) for name in model.model_fields_set})


def _brief(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value) if isinstance(value, str | bool) or value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _damaged(path: Path, number: int, reason: str) -> UserError:
    return UserError(f"{path}, line {number} is damaged: {reason}; delete the index and run lapwan cache again, which "
                     "keeps the other files")
