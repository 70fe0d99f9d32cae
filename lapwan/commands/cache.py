"""`lapwan cache`: clips and captions to latents and text features."""

from __future__ import annotations

from pathlib import Path

from lapwan import console
from lapwan.caching.cache_folder import CacheOptions, CacheResult, build_cache, encoders_from_settings, plan_cache
from lapwan.caching.report import plan_rows
from lapwan.data.dataset import extraction_from_settings, read_dataset
from lapwan.data.dropped_clips import DroppedClip, dropped_lines
from lapwan.data.pixels import ReadOptions
from lapwan.distributed import launched
from lapwan.errors import UserError
from lapwan.files import write_text
from lapwan.models.spec import task_with
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.cache import CacheSettings
from lapwan.tiny.resolve import resolve

SETTINGS_FILE = "lapwan_settings.toml"


def run(settings: CacheSettings, options: RunOptions) -> None:
    """Cache a dataset, or only check or preview an existing cache (--verify, --preview without --dataset)."""
    processes = launched()
    if not processes.first:
        console.set_level(console.QUIET)
    drops = _cache(settings, options) if settings.dataset is not None else []
    if not options.dry_run and processes.first:
        if settings.verify:
            _verify(settings)
        if settings.preview:
            _preview(settings)
    if options.dry_run and processes.first:
        console.show_settings(to_toml(settings))
    processes.close()
    if drops and not settings.skip_bad and not options.dry_run and processes.first:
        for line in dropped_lines(drops):
            console.log(line.strip())
        first = f": {drops[0].name}: {drops[0].reason}" if len(drops) == 1 else ", listed above"
        raise UserError(f"{len(drops)} of the clips could not be cached{first}; all others are done; "
                        "fix or remove them, or pass --skip-bad")


def _cache(settings: CacheSettings, options: RunOptions) -> list[DroppedClip]:
    assert settings.dataset is not None and settings.model is not None
    spec = resolve(settings.model, None if settings.i2v is None else task_with(settings.i2v))
    encoders = encoders_from_settings(settings, spec)
    cache_options = CacheOptions(settings.latents, settings.text, settings.device, settings.workers,
                                 settings.batch_size, settings.vae_dtype, settings.prune, options.overwrite,
                                 options.lock, ReadOptions(settings.deinterlace, settings.hdr, settings.background))
    drops: list[DroppedClip] = []
    extraction = extraction_from_settings(settings, spec)
    caches = read_dataset(settings.dataset, settings.output, extraction, spec.temporal_stride, settings.roi_units)
    for number, cache in enumerate(caches):
        if options.dry_run:
            plan, before = plan_cache(cache, encoders, cache_options)
            rows = plan_rows(plan, before.pixels_per_second if before else None)
            console.show_plan(rows if number else [settings_row(settings, "dataset"), *rows])
            continue
        result = build_cache(cache, encoders, spec, cache_options, launched())
        drops += result.drops
        if launched().first:
            _report(result)
            _keep_settings(result.folder, settings)
    return drops


def _keep_settings(folder: Path, settings: CacheSettings) -> None:
    """Write the resolved settings into the cache folder, unless they are there already."""
    text = to_toml(settings, "lapwan cache --config with this file makes this cache")
    path = folder / SETTINGS_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _report(result: CacheResult) -> None:
    if result.pruned:
        console.results.print(f"{result.folder}: {result.pruned} files removed", markup=False)
    if not result.seconds:
        if result.items:
            console.results.print(f"{result.folder}: all {result.items} items are cached; nothing to do", markup=False)
        return
    total = result.seconds["total"]
    console.results.print(f"{result.folder}: {result.items} items; {result.latents} latents, {result.texts} texts, "
                          f"{result.rois} regions in {total:.1f} s", markup=False)
    shares = ", ".join(f"{key} {value:.2f}" for key, value in result.seconds.items() if key != "total")
    console.detail(f"seconds: {shares}")


def _verify(settings: CacheSettings) -> None:
    from lapwan.caching.verify import verify_folder

    folder = _folder(settings, "--verify")
    count, problems = verify_folder(folder)
    for problem in problems:
        console.results.print(problem, markup=False)
    if problems:
        raise UserError(f"{folder}: {len(problems)} of {count} files are damaged or do not match the index "
                        "(listed above); delete them and run lapwan cache again")
    console.results.print(f"{folder}: all {count} files are intact", markup=False)


def _preview(settings: CacheSettings) -> None:
    from lapwan.caching.preview import write_preview

    if settings.model is None:
        raise UserError("--preview decodes with the model's VAE; add --model MODEL")
    folder = _folder(settings, "--preview")
    path = write_preview(folder, resolve(settings.model), settings.preview, settings.device)
    console.results.print(f"{path}: what the model will see, one row per clip", markup=False)


def _folder(settings: CacheSettings, flag: str) -> Path:
    if settings.output is None:
        raise UserError(f"{flag} needs the cache folder: --output DIR")
    return settings.output
