"""Held-out clips to evaluate on: prompt, label weights, reference video, and annotations of its frames.

A line of clips.jsonl needs `caption`. Optional: `video_path`, `split`, `instrument_logits` or `instrument_label` (as
`lapwan label` writes them), `roi` (boxes by frame) or `mask_path`, `instrument`, and `tip` ([x, y] in 0..1 for every
frame at the clip's own rate, as the embedded scenes have it).
How to add a field: read it in `_clip`, use it in a scorer.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from lapwan.data.annotations import RoiEntry, read_roi
from lapwan.data.buckets import centre_crop
from lapwan.data.clip_file import Clip, read_clips
from lapwan.data.clips import empty_split, label_fields, part_fields, resolve_video
from lapwan.data.dropped_clips import BadClip
from lapwan.data.labels import check_label, label_caption, resolve_hint
from lapwan.data.regions import pixel_region
from lapwan.data.taxonomy import Taxonomy
from lapwan.data.video import VideoFacts, probe
from lapwan.errors import UserError
from lapwan.sampling.start_image import read_clip

T = TypeVar("T")


@dataclass(frozen=True)
class VideoShape:
    """Length, (height, width) and frame rate at which videos are generated and references are read."""

    frames: int
    size: tuple[int, int]
    fps: int


@dataclass(frozen=True, eq=False)
class EvaluationClip:
    """One held-out clip. `id` keys its noise; `weights` are its label weights in the taxonomy's order."""

    id: str
    prompt: str
    weights: tuple[float, ...] = ()
    fallback: bool = False
    instrument: str | None = None
    second: str | None = None  # of a rendered scene with two
    synthetic: bool = False  # a rendered scene: its line says source = "synthetic"
    video: Path | None = None
    tips_T2: np.ndarray | None = None
    roi: Sequence[RoiEntry] = ()
    mask: Path | None = None
    part: tuple[float, float | None] | None = None  # (start, duration) in seconds, of a part of a recording
    _stills: dict[tuple[int, tuple[int, int]], Image.Image] = field(default_factory=dict, repr=False)

    def frames(self, shape: VideoShape) -> np.ndarray:
        """The reference video, uint8 [T, H, W, 3]; read on each call, because many do not fit in memory."""
        if self.video is None:
            raise UserError(f"clip '{self.id}' has no video_path, which its first frame and its reference need")
        return read_clip(self.video, shape.frames, shape.size, shape.fps, self.part)

    def reference_error(self, shape: VideoShape) -> str | None:
        """Why the reference video cannot be compared with one of `shape`, from its header; None if it can."""
        if self.video is None:
            return f"clip '{self.id}' has no video_path, which is required"
        try:
            count = self._facts(self.video, shape).count_at(shape.fps)
        except BadClip as error:
            return f"{self.video}: {error}"
        if count < shape.frames:
            return (f"clip '{self.id}' has {count} frames at {shape.fps} fps, {shape.frames} are generated; set "
                    "videos.num_frames to fewer")
        return None

    def _facts(self, video: Path, shape: VideoShape) -> VideoFacts:
        facts = probe(video, shape.fps)
        return facts if self.part is None else facts.part(*self.part)

    def first_frame(self, shape: VideoShape) -> Image.Image:
        """The reference video's first frame; read once."""
        return self.last_frame(replace(shape, frames=1))

    def last_frame(self, shape: VideoShape) -> Image.Image:
        """The last of the `shape.frames` frames of the reference video; read once."""
        key = shape.frames, shape.size
        if key not in self._stills:
            self._stills[key] = Image.fromarray(self.frames(shape)[-1])
        return self._stills[key]

    def regions(self, shape: VideoShape) -> np.ndarray | None:
        """[T, H, W] in 0..1: how much of each pixel lies in the clip's mask or boxes; None without them."""
        if self.video is None or not (self.roi or self.mask):
            return None
        try:
            facts = self._facts(self.video, shape)
            crop = centre_crop(facts.width, facts.height, (shape.size[1], shape.size[0]))
            masks = pixel_region(self.roi, self.mask, self.video, range(shape.frames), crop, shape.fps, facts)
        except BadClip as error:
            raise UserError(f"{self.video}: {error}") from None
        return masks if masks.any() else None

    def hint(self, taxonomy: Taxonomy) -> str:
        """The clip's label, written as a hint."""
        return ",".join(f"{key}:{w:.6g}" for key, w in zip(taxonomy.keys, self.weights, strict=True) if w > 0)

    def wrong_hint(self, taxonomy: Taxonomy) -> str:
        """A family other than the clip's: the first one after it with the least weight, in the taxonomy's order."""
        family, count = max(range(len(self.weights)), key=self.weights.__getitem__), len(self.weights)
        others = [(family + step) % count for step in range(1, count)]
        return taxonomy.keys[min(others, key=self.weights.__getitem__, default=family)]


def read_eval_clips(
    path: Path, taxonomy: Taxonomy, split: str | None = "test", count: int | None = None
) -> list[EvaluationClip]:
    """The clips of a split (None: all), at most `count` of them, evenly spaced.

    Raises:
        UserError: an invalid line, an empty split, or label weights of another taxonomy.
    """
    lines = list(read_clips(path))
    if not lines:
        raise UserError(f"{path} holds no clips; write one JSON object per line")
    for clip in lines:
        for key in ("split", "instrument", "second", "source"):
            if not isinstance(value := clip.data.get(key), str | None):
                raise UserError(f"{path}, line {clip.line}: \"{key}\" = {reprlib.repr(value)} must be a text")
    splits = {clip.data.get("split") for clip in lines}
    # A file without splits is used whole: it was made for evaluation.
    chosen = lines if split is None or splits == {None} else [c for c in lines if c.data.get("split") == split]
    if not chosen:
        raise empty_split(path, split, splits, f'set split, or hold some out with "split": "{split}"')
    uses = Counter(str(clip.data.get("video_path")) for clip in chosen)
    return [_clip(path, clip, taxonomy, uses[str(clip.data.get("video_path"))] > 1)
            for clip in evenly_spaced(chosen, count)]


def evenly_spaced(items: Sequence[T], count: int | None) -> list[T]:
    """At most `count` of the items, evenly spaced; None: all."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _clip(path: Path, clip: Clip, taxonomy: Taxonomy, repeated: bool) -> EvaluationClip:
    data = clip.data
    named = data.get("video_path")
    weights, fallback = _weights(path, clip, taxonomy)
    tips, mask = data.get("tip"), data.get("mask_path")
    return EvaluationClip(
        id=f"{named or ''} line {clip.line}".strip() if repeated or not named else str(named),
        prompt=clip.caption, weights=weights, fallback=fallback,
        instrument=data.get("instrument"), second=data.get("second"),
        synthetic=data.get("source") == "synthetic",
        video=None if named is None else resolve_video(named, path),
        tips_T2=None if tips is None else tip_points(path, clip.line, tips),
        roi=read_roi(data, f"{path}, line {clip.line}", path), part=part_fields(data, f"{path}, line {clip.line}"),
        mask=None if mask is None else resolve_video(mask, path),
    )


def _weights(path: Path, clip: Clip, taxonomy: Taxonomy) -> tuple[tuple[float, ...], bool]:
    """Label weights (and whether they are a fallback) from the line's label, else its caption, else `instrument`."""
    where = f"{path}, line {clip.line}"
    fields = label_fields(clip.data, where)
    soft, hard = fields.get("label_weights"), fields.get("label")
    relabel = f"label it with --taxonomy {taxonomy.name}, or set taxonomy"
    check_label(f"{where}: ", soft, None if soft is not None else hard, taxonomy, relabel, "instrument_label")
    if soft is not None:
        return soft, bool(fields.get("fallback"))
    if hard is not None:
        return tuple(float(i == hard) for i in range(len(taxonomy.families))), bool(fields.get("fallback"))
    label = label_caption(clip.caption, taxonomy)
    if label.fallback and isinstance(named := clip.data.get("instrument"), str):
        return resolve_hint(named, taxonomy), False
    return label.weights, label.fallback


def tip_points(path: Path, line: int, tips: Any) -> np.ndarray:
    """`tip` of a line as [T, 2].

    Raises:
        UserError: not a list of pairs of numbers.
    """
    try:
        points = np.array(tips, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2:
        raise UserError(f"{path}, line {line}: 'tip' must be a list of [x, y] in 0..1, one per frame")
    return points
