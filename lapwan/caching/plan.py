"""Before any decode: which cache files are there, which are stale and why, and which clips will be dropped and why.

A file is right when its recipe (what it was made from) is the one wanted now. No torch: a second run ends here.
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
    Recipe,
    latents_name,
    parse_latents_name,
    recipe_fingerprint,
    roi_name,
    text_name,
)
from lapwan.caching.stale import judge
from lapwan.data.buckets import Crop, Window, centre_crop, windows
from lapwan.data.source_clips import CacheSet, Drop, SourceClip
from lapwan.data.video import BadClip, VideoFacts, frame_files, probe
from lapwan.files import is_temporary

_HASHED = 65536  # bytes from each end of a source file
_LONGEST_STEM = 180  # bytes


@dataclass(frozen=True)
class Encoders:
    """What the plan must know of the model. `vae` and `text` are identities of weights and settings; strides are
    (temporal, spatial); dtypes are those the files are written in; `negative` is the negative prompt."""

    task: str
    fps: float
    vae: str
    text: str
    text_dim: int
    text_length: int
    latent_channels: int
    strides: tuple[int, int]
    vae_dtype: str
    latents_dtype: str
    text_dtype: str
    condition: bool
    negative: str


@dataclass(frozen=True)
class Wanted:
    """One training item to be: what to decode, how to cut it, and where its files go (`window` None: an image)."""

    clip: SourceClip
    stem: str
    facts: VideoFacts
    probe: str
    window: Window | None
    crop: Crop
    latents: str
    latents_recipe: Recipe
    text_recipe: Recipe
    roi_recipe: Recipe | None
    source_fps: float | None

    @property
    def id(self) -> str:
        """Unique in its cache folder and stable: the latents' file name without its ending."""
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
    def indices(self) -> range:
        """The frames to decode, counted at the model's rate."""
        return range(1) if self.window is None else range(self.window.start, self.window.start + self.window.frames)


@dataclass
class CachePlan:
    """What one cache folder needs. The `..._todo` carry the reason for each file; `made` are the recipes of files that
    are right, `unverified` files that are right by name and shape only; `orphans` are cache files of no clip of the
    dataset (those of a dropped clip are none: it may come back)."""

    cache: CacheSet
    encoders: Encoders
    items: list[Wanted] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    latents_todo: dict[str, tuple[Wanted, str]] = field(default_factory=dict)
    text_todo: dict[str, tuple[Wanted, str]] = field(default_factory=dict)
    roi_todo: dict[str, tuple[Wanted, str]] = field(default_factory=dict)
    prompts_todo: str | None = None
    made: dict[str, Recipe] = field(default_factory=dict)
    unverified: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return self.cache.folder

    @property
    def done(self) -> bool:
        """Nothing is to be encoded."""
        return not (self.latents_todo or self.text_todo or self.roi_todo or self.prompts_todo)

    def pixels(self) -> int:
        """Pixels of all frames to encode."""
        return sum(len(w.indices) * w.crop.bucket[0] * w.crop.bucket[1] for w, _ in self.latents_todo.values())

    def latents_bytes(self) -> int:
        """Disk that the missing latents will take."""
        return sum(latents_size(self.encoders, wanted) for wanted, _ in self.latents_todo.values())


def latents_size(encoders: Encoders, wanted: Wanted) -> int:
    """Bytes of a latents file, its header aside."""
    frames, stride = len(wanted.indices), encoders.strides[1]
    cells = ((frames - 1) // encoders.strides[0] + 1) * (wanted.crop.bucket[0] // stride)
    channels = encoders.latent_channels * (2 if encoders.condition else 1) + (4 if encoders.condition else 0)
    return channels * cells * (wanted.crop.bucket[1] // stride) * (2 if encoders.latents_dtype == "bfloat16" else 4)


def content_id(path: Path) -> str:
    """Identity of a source: size and both ends of a file; names and sizes of a folder of images. 16 hex digits.

    A change of the file's time alone is none; a change that keeps the size and both ends is not seen.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in frame_files(path):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        return digest.hexdigest()[:16]
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_HASHED))
        if size > _HASHED:
            stream.seek(max(_HASHED, size - _HASHED))
            digest.update(stream.read(_HASHED))
    return digest.hexdigest()[:16]


def make_plan(
    cache: CacheSet, encoders: Encoders, known: Mapping[str, CachedItem], latents: bool = True, text: bool = True
) -> CachePlan:
    """Compare what is wanted with what is there.

    Args:
        known: the items of an earlier index by clip path, whose facts spare a second look at unchanged files.
        latents, text: which files to make (ROI goes with the latents).
    """
    plan = CachePlan(cache, encoders, drops=list(cache.drops))
    stems = unique_stems(cache.clips)
    for clip, stem in zip(cache.clips, stems, strict=True):
        try:
            plan.items += _items_of(clip, stem, cache, encoders, known.get(str(clip.path)))
        except BadClip as error:
            plan.drops.append(Drop(clip.where, str(error), stem))
        except OSError as error:
            plan.drops.append(Drop(clip.where, f"cannot be read ({error.strerror})", stem))
    _compare(plan, latents, text)
    return plan


def unique_stems(clips: Iterable[SourceClip]) -> list[str]:
    """One stem a clip: the file's own, and for a later clip of the same stem with a hash of its path appended."""
    used: set[str] = set()
    stems = []
    for clip in clips:
        own, turn = _short(clip.path.stem), 0
        stem = own
        while stem.casefold() in used:  # some file systems do not tell A.mp4 from a.mp4
            digest = hashlib.sha256(f"{clip.path}\0{turn}".encode()).hexdigest()
            stem, turn = f"{own}-{digest[:8]}", turn + 1
        used.add(stem.casefold())
        stems.append(stem)
    return stems


def _short(stem: str) -> str:
    """A stem that leaves room for a cache file's ending and a temporary name within 255 bytes."""
    raw = stem.encode()
    if len(raw) <= _LONGEST_STEM:
        return stem
    cut = raw[: _LONGEST_STEM - 9].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(raw).hexdigest()[:8]}"


def _items_of(
    clip: SourceClip, stem: str, cache: CacheSet, encoders: Encoders, before: CachedItem | None
) -> list[Wanted]:
    extraction = cache.extraction
    identity, facts = _facts(clip, encoders.fps, extraction.source_fps, before)
    bucket = extraction.buckets.choose(facts.width, facts.height)
    crop = centre_crop(facts.width, facts.height, bucket)
    found: list[Window | None] = [None]
    if not facts.is_image:
        count = facts.count_at(encoders.fps)
        found = list(windows(count, extraction.frame_extraction, extraction.target_frames, extraction.frame_stride,
                             extraction.frame_sample, extraction.max_frames))
        if not found:
            shortest = min(extraction.target_frames)
            raise BadClip(f"too short: {count} frames at {encoders.fps:g} fps ({facts.seconds:.2f} s), "
                          f"the shortest target is {shortest}")
    return [_wanted(clip, stem, facts, identity, window, crop, encoders, extraction.source_fps) for window in found]


def _facts(
    clip: SourceClip, fps: float, source_fps: float | None, before: CachedItem | None
) -> tuple[str, VideoFacts]:
    if not clip.path.exists():
        raise BadClip("no such file")
    identity = f"{content_id(clip.path)}@{source_fps or 0:g}"
    if before is not None and before.probe == identity and before.facts is not None:
        return identity, VideoFacts(**before.facts)
    return identity, probe(clip.path, fps, source_fps)


def _wanted(
    clip: SourceClip, stem: str, facts: VideoFacts, identity: str, window: Window | None, crop: Crop,
    encoders: Encoders, source_fps: float | None,
) -> Wanted:
    cut = {
        "source": identity, "fps": encoders.fps, "window": None if window is None else list(window),
        "size": list(crop.bucket), "crop": [*crop.resized, crop.left, crop.top],
    }
    roi = None
    if clip.mask is not None:
        roi = {**cut, "mask": content_id(clip.mask)}
    elif clip.roi:
        roi = {**cut, "boxes": recipe_fingerprint({"roi": [dict(entry) for entry in clip.roi]})}
    return Wanted(
        clip=clip, stem=stem, facts=facts, probe=identity, window=window, crop=crop, source_fps=source_fps,
        latents=latents_name(stem, window, facts.width, facts.height),
        latents_recipe={**cut, "vae": encoders.vae, "computed": encoders.vae_dtype,
                        "dtype": encoders.latents_dtype, "i2v": encoders.condition},
        text_recipe={"encoder": encoders.text, "caption": clip.caption, "length": encoders.text_length,
                     "dtype": encoders.text_dtype},
        roi_recipe=roi,
    )


def prompts_recipe(encoders: Encoders) -> Recipe:
    """What the empty and the negative prompt's features are made from."""
    return {"encoder": encoders.text, "negative": encoders.negative, "length": encoders.text_length,
            "dtype": encoders.text_dtype}


def _compare(plan: CachePlan, latents: bool, text: bool) -> None:
    seen: dict[str, bool] = {}
    for wanted in plan.items:
        checks = [(wanted.latents, wanted.latents_recipe, plan.latents_todo, latents),
                  (wanted.text, wanted.text_recipe, plan.text_todo, text)]
        if wanted.roi is not None and wanted.roi_recipe is not None:
            checks.append((wanted.roi, wanted.roi_recipe, plan.roi_todo, latents))
        for name, recipe, todo, asked in checks:
            if name in seen:
                continue
            seen[name] = True
            reason = _judge(plan, name, recipe)
            if reason is not None and asked:
                todo[name] = (wanted, reason)
    if text:
        plan.prompts_todo = _judge(plan, PROMPTS_FILE, prompts_recipe(plan.encoders))
    if plan.folder.is_dir():
        dropped = {drop.stem for drop in plan.drops if drop.stem is not None}
        plan.orphans = sorted(
            name for name in (path.name for path in plan.folder.iterdir() if not is_temporary(path))
            if name.endswith((LATENTS_END, TEXT_END, ROI_END)) and name not in seen and not _of_any(name, dropped)
        )


def _judge(plan: CachePlan, name: str, recipe: Recipe) -> str | None:
    """What is wrong with a file; a right one is noted in the plan."""
    verdict = judge(plan.folder / name, recipe)
    if verdict.reason is None and verdict.recipe is not None:
        plan.made[name] = verdict.recipe
    elif verdict.reason is None:
        plan.unverified.append(name)
    return verdict.reason


def _of_any(name: str, stems: set[str]) -> bool:
    """Whether a cache file belongs to a clip of one of these stems."""
    latents = parse_latents_name(name.removesuffix(ROI_END) + LATENTS_END if name.endswith(ROI_END) else name)
    stem = name.removesuffix(TEXT_END) if latents is None else latents.stem
    return stem in stems or stem.rpartition("-")[0] in stems


def index_items(plan: CachePlan, done: Mapping[str, Recipe]) -> tuple[CachedItem, ...]:
    """The index's lines for the items whose files are all right.

    Args:
        done: recipes of the files written since the plan was made, by name.
    """
    right = {**plan.made, **done}
    there = set(right) | set(plan.unverified)
    return tuple(
        _index_item(wanted, plan.cache.repeats, right, plan.encoders.condition) for wanted in plan.items
        if {wanted.latents, wanted.text} <= there and (wanted.roi is None or wanted.roi in there)
    )


def _index_item(wanted: Wanted, repeats: int, right: Mapping[str, Recipe], condition: bool) -> CachedItem:
    """`condition` is whether files that do not say hold an image condition."""
    clip, made = wanted.clip, right.get(wanted.latents)
    files = {"latents": wanted.latents, "text": wanted.text, "roi": wanted.roi or ""}
    return CachedItem(
        id=wanted.id, latents=wanted.latents, text=wanted.text, roi=wanted.roi, caption=clip.caption,
        frames=len(wanted.indices), height=wanted.crop.bucket[1], width=wanted.crop.bucket[0],
        condition=condition if made is None else bool(made.get("i2v")), start=wanted.indices.start,
        split=clip.split, source=clip.source, clip=str(clip.path), repeats=repeats, probe=wanted.probe,
        facts=vars(wanted.facts),
        fingerprints={kind: recipe_fingerprint(right[name]) for kind, name in files.items() if name in right},
        **clip.labels,
    )


def index_path(folder: Path) -> Path:
    """The index of a cache folder."""
    return folder / INDEX_FILE
