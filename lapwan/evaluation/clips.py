"""Held-out clips to generate for: prompt, family, reference video, and what is known of each frame.

A line of clips.jsonl needs `caption`; used besides where given: `video_path`, `split`, `instrument_logits` or
`instrument_label` (as `lapwan label` writes them), `roi` (boxes by frame) or `mask_path`, `instrument` and
`tip` ([x, y] in 0..1 for every frame at the clip's own rate, as the embedded scenes carry them).
How to add a field: read it in `_clip`, use it in a scorer.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from lapwan.data.buckets import Crop, centre_crop
from lapwan.data.clips import Clip, read_clips, resolve_video
from lapwan.data.labels import label_caption, resolve_hint
from lapwan.data.regions import box_masks, boxes_at
from lapwan.data.source_clips import label_fields
from lapwan.data.taxonomy import Taxonomy
from lapwan.data.video import BadClip, probe, read_frames, source_times
from lapwan.errors import UserError
from lapwan.sampling.start_image import read_clip

T = TypeVar("T")


@dataclass(frozen=True)
class VideoShape:
    """What videos are made and references read at; `size` is (height, width)."""

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
    synthetic: bool = False  # a rendered scene: its line says source = "synthetic"
    video: Path | None = None
    tips_T2: np.ndarray | None = None
    roi: Sequence[dict[str, Any]] = ()
    mask: Path | None = None
    _first: dict[tuple[int, int], Image.Image] = field(default_factory=dict, repr=False)

    def frames(self, shape: VideoShape) -> np.ndarray:
        """The reference video: uint8 [T, H, W, 3]; read anew each time, because many do not fit in memory."""
        if self.video is None:
            raise UserError(f"clip '{self.id}' has no video_path, which its first frame and its reference need")
        return read_clip(self.video, shape.frames, shape.size, shape.fps)

    def lacking(self, shape: VideoShape) -> str | None:
        """Why the reference video cannot stand beside one of `shape`, from its header; None if it can."""
        if self.video is None:
            return f"clip '{self.id}' has no video_path, which it needs"
        try:
            count = probe(self.video, shape.fps).count_at(shape.fps)
        except BadClip as error:
            return f"{self.video}: {error}"
        if count < shape.frames:
            return (f"clip '{self.id}' has {count} frames at {shape.fps} fps, {shape.frames} are made; set "
                    "videos.num_frames to fewer")
        return None

    def first_frame(self, shape: VideoShape) -> Image.Image:
        """The reference video's first frame; kept."""
        if shape.size not in self._first:
            self._first[shape.size] = Image.fromarray(self.frames(replace(shape, frames=1))[0])
        return self._first[shape.size]

    def regions(self, shape: VideoShape) -> np.ndarray | None:
        """[T, H, W] in 0..1: the part of each pixel inside the clip's mask or boxes; None without them."""
        if self.video is None or not (self.roi or self.mask):
            return None
        try:
            facts = probe(self.video, shape.fps)
            crop = centre_crop(facts.width, facts.height, (shape.size[1], shape.size[0]))
            if self.mask is not None:
                masks = self._masks(self.mask, shape, crop)
            else:
                times = source_times(self.video, facts, shape.fps, None)
                wanted = [max(0, bisect.bisect_right(times, i / shape.fps + facts.late) - 1)
                          for i in range(shape.frames)]
                masks = box_masks(boxes_at(self.roi, wanted), crop)
        except BadClip as error:
            raise UserError(f"{self.video}: {error}") from None
        return masks if masks.any() else None

    @staticmethod
    def _masks(mask: Path, shape: VideoShape, crop: Crop) -> np.ndarray:
        """White is inside; one picture holds for every frame."""
        facts = probe(mask, shape.fps)
        pixels = read_frames(mask, [0] if facts.is_image else range(shape.frames), crop, shape.fps, facts)
        white = (pixels.mean(axis=-1) > 127.5).astype(np.float32)
        return np.repeat(white, shape.frames, axis=0) if facts.is_image else white

    def hint(self, taxonomy: Taxonomy) -> str:
        """The clip's own label as a hint."""
        return ",".join(f"{key}:{w:.6g}" for key, w in zip(taxonomy.keys, self.weights, strict=True) if w > 0)

    def wrong_hint(self, taxonomy: Taxonomy) -> str:
        """A family that is not the clip's: of those with the least weight the next one in the taxonomy's order."""
        own, count = max(range(len(self.weights)), key=self.weights.__getitem__), len(self.weights)
        others = [(own + step) % count for step in range(1, count)]
        return taxonomy.keys[min(others, key=self.weights.__getitem__, default=own)]


def read_eval_clips(
    path: Path, taxonomy: Taxonomy, split: str | None = "test", count: int | None = None
) -> list[EvaluationClip]:
    """The clips of a split (None: all), at most `count` of them spread evenly over it.

    Raises:
        UserError: a broken line, an empty split, or label weights that do not fit the taxonomy.
    """
    lines = list(read_clips(path))
    if not lines:
        raise UserError(f"{path} holds no clips; write one JSON object a line")
    splits = {clip.data.get("split") for clip in lines}
    # A file without splits is held out as a whole: the user made it for this.
    chosen = lines if split is None or splits == {None} else [c for c in lines if c.data.get("split") == split]
    if not chosen:
        have = ", ".join(sorted(str(s) for s in splits))
        raise UserError(f"{path} has no clips of split '{split}' (it has: {have}); set split, or hold some out with "
                        f'"split": "{split}"')
    seen = Counter(str(clip.data.get("video_path")) for clip in chosen)
    return [_clip(path, clip, taxonomy, seen[str(clip.data.get("video_path"))] > 1) for clip in spread(chosen, count)]


def spread(every: Sequence[T], count: int | None) -> list[T]:
    """At most `count` of them, evenly spaced."""
    if count is None or count >= len(every):
        return list(every)
    return [every[i * len(every) // count] for i in range(count)]


def _clip(path: Path, clip: Clip, taxonomy: Taxonomy, repeated: bool) -> EvaluationClip:
    data = clip.data
    named = data.get("video_path")
    weights, fallback = _weights(path, clip, taxonomy)
    tips, mask = data.get("tip"), data.get("mask_path")
    return EvaluationClip(
        id=f"{named or ''} line {clip.line}".strip() if repeated or not named else str(named),
        prompt=clip.caption, weights=weights, fallback=fallback,
        instrument=data.get("instrument"), synthetic=data.get("source") == "synthetic",
        video=None if named is None else resolve_video(named, path),
        tips_T2=None if tips is None else _points(path, clip.line, tips), roi=tuple(data.get("roi") or ()),
        mask=None if mask is None else resolve_video(mask, path),
    )


def _weights(path: Path, clip: Clip, taxonomy: Taxonomy) -> tuple[tuple[float, ...], bool]:
    """The label the line carries, else what the taxonomy makes of its caption, else of its `instrument`."""
    families, place = len(taxonomy.families), f"{path}, line {clip.line}"
    said = label_fields(clip.data, place)
    relabel = f"label it with --taxonomy {taxonomy.name}, or set taxonomy"
    if (soft := said.get("label_weights")) is not None:
        if len(soft) != families:
            raise UserError(f"{place}: {len(soft)} label weights, taxonomy {taxonomy.name} has {families} families; "
                            f"{relabel}")
        return soft, bool(said.get("fallback"))
    if (hard := said.get("label")) is not None:
        if hard >= families:
            raise UserError(f"{place}: instrument_label {hard}, taxonomy {taxonomy.name} has {families} families; "
                            f"{relabel}")
        return tuple(float(i == hard) for i in range(families)), bool(said.get("fallback"))
    label = label_caption(clip.caption, taxonomy)
    if label.fallback and isinstance(named := clip.data.get("instrument"), str):
        return resolve_hint(named, taxonomy), False
    return label.weights, label.fallback


def _points(path: Path, line: int, tips: Any) -> np.ndarray:
    try:
        points = np.array(tips, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[1] != 2:
        raise UserError(f"{path}, line {line}: 'tip' must be a list of [x, y], one a frame, in 0..1")
    return points
