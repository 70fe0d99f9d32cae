"""The plan of a cache folder, before any decoding: items, files to make and why, and clips to drop and why.

A file is up to date if its recipe is the one wanted now (`stale.py`). No torch: a run with nothing to encode ends here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lapwan.caching.index import INDEX_FILE, CachedItem
from lapwan.caching.layout import (
    LATENTS_END,
    PROMPTS_FILE,
    ROI_END,
    TEXT_END,
    CacheRecipe,
    latents_name,
    parse_latents_name,
    recipe_fingerprint,
    roi_name,
    text_name,
)
from lapwan.caching.stale import (
    EncoderSpec,
    check_file,
    frames_recipe,
    latents_recipe,
    prompts_recipe,
    roi_recipe,
    source_fingerprint,
    text_recipe,
)
from lapwan.data.buckets import Crop, centre_crop
from lapwan.data.clips import CacheSet, SourceClip
from lapwan.data.dropped_clips import BadClip, DroppedClip
from lapwan.data.frame_extraction import Window
from lapwan.data.pixels import ReadOptions
from lapwan.data.video import VideoFacts, probe
from lapwan.files import is_temporary

_LONGEST_STEM = 180  # bytes


@dataclass(frozen=True)
class PlannedItem:
    """A training item to cache: frames to decode, their crop, and its files. `window` None is an image."""

    clip: SourceClip
    stem: str
    facts: VideoFacts
    probe: str
    window: Window | None
    crop: Crop
    latents: str
    latents_recipe: CacheRecipe
    text_recipe: CacheRecipe
    roi_recipe: CacheRecipe | None
    source_fps: float | None

    @property
    def id(self) -> str:
        """The latents' file name without its ending: unique in the cache folder, and stable."""
        return self.latents.removesuffix(LATENTS_END)

    @property
    def text(self) -> str:
        """The text file's name."""
        return text_name(self.stem)

    @property
    def roi(self) -> str | None:
        """The ROI file's name, if the clip has a region."""
        return None if self.roi_recipe is None else roi_name(self.latents)

    @property
    def pixels(self) -> int:
        """The number of pixels in its frames."""
        return len(self.indices) * self.crop.bucket[0] * self.crop.bucket[1]

    @property
    def indices(self) -> range:
        """The frames to decode, counted at the model's rate."""
        return range(1) if self.window is None else range(self.window.start, self.window.start + self.window.frames)


@dataclass
class CachePlan:
    """What a cache folder needs.

    The `..._todo` hold the item and the reason for each file to make; `made` the recipes of files that are up to date;
    `unverified` the files that fit by name and shape only; `orphans` the cache files that belong to no clip of the
    dataset. Files of a dropped clip are not orphans: it may come back.
    """

    cache: CacheSet
    encoders: EncoderSpec
    items: list[PlannedItem] = field(default_factory=list)
    drops: list[DroppedClip] = field(default_factory=list)
    latents_todo: dict[str, tuple[PlannedItem, str]] = field(default_factory=dict)
    text_todo: dict[str, tuple[PlannedItem, str]] = field(default_factory=dict)
    roi_todo: dict[str, tuple[PlannedItem, str]] = field(default_factory=dict)
    prompts_todo: str | None = None
    made: dict[str, CacheRecipe] = field(default_factory=dict)
    unverified: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return self.cache.folder

    @property
    def done(self) -> bool:
        """Whether nothing has to be encoded."""
        return not (self.latents_todo or self.text_todo or self.roi_todo or self.prompts_todo)

    def pixels(self) -> int:
        """The number of pixels in all frames to encode."""
        return sum(item.pixels for item, _ in self.latents_todo.values())

    def latents_bytes(self) -> int:
        """Bytes that the latents to encode will take on disk."""
        return sum(latents_size(self.encoders, item) for item, _ in self.latents_todo.values())


def latents_size(encoders: EncoderSpec, item: PlannedItem) -> int:
    """Bytes of a latents file without its header."""
    frames, stride = len(item.indices), encoders.strides[1]
    cells = ((frames - 1) // encoders.strides[0] + 1) * (item.crop.bucket[0] // stride)
    channels = encoders.latent_channels
    if encoders.condition:
        channels += encoders.strides[0] + encoders.latent_channels  # mask and condition
    return channels * cells * (item.crop.bucket[1] // stride) * (2 if encoders.latents_dtype == "bfloat16" else 4)


def make_plan(
    cache: CacheSet, encoders: EncoderSpec, known: Mapping[str, CachedItem], latents: bool = True, text: bool = True,
    read: ReadOptions | None = None,
) -> CachePlan:
    """Compare what the dataset needs with the files of the cache folder.

    Args:
        known: the items of an earlier index by clip path; unchanged clips are not probed again.
        latents, text: which files to make; regions are made with the latents.
        read: how clips are read; the default is that of `ReadOptions`.
    """
    plan = CachePlan(cache, encoders, drops=list(cache.drops))
    stems = unique_stems(cache.clips)
    for clip, stem in zip(cache.clips, stems, strict=True):
        try:
            plan.items += _items_of(clip, stem, cache, encoders, known.get(clip.key), read or ReadOptions())
        except BadClip as error:
            plan.drops.append(DroppedClip(clip.name, str(error), stem))
        except OSError as error:
            plan.drops.append(DroppedClip(clip.name, f"cannot be read ({error.strerror})", stem))
    _compare(plan, latents, text)
    return plan


def unique_stems(clips: Iterable[SourceClip]) -> list[str]:
    """One stem per clip: that of its file, with a hash of the path appended if an earlier clip has the same."""
    used: set[str] = set()
    stems = []
    for clip in clips:
        base, attempt = _short(clip.stem), 0
        stem = base
        while stem.casefold() in used:  # some file systems do not tell A.mp4 from a.mp4
            digest = hashlib.sha256(f"{clip.key}\0{attempt}".encode()).hexdigest()
            stem, attempt = f"{base}-{digest[:8]}", attempt + 1
        used.add(stem.casefold())
        stems.append(stem)
    return stems


def _short(stem: str) -> str:
    """The stem, shortened so that cache and temporary file names stay within 255 bytes."""
    raw = stem.encode()
    if len(raw) <= _LONGEST_STEM:
        return stem
    cut = raw[: _LONGEST_STEM - 9].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(raw).hexdigest()[:8]}"


def _items_of(
    clip: SourceClip, stem: str, cache: CacheSet, encoders: EncoderSpec, before: CachedItem | None, read: ReadOptions
) -> list[PlannedItem]:
    extraction = cache.extraction
    source_fps = extraction.source_fps or clip.fps
    source, facts = _facts(clip, encoders.fps, source_fps, before, read)
    bucket = extraction.buckets.choose(facts.width, facts.height)
    crop = centre_crop(facts.width, facts.height, bucket)
    windows: list[Window | None] = [None]
    if not facts.is_image:
        count = facts.count_at(encoders.fps)
        windows = list(extraction.windows(count))
        if not windows:
            shortest = min(extraction.target_frames)
            raise BadClip(f"too short: {count} frames at {encoders.fps:g} fps ({facts.seconds:.2f} s), "
                          f"the shortest target is {shortest}")
    return [_planned_item(clip, stem, facts, source, window, crop, encoders, source_fps)
            for window in windows]


def _facts(
    clip: SourceClip, fps: float, source_fps: float | None, before: CachedItem | None, read: ReadOptions
) -> tuple[str, VideoFacts]:
    """(fingerprint of the source with its frame rate, its facts, from the earlier index if unchanged)."""
    if not clip.path.exists():
        raise BadClip("no such file")
    source = f"{source_fingerprint(clip.path)}@{source_fps or 0:g}"
    # Facts of older versions lack the traits, by which fields, HDR and transparency are known.
    if before is not None and before.probe == source and (before.facts or {}).get("traits") is not None:
        return source, VideoFacts(**before.facts or {}).read_with(read)
    facts = probe(clip.path, fps, source_fps, read, clip.still)
    return source, facts if clip.start is None else facts.part(clip.start, clip.duration)


def _planned_item(
    clip: SourceClip, stem: str, facts: VideoFacts, source: str, window: Window | None, crop: Crop,
    encoders: EncoderSpec, source_fps: float | None,
) -> PlannedItem:
    frames = frames_recipe(source, window, crop, encoders.fps, facts)
    return PlannedItem(
        clip=clip, stem=stem, facts=facts, probe=source, window=window, crop=crop, source_fps=source_fps,
        latents=latents_name(stem, window, facts.width, facts.height),
        latents_recipe=latents_recipe(frames, encoders), text_recipe=text_recipe(clip.caption, encoders),
        roi_recipe=roi_recipe(frames, clip),
    )


def _compare(plan: CachePlan, latents: bool, text: bool) -> None:
    checked: set[str] = set()
    for item in plan.items:
        checks = [(item.latents, item.latents_recipe, plan.latents_todo, latents),
                  (item.text, item.text_recipe, plan.text_todo, text)]
        if item.roi is not None and item.roi_recipe is not None:
            checks.append((item.roi, item.roi_recipe, plan.roi_todo, latents))
        for name, recipe, todo, requested in checks:
            if name in checked:
                continue
            checked.add(name)
            reason = _check(plan, name, recipe)
            if reason is not None and requested:
                todo[name] = (item, reason)
    if text:
        plan.prompts_todo = _check(plan, PROMPTS_FILE, prompts_recipe(plan.encoders))
    if plan.folder.is_dir():
        dropped = {drop.stem for drop in plan.drops if drop.stem is not None}
        names = {path.name for path in plan.folder.iterdir() if not is_temporary(path)}
        plan.orphans = sorted(name for name in names - checked if name.endswith((LATENTS_END, TEXT_END, ROI_END))
                              and not _belongs_to(name, dropped))


def _check(plan: CachePlan, name: str, recipe: CacheRecipe) -> str | None:
    """Why a file must be made; one that is up to date is entered into the plan."""
    result = check_file(plan.folder / name, recipe)
    if result.reason is None and result.recipe is not None:
        plan.made[name] = result.recipe
    elif result.reason is None:
        plan.unverified.append(name)
    return result.reason


def _belongs_to(name: str, stems: set[str]) -> bool:
    """Whether a cache file belongs to a clip of one of these stems."""
    latents = parse_latents_name(name.removesuffix(ROI_END) + LATENTS_END if name.endswith(ROI_END) else name)
    stem = name.removesuffix(TEXT_END) if latents is None else latents.stem
    return stem in stems or stem.rpartition("-")[0] in stems


def index_items(plan: CachePlan, done: Mapping[str, CacheRecipe]) -> tuple[CachedItem, ...]:
    """The index's entries for the items whose files are all up to date.

    Args:
        done: recipes of the files written since the plan was made, by name.
    """
    recipes = {**plan.made, **done}
    usable = set(recipes) | set(plan.unverified)
    return tuple(
        _index_item(item, plan.cache.repeats, recipes, plan.encoders.condition) for item in plan.items
        if {item.latents, item.text} <= usable and (item.roi is None or item.roi in usable)
    )


def _index_item(item: PlannedItem, repeats: int, recipes: Mapping[str, CacheRecipe], condition: bool) -> CachedItem:
    """`condition`: whether files without a recipe hold an image condition."""
    clip, made = item.clip, recipes.get(item.latents)
    files = {"latents": item.latents, "text": item.text, "roi": item.roi or ""}
    return CachedItem(
        id=item.id, latents=item.latents, text=item.text, roi=item.roi, caption=clip.caption,
        frames=len(item.indices), height=item.crop.bucket[1], width=item.crop.bucket[0],
        condition=condition if made is None else bool(made.get("i2v")), start=item.indices.start,
        split=clip.split, source=clip.source, clip=clip.key, repeats=repeats, probe=item.probe,
        facts=vars(item.facts),
        fingerprints={kind: recipe_fingerprint(recipes[name]) for kind, name in files.items() if name in recipes},
        **clip.labels,
    )


def index_path(folder: Path) -> Path:
    """The index of a cache folder."""
    return folder / INDEX_FILE
