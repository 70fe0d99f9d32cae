"""`lapwan cache`: clips and captions to latents and text features."""

from __future__ import annotations

from pathlib import Path

from lapwan import console
from lapwan.commands.model import resolve
from lapwan.data.buckets import Buckets
from lapwan.data.cachefile import CachedItem, CacheIndex, load_index, write_index
from lapwan.data.layout import PROMPTS_FILE
from lapwan.data.plan import Encoders, Plan, index_item, index_path, make_plan
from lapwan.data.report import drop_lines, plan_lines
from lapwan.data.sources import CacheSet, Drop, Extraction, read_dataset
from lapwan.errors import UserError
from lapwan.settings.base import to_toml
from lapwan.settings.cache import CacheSettings
from lapwan.settings.run import RunOptions
from lapwan.wan.folder import TEXT_LENGTH, ModelSpec, check_frames, check_size
from lapwan.wan.identity import text_dtype, text_identity, vae_identity


def run(settings: CacheSettings, options: RunOptions) -> None:
    """Plan, encode what is missing or stale, write the index, report."""
    spec = resolve(settings.model, None if settings.i2v is None else "i2v" if settings.i2v else "t2v")
    encoders = encoders_of(settings, spec)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False, end="")
    drops: list[Drop] = []
    for cache in read_dataset(settings.dataset, settings.output, extraction_of(settings, spec)):
        drops += _cache(cache, encoders, settings, spec, options)
    if drops and not settings.skip_bad and not options.dry_run:
        for line in drop_lines(drops):
            console.log(line.strip())
        first = f": {drops[0].where}: {drops[0].reason}" if len(drops) == 1 else ", listed above"
        raise UserError(f"{len(drops)} of the clips could not be cached{first}; all others are done; "
                        "mend or remove them, or pass --skip-bad")


def extraction_of(settings: CacheSettings, spec: ModelSpec) -> Extraction:
    """How clips are cut; size and frames default to the model's own.

    Raises:
        UserError: frames not 4N+1, or a size the model does not take.
    """
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
    """What the plan must know of the model and of how files are written."""
    stored = text_dtype(spec)
    return Encoders(
        task=spec.task, fps=float(spec.defaults.fps), vae=vae_identity(spec), text=text_identity(spec),
        text_dim=spec.text_dim, text_length=TEXT_LENGTH, latent_channels=spec.latent_channels,
        strides=(spec.temporal_stride, spec.spatial_stride),
        latents_dtype="float32" if settings.dtype == "auto" else settings.dtype,
        text_dtype=stored if settings.dtype == "auto" else settings.dtype,
        condition=spec.task == "i2v", negative=settings.negative_prompt,
    )


def _cache(
    cache: CacheSet, encoders: Encoders, settings: CacheSettings, spec: ModelSpec, options: RunOptions
) -> list[Drop]:
    plan = make_plan(cache, encoders, _known(cache.folder), settings.latents, settings.text)
    if options.dry_run:
        for line in plan_lines(plan):
            console.results.print(line, markup=False)
        return plan.drops
    drops = list(plan.drops)
    failed: set[str] = set()
    if not plan.items:
        return drops
    cache.folder.mkdir(parents=True, exist_ok=True)
    if plan.done:
        console.results.print(f"{cache.folder}: all {len(plan.items)} items are cached; nothing to do", markup=False)
    else:
        for line in plan_lines(plan):
            console.log(line)
        drops, failed = _encode(plan, settings, spec, drops)
    write_index(_index(plan, failed))
    return drops


def _encode(plan: Plan, settings: CacheSettings, spec: ModelSpec, drops: list[Drop]) -> tuple[list[Drop], set[str]]:
    from lapwan.sampling.encode import carry_out, how_to

    outcome = carry_out(plan, spec, how_to(settings.device, settings.workers, settings.batch_size, plan))
    seconds = outcome.seconds
    console.results.print(
        f"{plan.folder}: {outcome.latents} latents, {outcome.texts} texts, {outcome.rois} regions in "
        f"{seconds.total:.1f} s", markup=False,
    )
    console.detail(f"seconds: decode {seconds.decode:.2f} (waited {seconds.wait:.2f}), encode {seconds.encode:.2f}, "
                   f"write {seconds.write:.2f}, text {seconds.text:.2f}")
    return drops + outcome.failures, outcome.failed


def _known(folder: Path) -> dict[str, CachedItem]:
    if not index_path(folder).is_file():
        return {}
    return {item.clip: item for item in load_index(folder).items if item.clip is not None}


def _index(plan: Plan, failed: set[str]) -> CacheIndex:
    """The index of the items whose files are all there."""
    encoders, cache = plan.encoders, plan.cache
    items = tuple(
        index_item(wanted, encoders, cache.repeats) for wanted in plan.items
        if wanted.id not in failed and all(
            (plan.folder / name).is_file() for name in (wanted.latents, wanted.text, wanted.roi) if name)
    )
    return CacheIndex(
        cache.folder, items, task=encoders.task, fps=encoders.fps, vae=encoders.vae, text_encoder=encoders.text,
        text_dim=encoders.text_dim, taxonomy=cache.taxonomy, dataset=str(cache.dataset.absolute()),
        prompts=PROMPTS_FILE if (plan.folder / PROMPTS_FILE).is_file() else None,
    )
