"""The plan of a cache folder, before any decoding: items, files to make and why, and clips to drop and why.

A file is up to date if its recipe is the one wanted now (`stale.py`). No torch: a run with nothing to encode ends here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapwan.caching.index import INDEX_FILE, CachedItem, CacheIndex
from lapwan.caching.layout import (
    LATENTS_END,
    PROMPTS_FILE,
    ROI_END,
    TEXT_END,
    CacheRecipe,
    LatentsName,
    latents_name,
    parse_latents_name,
    recipe_fingerprint,
    roi_name,
    text_name,
)
from lapwan.caching.stale import (
    EncoderSpec,
    FileCheck,
    check_file,
    frames_recipe,
    is_ours,
    latents_recipe,
    prompts_recipe,
    roi_recipe,
    source_fingerprint,
    text_recipe,
)
from lapwan.caching.stems import known_stems, unique_stems
from lapwan.data.buckets import Crop, centre_crop
from lapwan.data.clip_file import encodable
from lapwan.data.clips import CacheSet, SourceClip
from lapwan.data.decoding.pixels import ReadOptions
from lapwan.data.dropped_clips import BadClip, DroppedClip
from lapwan.data.frame_extraction import Extraction, Window
from lapwan.data.video import VideoFacts, probe
from lapwan.files import is_temporary


@dataclass(frozen=True)
class PlannedItem:
    """A training item to cache: frames to decode, their crop, and its files. `window` None is an image.

    `id` is stem, window and source size: unique in the cache folder, and the same whatever its files are called.
    """

    id: str
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
    `unverified` the files that fit by name and shape only. Of the files that no item uses, `orphans` are those that
    lapwan made for no clip of the dataset, `foreign` those of another tool, and `superseded` lapwan's files of the same
    window in another size, each with the file that takes its place. Files of a dropped clip are none of these: it may
    come back.
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
    foreign: list[str] = field(default_factory=list)
    superseded: dict[str, str] = field(default_factory=dict)

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
    cache: CacheSet, encoders: EncoderSpec, before: CacheIndex | None, latents: bool = True, text: bool = True,
    damaged: Mapping[str, str] | None = None, read: ReadOptions | None = None,
) -> CachePlan:
    """Compare what the dataset needs with the files of the cache folder.

    Args:
        before: the earlier index: its clips keep their stems, and unchanged ones are not probed again.
        latents, text: which files to make; regions are made with the latents.
        damaged: files to make again whatever their headers say, with the reason.
        read: how clips are read; the default is that of `ReadOptions`.
    """
    plan = CachePlan(cache, encoders, drops=list(cache.drops))
    known = {item.clip: item for item in before.items if item.clip is not None} if before is not None else {}
    checked = _CheckedFiles(cache.folder, damaged or {}, encoders.latent_channels)
    names: set[str] = set()
    for clip, stem in zip(cache.clips, unique_stems(cache.clips, known_stems(before)), strict=True):
        try:
            items = _items_of(clip, stem, cache, encoders, known.get(clip.key), checked, read or ReadOptions())
            if taken := next((item.latents for item in items if item.latents.casefold() in names), None):
                raise BadClip(f"another clip's cache file is called {taken} too; rename this one")
        except BadClip as error:
            plan.drops.append(_dropped(clip, str(error), stem))
        except OSError as error:
            plan.drops.append(_dropped(clip, f"cannot be read ({error.strerror})", stem))
        else:
            plan.items += items
            names |= {item.latents.casefold() for item in items}
    _compare(plan, checked, latents, text)
    return plan


def _dropped(clip: SourceClip, reason: str, stem: str) -> DroppedClip:
    return DroppedClip(encodable(clip.name), reason, stem)  # a file name may hold bytes of another encoding


class _CheckedFiles:
    """Checks cache files, each once."""

    def __init__(self, folder: Path, damaged: Mapping[str, str], channels: int) -> None:
        self._folder, self._damaged, self._channels = folder, damaged, channels
        self._checks: dict[tuple[str, str], FileCheck] = {}

    def check(self, name: str, recipe: CacheRecipe) -> FileCheck:
        """Compare a file with the recipe wanted."""
        if name in self._damaged:
            return FileCheck(self._damaged[name])
        key = name, recipe_fingerprint(recipe)
        if key not in self._checks:
            self._checks[key] = check_file(self._folder / name, recipe, self._channels)
        return self._checks[key]


def _items_of(
    clip: SourceClip, stem: str, cache: CacheSet, encoders: EncoderSpec, before: CachedItem | None,
    checked: _CheckedFiles, read: ReadOptions,
) -> list[PlannedItem]:
    extraction = cache.extraction
    source, facts = _facts(clip, encoders.fps, extraction.source_fps or clip.fps, before, read)
    windows: list[Window | None] = [None]
    if not facts.is_image:
        count = facts.count_at(encoders.fps)
        windows = list(extraction.windows(count))
        if not windows:
            shortest = min(extraction.target_frames)
            raise BadClip(f"too short: {count} frames at {encoders.fps:g} fps ({facts.seconds:.2f} s), "
                          f"the shortest target is {shortest}")
    items = []
    for window in windows:
        item = _planned_item(clip, stem, facts, source, window, encoders, extraction)
        earlier = (other for other in _earlier_files(item, encoders, extraction)
                   if checked.check(other.latents, other.latents_recipe).reason is None)
        if checked.check(item.latents, item.latents_recipe).reason is not None:
            item = next(earlier, item)
        items.append(item)
    return items


def _facts(
    clip: SourceClip, fps: float, source_fps: float | None, before: CachedItem | None, read: ReadOptions
) -> tuple[str, VideoFacts]:
    """(fingerprint of the source with its frame rate, its facts, from the earlier index if unchanged)."""
    try:
        str(clip.path).encode()
    except UnicodeEncodeError:
        raise BadClip("its file name is not UTF-8; rename it") from None
    if not clip.path.exists():
        raise BadClip("no such file")
    source = f"{source_fingerprint(clip.path)}@{source_fps or 0:g}"
    # Facts of older versions lack the traits, by which fields, HDR and transparency are known.
    if before is not None and before.probe == source and (before.facts or {}).get("traits") is not None:
        return source, VideoFacts(**before.facts or {}).read_with(read)
    facts = probe(clip.path, fps, source_fps, read, clip.still)
    return source, facts if clip.start is None else facts.part(clip.start, clip.duration)


def _planned_item(
    clip: SourceClip, stem: str, facts: VideoFacts, source: str, window: Window | None, encoders: EncoderSpec,
    extraction: Extraction,
) -> PlannedItem:
    size = facts.width, facts.height
    crop = centre_crop(*size, extraction.buckets.choose(*size))
    frames = frames_recipe(source, window, crop, encoders.fps, facts)
    return PlannedItem(
        id=latents_name(stem, window, *size).removesuffix(LATENTS_END), clip=clip, stem=stem, facts=facts, probe=source,
        window=window, crop=crop, source_fps=extraction.source_fps or clip.fps,
        latents=latents_name(stem, window, *(size if window is None else crop.bucket)),
        latents_recipe=latents_recipe(frames, encoders), text_recipe=text_recipe(clip.caption, encoders),
        roi_recipe=roi_recipe(frames, clip),
    )


def _earlier_files(item: PlannedItem, encoders: EncoderSpec, extraction: Extraction) -> Iterator[PlannedItem]:
    """The item under the names and in the bucket that older versions gave it: their files stay valid.

    They named a video's latents after the source's size, and took `enable_bucket` of a musubi dataset at its word.
    """
    size = item.facts.width, item.facts.height
    for buckets in (extraction.buckets, extraction.earlier_buckets):
        if buckets is None:
            continue
        crop = centre_crop(*size, buckets.choose(*size))
        frames = frames_recipe(item.probe, item.window, crop, encoders.fps, item.facts)
        for width, height in (crop.bucket, size):
            name = latents_name(item.stem, item.window, width, height)
            if name != item.latents or crop != item.crop:
                yield replace(item, crop=crop, latents=name, latents_recipe=latents_recipe(frames, encoders),
                              roi_recipe=roi_recipe(frames, item.clip))


def _compare(plan: CachePlan, files: _CheckedFiles, latents: bool, text: bool) -> None:
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
            reason = _enter(plan, name, files.check(name, recipe))
            if reason is not None and requested:
                todo[name] = (item, reason)
    if text:
        plan.prompts_todo = _enter(plan, PROMPTS_FILE, files.check(PROMPTS_FILE, prompts_recipe(plan.encoders)))
    if plan.folder.is_dir():
        _classify_others(plan, checked)


def _enter(plan: CachePlan, name: str, check: FileCheck) -> str | None:
    """Why a file must be made; one that is up to date is entered into the plan."""
    if check.reason is None and check.recipe is not None:
        plan.made[name] = check.recipe
    elif check.reason is None:
        plan.unverified.append(name)
    return check.reason


def _classify_others(plan: CachePlan, planned: set[str]) -> None:
    """Sort the cache files that no item uses: superseded, orphans, another tool's, or those of a dropped clip."""
    dropped = {drop.stem for drop in plan.drops if drop.stem is not None}
    latents = {(item.stem, item.window): item for item in plan.items}
    for path in sorted(plan.folder.iterdir()):
        if path.name in planned or is_temporary(path) or not path.name.endswith((LATENTS_END, TEXT_END, ROI_END)):
            continue
        name = _latents_of(path.name)
        if not is_ours(path):
            plan.foreign.append(path.name)
        elif name is not None and (item := latents.get((name.stem, name.window))) is not None:
            plan.superseded[path.name] = (item.roi or item.latents) if path.name.endswith(ROI_END) else item.latents
        elif not _belongs_to(path.name, dropped):
            plan.orphans.append(path.name)


def _latents_of(name: str) -> LatentsName | None:
    """The parts of a latents file's name, or of the region's beside it; None of a text file's."""
    return parse_latents_name(name.removesuffix(ROI_END) + LATENTS_END if name.endswith(ROI_END) else name)


def _belongs_to(name: str, stems: set[str]) -> bool:
    """Whether a cache file belongs to a clip of one of these stems."""
    latents = _latents_of(name)
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
        condition=condition if made is None else bool(made.get("i2v")),
        last_image=True if made is not None and made.get("last_image") else None, start=item.indices.start,
        split=clip.split, source=clip.source, clip=clip.key, repeats=repeats, probe=item.probe,
        facts=vars(item.facts),
        fingerprints={kind: recipe_fingerprint(recipes[name]) for kind, name in files.items() if name in recipes},
        **clip.labels,
    )


def index_path(folder: Path) -> Path:
    """The index of a cache folder."""
    return folder / INDEX_FILE
