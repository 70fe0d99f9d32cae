"""Building a cache folder, from settings to its index: lock, plan, encode, write the index and the report.

While it works, the index lists only items whose files are complete, so a killed run leaves no incomplete items behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapwan import console, files
from lapwan.caching.families import with_families
from lapwan.caching.index import CachedItem, CacheIndex, write_index
from lapwan.caching.layout import PROMPTS_FILE, CacheRecipe
from lapwan.caching.plan import CachePlan, index_items, index_path, make_plan
from lapwan.caching.read import load_index
from lapwan.caching.report import plan_rows, write_report
from lapwan.caching.stale import EncoderSpec
from lapwan.caching.stems import known_stems
from lapwan.caching.verify import damaged_files
from lapwan.data.clips import CacheSet
from lapwan.data.decoding.pixels import ReadOptions
from lapwan.data.dropped_clips import DroppedClip
from lapwan.distributed import Processes
from lapwan.errors import Interrupted, UserError
from lapwan.files import folder_lock
from lapwan.models.fingerprints import text_dtype, text_encoder_fingerprint, vae_fingerprint
from lapwan.models.spec import TEXT_LENGTH, ModelSpec
from lapwan.settings.cache import CacheSettings


@dataclass(frozen=True)
class CacheOptions:
    """What to encode and how; `takeover` allows a folder that holds the cache of another dataset; `lock`: hold the
    folder's lock; `verify`: read every file and make damaged ones again; `read`: how clips are read."""

    latents: bool = True
    text: bool = True
    device: str = "auto"
    workers: int | None = None
    batch: int | None = None
    vae_dtype: str = "float32"
    prune: bool = False
    takeover: bool = False
    lock: bool = True
    verify: bool = False
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class CacheResult:
    """What was done in a cache folder, by all processes together."""

    folder: Path
    items: int
    drops: list[DroppedClip]
    latents: int = 0
    texts: int = 0
    rois: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    pruned: int = 0


def plan_cache(cache: CacheSet, encoders: EncoderSpec, options: CacheOptions) -> tuple[CachePlan, CacheIndex | None]:
    """(the plan of a folder, its existing index).

    Raises:
        UserError: the folder is the cache of another dataset.
    """
    before = load_index(cache.folder, empty=True) if index_path(cache.folder).is_file() else None
    if before is not None:
        known = {item.clip for item in before.items if item.clip is not None}
        clips = {clip.key for clip in cache.clips}
        other_dataset = before.dataset not in (None, str(cache.dataset.absolute()))
        if other_dataset and known and not clips & known and not options.takeover:
            raise UserError(f"{cache.folder} is the cache of {before.dataset}; choose another --output, or --overwrite "
                            "to use the folder for this dataset (its files are kept unless --prune)")
    damaged = damaged_files(cache.folder) if options.verify else {}
    return make_plan(cache, encoders, before, options.latents, options.text, damaged, options.read), before


def build_cache(
    cache: CacheSet, encoders: EncoderSpec, spec: ModelSpec, options: CacheOptions, processes: Processes
) -> CacheResult:
    """Plan, encode what is missing or stale, write the index.

    Raises:
        UserError: the folder is another dataset's or in use by another process, or the disk is full.
    """
    with folder_lock(cache.folder, options.lock) if processes.first else contextlib.nullcontext():
        processes.barrier()  # no process plans before the folder is locked
        plan, before = plan_cache(cache, encoders, options)
        processes.barrier()  # and none writes before all have planned
        try:
            return _encode_and_index(plan, before, spec, options, processes)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; finished files in {cache.folder} are kept", again="") from None
        except OSError as error:
            raise UserError(f"cannot write to {cache.folder}: {error.strerror or error}; existing files are complete; "
                            "free disk space and run the same command again to continue") from None


def _encode_and_index(
    plan: CachePlan, before: CacheIndex | None, spec: ModelSpec, options: CacheOptions, processes: Processes
) -> CacheResult:
    result = CacheResult(plan.folder, len(plan.items), list(plan.drops))
    index = _index(plan, before)
    done: dict[str, CacheRecipe] = {}
    if not plan.done and plan.items:
        if processes.first:
            console.show_plan(plan_rows(plan, index.pixels_per_second))
            write_index(index)
        result, done, speed = _encode(plan, spec, options, processes, result)
        items = index_items(plan, done)
        index = replace(index, items=items, pixels_per_second=speed or index.pixels_per_second, prompts=_prompts(plan),
                        stems=_stems(plan, items, before))
    if processes.first and (index != before):
        write_index(index)
    if processes.first:
        write_report(plan, index.items, result.drops)
        _remove_superseded(plan, index)
    pruned = _prune(plan) if options.prune and processes.first else 0
    return replace(result, items=len(index.items), pruned=pruned)


def _encode(
    plan: CachePlan, spec: ModelSpec, options: CacheOptions, processes: Processes, result: CacheResult
) -> tuple[CacheResult, dict[str, CacheRecipe], float | None]:
    from lapwan.caching.encode import encode_files, encode_options

    local_plan = _local_plan(plan, processes)
    local = encode_files(local_plan, spec, encode_options(
        options.device, options.workers, options.batch, options.vae_dtype, local_plan, processes.local_rank))
    results = processes.gather(local)
    done = {name: recipe for part in results for name, recipe in part.written.items()}
    speeds = [part.pixels / part.seconds.latents for part in results if part.seconds.latents > 0 and part.pixels]
    seconds = {key: max(vars(part.seconds)[key] for part in results) for key in vars(local.seconds)}
    return (
        replace(
            result, drops=result.drops + [drop for part in results for drop in part.failures],
            latents=sum(part.latents for part in results), texts=sum(part.texts for part in results),
            rois=sum(part.rois for part in results), seconds=seconds,
        ),
        done,
        sum(speeds) or None,
    )


def _local_plan(plan: CachePlan, processes: Processes) -> CachePlan:
    """The plan of this process. Captions are divided by text, so that each is encoded once."""
    if processes.count == 1:
        return plan
    by_size = sorted(plan.latents_todo.items(), key=lambda pair: (len(pair[1][0].indices), pair[1][0].crop.bucket))
    captions = set(processes.local_items(sorted({item.clip.caption for item, _ in plan.text_todo.values()})))
    return replace(
        plan,
        latents_todo=dict(processes.local_items(by_size)),
        roi_todo=dict(processes.local_items(plan.roi_todo.items())),
        text_todo={name: todo for name, todo in plan.text_todo.items() if todo[0].clip.caption in captions},
        prompts_todo=plan.prompts_todo if processes.first else None,
    )


def _prompts(plan: CachePlan) -> str | None:
    return PROMPTS_FILE if (plan.folder / PROMPTS_FILE).is_file() else None


def _index(plan: CachePlan, before: CacheIndex | None) -> CacheIndex:
    """The index of what is up to date before anything is encoded."""
    encoders, cache, items = plan.encoders, plan.cache, index_items(plan, {})
    return with_families(CacheIndex(
        cache.folder, items, task=encoders.task, fps=encoders.fps, vae=encoders.vae,
        text_encoder=encoders.text, text_dim=encoders.text_dim, taxonomy=cache.taxonomy,
        stems=_stems(plan, items, before), dataset=str(cache.dataset.absolute()), prompts=_prompts(plan),
        pixels_per_second=before.pixels_per_second if before else None,
    ), [clip.labels for clip in cache.clips])


def _stems(plan: CachePlan, items: Sequence[CachedItem], before: CacheIndex | None) -> dict[str, str]:
    """The stems of the dataset's clips that have no item: not encoded yet, or dropped this time."""
    clips, cached = {clip.key for clip in plan.cache.clips}, {item.clip for item in items}
    stems = {path: earlier[0] for path, earlier in known_stems(before).items() if path in clips}
    stems |= {item.clip.key: item.stem for item in reversed(plan.items)}
    return {path: stem for path, stem in stems.items() if path not in cached}


def _remove_superseded(plan: CachePlan, index: CacheIndex) -> None:
    """Delete lapwan's files of a window in another size, once the file that takes their place is there.

    musubi-tuner would take both for items.
    """
    cached = {name for item in index.items for name in (item.latents, item.roi)}
    for name, successor in plan.superseded.items():
        if successor in cached:
            (plan.folder / name).unlink(missing_ok=True)


def _prune(plan: CachePlan) -> int:
    """Delete the files of clips that are no longer in the dataset, and temporary files of killed runs."""
    # Files of older versions, which locked no temporary; the folder's lock is held.
    temporary = [path for path in plan.folder.iterdir() if files.is_temporary(path) and path.is_file()]
    for path in [*temporary, *(plan.folder / name for name in plan.orphans)]:
        path.unlink(missing_ok=True)
    return len(temporary) + len(plan.orphans)


def encoders_from_settings(settings: CacheSettings, spec: ModelSpec) -> EncoderSpec:
    """The encoders of a model, and the dtypes of the files."""
    stored = text_dtype(spec)
    return EncoderSpec(
        task=spec.task, fps=float(spec.defaults.fps), vae=vae_fingerprint(spec), text=text_encoder_fingerprint(spec),
        text_dim=spec.text_dim, text_length=TEXT_LENGTH, latent_channels=spec.latent_channels,
        strides=(spec.temporal_stride, spec.spatial_stride), vae_dtype=settings.vae_dtype,
        latents_dtype="float32" if settings.dtype == "auto" else settings.dtype,
        text_dtype=stored if settings.dtype == "auto" else settings.dtype,
        condition=spec.image_channels > 0, last_image=settings.last_image, negative=settings.negative_prompt,
    )
