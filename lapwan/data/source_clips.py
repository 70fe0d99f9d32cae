"""The clips of a JSONL dataset, resolved to files, with their captions, labels and regions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lapwan.data.buckets import Buckets, FrameExtraction
from lapwan.data.clips import MEDIA_KEYS, Clip, read_clips, resolve_video
from lapwan.errors import UserError


@dataclass(frozen=True)
class Extraction:
    """How clips are cut; see `windows` and `Buckets`. `source_fps` None: the file's own rate."""

    buckets: Buckets
    target_frames: tuple[int, ...]
    frame_extraction: FrameExtraction = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | None = None


@dataclass(frozen=True)
class SourceClip:
    """One clip of a dataset. `where` names it in messages; `labels` are CachedItem's label fields; `roi` as given."""

    path: Path
    where: str
    caption: str
    labels: Mapping[str, Any] = field(default_factory=dict)
    roi: tuple[Mapping[str, Any], ...] = ()
    mask: Path | None = None
    split: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Drop:
    """A clip that is left out, and why; `stem` is what its cache files would be called by."""

    where: str
    reason: str
    stem: str | None = None


@dataclass(frozen=True)
class CacheSet:
    """The clips that go into one cache folder."""

    folder: Path
    dataset: Path
    extraction: Extraction
    clips: tuple[SourceClip, ...]
    drops: tuple[Drop, ...] = ()
    repeats: int = 1
    taxonomy: str | None = None


def read_jsonl(path: Path) -> tuple[tuple[SourceClip, ...], tuple[Drop, ...], str | None]:
    """(clips, those without a file, the taxonomy's name if the lines say one) of a clips or labels JSONL."""
    clips: list[SourceClip] = []
    drops: list[Drop] = []
    taxonomy: str | None = None
    for clip in read_clips(path):
        where = f"{path.name}, line {clip.line}"
        key = next((key for key in MEDIA_KEYS if key in clip.data), None)
        media = clip.data.get(key) if key else None
        if not isinstance(media, str) or not media:
            raise UserError(f"{path}, line {clip.line}: no 'video_path' (or 'image_path') with a file name")
        for unsupported in ("control_path", *(k for k in clip.data if k.startswith("control_path_"))):
            if unsupported in clip.data:
                raise UserError(f"{path}, line {clip.line}: '{unsupported}' (control images) is not supported for Wan")
        try:
            found = resolve_video(media, path)
        except UserError as error:
            drops.append(Drop(where, str(error), Path(media).stem))
            continue
        named = clip.data.get("instrument_taxonomy")
        taxonomy = taxonomy or (named if isinstance(named, str) else None)
        clips.append(_source_clip(path, clip, found, f"{where} ({media})"))
    if not clips and not drops:
        raise UserError(f"{path} holds no clips")
    return tuple(clips), tuple(drops), taxonomy


def _source_clip(path: Path, clip: Clip, found: Path, where: str) -> SourceClip:
    place, data = f"{path}, line {clip.line}", clip.data
    roi, mask = data.get("roi") or [], data.get("mask_path")
    if not isinstance(roi, list):
        raise UserError(f"{place}: 'roi' must be a list of {{\"frame\": i, \"box\": [x0, y0, x1, y1]}}")
    for entry in roi:
        _check_box(place, entry)
    source = SourceClip(
        found, where, clip.caption, labels=label_fields(data, place), roi=tuple(roi),
        split=_text(data.get("split")), source=_text(data.get("source")),
    )
    return replace(source, mask=resolve_video(str(mask), path)) if mask else source


def label_fields(data: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields that `label` adds, as CachedItem's.

    Raises:
        UserError: weights that are no distribution, or a label beyond them.
    """
    fields: dict[str, Any] = {}
    label, weights = data.get("instrument_label"), data.get("instrument_logits")
    if label is not None:
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise UserError(f"{place}: instrument_label = {label!r} must be a whole number from 0 on")
        fields["label"] = label
    if weights is not None:
        numbers = isinstance(weights, list) and all(isinstance(w, int | float) and w >= 0 for w in weights)
        if not numbers or abs(sum(weights) - 1) > 1e-3:
            raise UserError(f"{place}: instrument_logits = {weights!r} must be weights of at least 0 that sum to 1")
        if label is not None and label >= len(weights):
            raise UserError(f"{place}: instrument_label = {label}, but there are {len(weights)} instrument_logits")
        fields["label_weights"] = tuple(float(w) for w in weights)
    if (name := _text(data.get("instrument_name"))) is not None:
        fields["label_name"] = name
    if data.get("label_fallback") is True:
        fields["fallback"] = True
    return fields


def _check_box(place: str, entry: Any) -> None:
    box = entry.get("box") if isinstance(entry, dict) else None
    frame = entry.get("frame") if isinstance(entry, dict) else None
    good = (
        isinstance(frame, int) and frame >= 0 and isinstance(box, list) and len(box) == 4
        and all(isinstance(v, int | float) for v in box) and box[0] <= box[2] and box[1] <= box[3]
    )
    if not good:
        raise UserError(f"{place}: roi entry {entry!r} must be {{\"frame\": i, \"box\": [x0, y0, x1, y1]}}, "
                        "corners as fractions of width and height")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
