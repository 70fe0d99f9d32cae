"""One writer at a time in a cache folder. The lock goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapwan import console, files
from lapwan.caching.index import CachedItem, CacheIndex, write_index
from lapwan.caching.layout import PROMPTS_FILE, Recipe
from lapwan.caching.plan import CachePlan, Encoders, index_items, index_path, make_plan
from lapwan.caching.read import load_index
from lapwan.caching.report import plan_lines, write_report
from lapwan.data.buckets import Buckets
from lapwan.data.source_clips import CacheSet, Drop, Extraction
from lapwan.distributed import Processes
from lapwan.errors import Interrupted, UserError
from lapwan.models.fingerprints import text_dtype, text_identity, vae_identity
from lapwan.models.spec import TEXT_LENGTH, ModelSpec, check_frames, check_size
from lapwan.settings.cache import CacheSettings

LOCK_FILE = ".lapwan_cache.lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; wait, and say so, while another process has it.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.log(f"another process is caching into {folder}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

@dataclass(frozen=True)
class Choices:
    """What to make and how; `takeover`: the folder may hold the cache of another dataset."""

    latents: bool = True
    text: bool = True
    device: str = "auto"
    workers: int | None = None
    batch: int | None = None
    vae_dtype: str = "float32"
    prune: bool = False
    takeover: bool = False


@dataclass(frozen=True)
class Result:
    """What became of one cache folder, for all processes together."""

    folder: Path
    items: int
    drops: list[Drop]
    latents: int = 0
    texts: int = 0
    rois: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    pruned: int = 0


def plan_set(cache: CacheSet, encoders: Encoders, choices: Choices) -> tuple[CachePlan, CacheIndex | None]:
    """The plan of a folder, with the index that is there.

    Raises:
        UserError: the folder is the cache of another dataset.
    """
    before = load_index(cache.folder, empty=True) if index_path(cache.folder).is_file() else None
    known: dict[str, CachedItem] = {}
    if before is not None:
        known = {item.clip: item for item in before.items if item.clip is not None}
        ours = {str(clip.path) for clip in cache.clips}
        other = before.dataset not in (None, str(cache.dataset.absolute()))
        if other and known and not ours & set(known) and not choices.takeover:
            raise UserError(f"{cache.folder} is the cache of {before.dataset}; choose another --output, or --overwrite "
                            "to take the folder over (its files stay unless --prune)")
    return make_plan(cache, encoders, known, choices.latents, choices.text), before


def cache_set(cache: CacheSet, encoders: Encoders, spec: ModelSpec, choices: Choices, processes: Processes) -> Result:
    """Plan, encode what is missing or stale, write the index.

    While it works the index lists only items whose files are all right, so that a kill leaves nothing wrong to use.

    Raises:
        UserError: the folder is another dataset's, or the disk is full.
    """
    with folder_lock(cache.folder) if processes.first else contextlib.nullcontext():
        processes.barrier()  # nobody plans before the folder is ours
        plan, before = plan_set(cache, encoders, choices)
        processes.barrier()  # and nobody writes before all have planned
        try:
            return _carry_out(plan, before, spec, choices, processes)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; what is cached in {cache.folder} stays: "
                              "run the same command again to go on") from None
        except OSError as error:
            raise UserError(f"cannot write to {cache.folder}: {error.strerror or error}; what is there is whole: "
                            "make room and run the same command again to go on") from None


def _carry_out(
    plan: CachePlan, before: CacheIndex | None, spec: ModelSpec, choices: Choices, processes: Processes
) -> Result:
    result = Result(plan.folder, len(plan.items), list(plan.drops))
    index = _index(plan, {}, before.pixels_per_second if before else None)
    done: dict[str, Recipe] = {}
    if not plan.done and plan.items:
        for line in plan_lines(plan, index.pixels_per_second) if processes.first else ():
            console.log(line)
        if processes.first:
            write_index(index)
        result, done, speed = _encode(plan, spec, choices, processes, result)
        index = replace(index, items=index_items(plan, done), pixels_per_second=speed or index.pixels_per_second,
                        prompts=_prompts(plan))
    if processes.first and (index != before):
        write_index(index)
    if processes.first:
        write_report(plan, index.items, result.drops)
    pruned = _prune(plan) if choices.prune and processes.first else 0
    return replace(result, items=len(index.items), pruned=pruned)


def _encode(
    plan: CachePlan, spec: ModelSpec, choices: Choices, processes: Processes, result: Result
) -> tuple[Result, dict[str, Recipe], float | None]:
    from lapwan.caching.encode import carry_out, how_to

    ours = _share(plan, processes)
    outcome = carry_out(ours, spec, how_to(choices.device, choices.workers, choices.batch, choices.vae_dtype, ours,
                                           processes.local))
    outcomes = processes.gather(outcome)
    done = {name: recipe for one in outcomes for name, recipe in one.written.items()}
    speeds = [one.pixels / one.seconds.latents for one in outcomes if one.seconds.latents > 0 and one.pixels]
    seconds = {key: max(vars(one.seconds)[key] for one in outcomes) for key in vars(outcome.seconds)}
    return (
        replace(
            result, drops=result.drops + [drop for one in outcomes for drop in one.failures],
            latents=sum(one.latents for one in outcomes), texts=sum(one.texts for one in outcomes),
            rois=sum(one.rois for one in outcomes), seconds=seconds,
        ),
        done,
        sum(speeds) or None,
    )


def _share(plan: CachePlan, processes: Processes) -> CachePlan:
    """This process's part of the work. Captions go by their text, so that each is encoded once."""
    if processes.count == 1:
        return plan
    by_size = sorted(plan.latents_todo.items(), key=lambda pair: (len(pair[1][0].indices), pair[1][0].crop.bucket))
    captions = set(processes.own(sorted({wanted.clip.caption for wanted, _ in plan.text_todo.values()})))
    return replace(
        plan,
        latents_todo=dict(processes.own(by_size)),
        roi_todo=dict(processes.own(plan.roi_todo.items())),
        text_todo={name: todo for name, todo in plan.text_todo.items() if todo[0].clip.caption in captions},
        prompts_todo=plan.prompts_todo if processes.first else None,
    )


def _prompts(plan: CachePlan) -> str | None:
    return PROMPTS_FILE if (plan.folder / PROMPTS_FILE).is_file() else None


def _index(plan: CachePlan, done: dict[str, Recipe], speed: float | None) -> CacheIndex:
    encoders, cache = plan.encoders, plan.cache
    return CacheIndex(
        cache.folder, index_items(plan, done), task=encoders.task, fps=encoders.fps, vae=encoders.vae,
        text_encoder=encoders.text, text_dim=encoders.text_dim, taxonomy=cache.taxonomy,
        dataset=str(cache.dataset.absolute()), prompts=_prompts(plan), pixels_per_second=speed,
    )


def _prune(plan: CachePlan) -> int:
    """Delete files of clips that are no longer in the dataset, and what killed runs left under temporary names."""
    left = [path for path in plan.folder.iterdir() if files.is_temporary(path)]
    for path in [*left, *(plan.folder / name for name in plan.orphans)]:
        path.unlink(missing_ok=True)
    return len(left) + len(plan.orphans)


# What a dataset.toml says itself.
_OF_DATASET = ("size", "num_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps",
               "buckets", "bucket_no_upscale")


def extraction_of(settings: CacheSettings, spec: ModelSpec) -> Extraction:
    """How clips are cut; size and frames default to the model's own.

    Raises:
        UserError: frames not 4N+1, or a size the model does not take.
    """
    if settings.dataset is not None and settings.dataset.suffix.lower() in (".toml", ".json"):
        said = [name for name in _OF_DATASET if getattr(settings, name) != CacheSettings.model_fields[name].default]
        if said:
            raise UserError(f"{', '.join(said)}: with a dataset file, say it in {settings.dataset} "
                            "(resolution, target_frames, frame_extraction, ...)")
    height, width = settings.size or spec.defaults.size
    check_size(height, width, spec.pixel_multiple)
    frames = settings.num_frames or (spec.defaults.num_frames,)
    for count in frames:
        check_frames(count, spec.temporal_stride)
    return Extraction(
        Buckets((width, height), settings.buckets, settings.bucket_no_upscale, spec.pixel_multiple), frames,
        settings.frame_extraction, settings.frame_stride, settings.frame_sample, settings.max_frames,
        settings.source_fps,
    )


def encoders_of(settings: CacheSettings, spec: ModelSpec) -> Encoders:
    """What the plan must know of the model and of how files are written.

    Raises:
        UserError: a model that this version does not train.
    """
    if spec.task == "ti2v":
        raise UserError(f"{spec.path} is a TI2V-5B model, which this version generates with but does not train; "
                        "cache with Wan2.2 T2V-A14B or I2V-A14B")
    stored = text_dtype(spec)
    return Encoders(
        task=spec.task, fps=float(spec.defaults.fps), vae=vae_identity(spec), text=text_identity(spec),
        text_dim=spec.text_dim, text_length=TEXT_LENGTH, latent_channels=spec.latent_channels,
        strides=(spec.temporal_stride, spec.spatial_stride), vae_dtype=settings.vae_dtype,
        latents_dtype="float32" if settings.dtype == "auto" else settings.dtype,
        text_dtype=stored if settings.dtype == "auto" else settings.dtype,
        condition=spec.task == "i2v", negative=settings.negative_prompt,
    )
