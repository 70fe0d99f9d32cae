"""What a judge learns from a cache: the VAE's reconstructions of its clips, and their source frames where they are.

    instrument  labelled clips; with boxes their frames that have one
    none        frames whose annotation is empty; the same pictures with the boxes covered by their surroundings, and
                cut out beside the boxes
    unclear     decoded latents with noise, or the mean of two clips' (the training destroys pictures besides)

A generated video is what the VAE decodes, so its losses belong into the pictures; sources are not needed. Boxes are
taken to hold all that names an instrument (its head); covered pictures get a twin that is covered elsewhere and keeps
its label, so that covering itself says nothing.

Shapes: N clips, T frames, H, W pixels of the canvas, K families.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapwan.caching.families import labels_in_order
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.read import read_item
from lapwan.data.buckets import centre_crop
from lapwan.data.clip_file import read_clips
from lapwan.data.clips import resolve_video
from lapwan.data.dropped_clips import BadClip
from lapwan.data.taxonomy import Taxonomy
from lapwan.data.video import VideoFacts, read_frames
from lapwan.errors import UserError
from lapwan.evaluation.clips import tip_points
from lapwan.evaluation.judge_masks import boxes_beside, covered, middle_of
from lapwan.evaluation.judge_net import INSTRUMENT, NONE, STRIDE, Canvas
from lapwan.evaluation.judge_training import JudgeClips, joined, unclear_clips
from lapwan.wan.vae import decode, to_frames

SEEN = 0.25  # weight from which a label names a family
PARTS = ("train", "calibrate", "test")
_DEAL = (0, 0, 0, 1, 2)  # of five source videos of a family
LEAST_GROUPS = 8  # source videos
_AREA = 128 * 128  # pixels of a canvas, at most
_ALIKE = 0.6  # least sigma of unclear latents


@dataclass(frozen=True)
class JudgeItem:
    """A cached clip with what it is known to show: `families`, numbers in the taxonomy's order (empty: none known)."""

    item: CachedItem
    families: tuple[int, ...]
    group: str  # its source video
    part: str  # of PARTS
    tips_T2: np.ndarray | None = None  # points of each frame at the cache's rate


@dataclass(frozen=True)
class JudgePlan:
    """The clips of a cache that a judge learns from, and the canvas."""

    index: CacheIndex
    items: Sequence[JudgeItem]
    taxonomy: Taxonomy
    canvas: Canvas
    frames: int
    unlabelled_as_none: bool
    left_out: int = 0

    def count(self, part: str) -> int:
        """The number of clips in a part."""
        return sum(item.part == part for item in self.items)

    def by_family(self) -> dict[str, int]:
        """Clips by family, those that train."""
        keys = self.taxonomy.keys
        return {key: sum(k in item.families and item.part == "train" for item in self.items)
                for k, key in enumerate(keys)}


def plan_judge(
    index: CacheIndex, taxonomy: Taxonomy, size: tuple[int, int] | None, frames: int, unlabelled_as_none: bool,
    group: str | None = None, points: Path | None = None,
) -> JudgePlan:
    """Check a cache's labels, and deal its source videos to the parts, those of each family in turn.

    Args:
        index: of the cache.
        taxonomy: whose families the judge names.
        size: (height, width) of the canvas; None: the most frequent size of the clips, scaled to at most 128² pixels.
        frames: of each clip, evenly spaced.
        unlabelled_as_none: clips without label and boxes show no instrument; else they are left out.
        group: a regular expression whose first group (or match) in a clip's path names its source video; None: the
            file.
        points: a clips.jsonl with `tip` for clips of the cache.

    Raises:
        UserError: labels of another taxonomy, fewer than two families, too few source videos, or points of none of
            the clips.
    """
    cached = labels_in_order(index, index.items, taxonomy)
    tips = {} if points is None else _points(points)
    items, left_out = [], 0
    for item in cached:
        families = _families(item, len(taxonomy.families))
        if not families and item.roi is None and not unlabelled_as_none:
            left_out += 1
            continue
        items.append(JudgeItem(item, families, _group(item, group), "train", _tips_of(item, tips)))
    if tips and not any(item.tips_T2 is not None for item in items):
        raise UserError(f"{points}: none of its clips is in {index.folder}; give the clips.jsonl that was cached")
    named = {k for item in items for k in item.families}
    if len(named) < 2:
        raise UserError(f"{index.folder} has labels of {len(named)} families of taxonomy {taxonomy.name}, a judge "
                        "needs two; label the clips with lapwan label and cache again, or pass --labels")
    dealt = _deal(items)
    groups = len({item.group for item in items})
    if groups < LEAST_GROUPS or any(part not in {item.part for item in dealt} for part in PARTS):
        raise UserError(f"{index.folder} has clips of {groups} source videos; a judge is trained, calibrated and "
                        f"tested on different ones, which takes {LEAST_GROUPS} at least: cache more recordings")
    canvas = _canvas(items) if size is None else Canvas(*size)
    return JudgePlan(index, dealt, taxonomy, canvas, frames, unlabelled_as_none, left_out)


def _families(item: CachedItem, count: int) -> tuple[int, ...]:
    if item.fallback:
        return ()
    if item.label_weights is not None:
        return tuple(k for k, weight in enumerate(item.label_weights) if weight >= SEEN)
    return () if item.label is None or item.label >= count else (item.label,)


def _group(item: CachedItem, pattern: str | None) -> str:
    name = item.clip or item.id
    if pattern is not None:
        match = re.search(pattern, name)
        if match is None:
            raise UserError(f"group = '{pattern}' does not match the clip {name}; write an expression that matches "
                            "every path, its first group the source video's name")
        return match[1] if match.groups() else match[0]
    return item.probe or name.partition("#t=")[0]


def _deal(items: Sequence[JudgeItem]) -> list[JudgeItem]:
    """Source videos to parts, 3 : 1 : 1 of those with the same families; a video's clips stay together."""
    families: dict[str, set[int]] = {}
    for item in items:
        families.setdefault(item.group, set()).update(item.families)
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(families, key=lambda name: hashlib.sha256(name.encode()).digest()):
        alike.setdefault(tuple(sorted(families[name])), []).append(name)
    parts = {name: PARTS[_DEAL[(i + offset) % len(_DEAL)]] for offset, names in enumerate(alike.values())
             for i, name in enumerate(names)}
    return [JudgeItem(i.item, i.families, i.group, parts[i.group], i.tips_T2) for i in items]


def _canvas(items: Sequence[JudgeItem]) -> Canvas:
    sizes = [(item.item.height, item.item.width) for item in items]
    height, width = max(sorted(set(sizes)), key=sizes.count)
    scale = min(1.0, (_AREA / (height * width)) ** 0.5)
    rows, columns = (max(2, round(side * scale / STRIDE)) * STRIDE for side in (height, width))
    return Canvas(rows, columns)


def _points(path: Path) -> dict[str, np.ndarray]:
    """`tip` of the lines by resolved path of the video."""
    points = {}
    for clip in read_clips(path):
        if clip.data.get("tip") is not None and clip.data.get("video_path") is not None:
            video = resolve_video(clip.data["video_path"], path)
            points[str(video.resolve())] = tip_points(path, clip.line, clip.data["tip"])
    if not points:
        raise UserError(f"{path} has no line with 'tip' and 'video_path'; leave --clips out, or give the file that "
                        "holds the points")
    return points


def _tips_of(item: CachedItem, points: Mapping[str, np.ndarray]) -> np.ndarray | None:
    if not points or item.clip is None:
        return None
    tips = points.get(str(Path(item.clip.partition("#t=")[0]).resolve()))
    return None if tips is None or len(tips) < item.start + item.frames else tips[item.start:item.start + item.frames]


@dataclass
class JudgeSets:
    """The clips of one part, by what they are: `reconstructed`, `source`, `none`, `unclear`."""

    by_name: dict[str, list[JudgeClips]] = field(default_factory=dict)
    sources: int = 0
    boxes: int = 0
    points: int = 0

    def add(self, name: str, clips: JudgeClips | None) -> None:
        """Add clips that are there."""
        if clips is not None:
            self.by_name.setdefault(name, []).append(clips)

    def of(self, *names: str) -> JudgeClips | None:
        """All clips of these names; None without any."""
        parts = [clips for name in names or tuple(self.by_name) for clips in self.by_name.get(name, ())]
        return joined(parts) if parts else None


class JudgeReader:
    """Reads clips of a plan.

    Args:
        plan: the clips.
        vae: decodes their latents.
        sources: also read the source files that are there.
        seed: of what is drawn.
    """

    def __init__(self, plan: JudgePlan, vae: Any, sources: bool, seed: int) -> None:
        self._plan, self._vae, self._sources, self._seed = plan, vae, sources, seed

    def read(self, part: str, advance: Callable[[], None]) -> JudgeSets:
        """Every clip of a part, and what is made of them.

        Raises:
            UserError: a file of the cache is missing or damaged.
        """
        sets, before = JudgeSets(), None
        rng = np.random.default_rng([self._seed, PARTS.index(part)])
        for entry in (entry for entry in self._plan.items if entry.part == part):
            tensors = read_item(self._plan.index.folder, entry.item)
            latents, roi = tensors["latents"], tensors["roi"]
            assert latents is not None
            region_THW = None if roi is None else self._region(entry.item, roi.float().numpy())
            self._add(sets, "reconstructed", entry, self._decoded(latents), region_THW, rng)
            if (source := self._source(entry.item)) is not None:
                sets.sources += 1
                self._add(sets, "source", entry, source, region_THW, rng)
            if entry.families and rng.uniform() < 0.5:
                sets.add("unclear", self._unclear(latents, before, rng))
            before = latents if entry.families else before
            advance()
        return sets

    def _at(self, item: CachedItem) -> np.ndarray:
        """The frames of a clip that are used; of a short one some twice."""
        return np.linspace(0, item.frames - 1, self._plan.frames).round().astype(int)

    @torch.no_grad()
    def _decoded(self, latents_CTHW: torch.Tensor) -> np.ndarray:
        return to_frames(decode(self._vae, latents_CTHW[None]))

    def _source(self, item: CachedItem) -> np.ndarray | None:
        if not self._sources or item.clip is None or item.facts is None or self._plan.index.fps is None:
            return None
        path, facts = Path(item.clip.partition("#t=")[0]), VideoFacts(**item.facts)
        if not path.exists():
            return None
        crop = centre_crop(facts.width, facts.height, (item.width, item.height))
        try:
            return read_frames(path, range(item.start, item.start + item.frames), crop, self._plan.index.fps, facts)
        except BadClip:
            return None  # the reconstruction is there

    def _region(self, item: CachedItem, roi_THW: np.ndarray) -> np.ndarray:
        """[frames, H, W] of the canvas, 0..1: the boxes at the clip's resolution of latents, frame by frame."""
        stride = -(-(item.frames - 1) // max(len(roi_THW) - 1, 1)) or 1
        cells = roi_THW[(self._at(item) + stride - 1) // stride]
        top, left, h, w = self._plan.canvas.placed(item.height, item.width)
        region = np.zeros((len(cells), self._plan.canvas.height, self._plan.canvas.width), np.float32)
        region[:, top:top + h, left:left + w] = torch.nn.functional.interpolate(
            torch.from_numpy(cells)[None], (h, w), mode="nearest")[0].numpy()
        return region

    def _add(self, sets: JudgeSets, name: str, entry: JudgeItem, frames_THWC: np.ndarray,
             region_THW: np.ndarray | None, rng: np.random.Generator) -> None:
        frames = self._plan.canvas.put(frames_THWC[self._at(entry.item)])
        state, tips = self._truth(entry, region_THW)
        sets.boxes += name == "reconstructed" and region_THW is not None
        sets.points += name == "reconstructed" and entry.tips_T2 is not None
        clip = self._clip(entry, frames, state, tips)
        sets.add("none" if (state == NONE).all() else name, clip)
        if region_THW is None or not (state == INSTRUMENT).any():
            return
        there = state == INSTRUMENT
        if (pair := covered(frames, region_THW, rng)) is not None:
            empty, twin = pair
            sets.add("none", self._clip(entry, empty, np.where(there, NONE, state), None))
            sets.add(f"{name}_covered", self._clip(entry, twin, state, tips))
        if (beside := boxes_beside(frames, region_THW, self._plan.canvas, rng)) is not None:
            sets.add("none", self._clip(entry, beside, np.where(there, NONE, state), None))

    def _clip(self, entry: JudgeItem, frames: np.ndarray, state_T: np.ndarray, tips: np.ndarray | None) -> JudgeClips:
        count = len(self._plan.taxonomy.families)
        families = np.zeros((1, count), np.float32)
        points = np.full((1, len(frames), count, 2), np.nan, np.float32)
        if (state_T == INSTRUMENT).any():
            families[0, list(entry.families)] = 1
            if tips is not None and len(entry.families) == 1:
                points[0, :, entry.families[0]] = tips
        return JudgeClips(frames[None], state_T[None], families, points)

    def _truth(self, entry: JudgeItem, region_THW: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The state of each frame (-1: unknown), and the tips: points, else the middles of the boxes."""
        count, tips = self._plan.frames, None
        if entry.tips_T2 is not None:
            tips = self._plan.canvas.to_canvas(entry.tips_T2[self._at(entry.item)], entry.item.height, entry.item.width)
        if region_THW is None:
            known = INSTRUMENT if entry.families else NONE if self._plan.unlabelled_as_none else -1
            return np.full(count, known), tips
        inside = region_THW.max(axis=(1, 2)) > 0.25
        if not inside.any():
            return np.full(count, -1 if entry.families else NONE), None
        state = np.where(inside, INSTRUMENT if entry.families else -1, NONE)
        return state, middle_of(region_THW) if tips is None else tips

    def _unclear(self, latents: torch.Tensor, before: torch.Tensor | None,
                 rng: np.random.Generator) -> JudgeClips:
        """Noise over a clip's latents, or the mean of two clips'."""
        if before is not None and before.shape == latents.shape and rng.uniform() < 0.5:
            mixed = (latents + before) / 2
        else:
            generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
            sigma = float(rng.uniform(_ALIKE, 1.0))
            mixed = (1 - sigma) * latents + sigma * torch.randn(latents.shape, generator=generator)
        frames = self._decoded(mixed)
        at = np.linspace(0, len(frames) - 1, self._plan.frames).round().astype(int)
        return unclear_clips(self._plan.canvas.put(frames[at])[None], len(self._plan.taxonomy.families))
