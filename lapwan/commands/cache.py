"""`lapwan cache`: clips and captions to latents and text features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lapwan import console
from lapwan.caching.cache_folder import CacheOptions, CacheResult, build_cache, encoders_from_settings, plan_cache
from lapwan.caching.dataset_notes import dataset_notes
from lapwan.caching.report import plan_rows
from lapwan.caching.stale import EncoderSpec
from lapwan.data.clips import CacheSet
from lapwan.data.dataset import extraction_from_settings, read_dataset
from lapwan.data.decoding.pixels import ReadOptions
from lapwan.data.dropped_clips import DroppedClip, dropped_lines
from lapwan.distributed import launched
from lapwan.errors import UserError
from lapwan.files import claim_output, write_text
from lapwan.models.resolve import check_components
from lapwan.models.spec import ModelSpec, task_with
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.cache import CacheSettings
from lapwan.tiny.resolve import TINY, resolve

SETTINGS_FILE = "lapwan_settings.toml"
_NO_CACHE = ".lapwan-no-cache"  # a folder that is not there: the sheet of a dataset needs none


def run(settings: CacheSettings, options: RunOptions) -> None:
    """Cache a dataset, or only check or preview an existing cache (--verify, --preview without --dataset)."""
    processes = launched()
    if not processes.first:
        console.set_level(console.QUIET)
    if isinstance(settings.preview, Path) and not options.dry_run:
        if processes.first:
            _write_sheet(settings, settings.preview, options)
        return
    drops = _cache(settings, options) if settings.dataset is not None else []
    if not options.dry_run and processes.first:
        if settings.verify and settings.dataset is None:
            _verify(settings)
        if isinstance(settings.preview, int) and settings.preview:
            _preview(settings, settings.preview)
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
    assert settings.dataset is not None
    spec, encoders = _model(settings)
    check_components(spec)
    cache_options = CacheOptions(settings.latents, settings.text, settings.device, settings.workers,
                                 settings.batch_size, settings.vae_dtype, settings.prune, options.overwrite,
                                 options.lock, settings.verify, _read_options(settings))
    drops: list[DroppedClip] = []
    for number, given in enumerate(_dataset(settings, spec, settings.output)):
        cache = given
        if launched().first:
            notes = dataset_notes(given, spec.path / "tokenizer", encoders.text_length, settings.duplicates)
            cache = replace(given, notes=(*given.notes, *notes))
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


def _dataset(settings: CacheSettings, spec: ModelSpec, folder: Path | None) -> list[CacheSet]:
    assert settings.dataset is not None
    return read_dataset(settings.dataset, folder, extraction_from_settings(settings, spec), spec.temporal_stride,
                        settings.caption_encoding, settings.recursive, settings.roi_units)


def _read_options(settings: CacheSettings) -> ReadOptions:
    return ReadOptions(settings.deinterlace, settings.hdr, settings.background)


def _model(settings: CacheSettings) -> tuple[ModelSpec, EncoderSpec]:
    assert settings.model is not None
    i2v = settings.i2v
    if i2v is None and settings.last_image and settings.model == TINY:  # a name for two models
        i2v = True
    spec = resolve(settings.model, None if i2v is None else task_with(i2v))
    if settings.last_image and not spec.takes_last_image:
        takes = "takes a first frame only" if spec.takes_image else "is a text-to-video model"
        raise UserError(f"{spec.path} ({spec.family.title}) {takes}; leave --last-image out")
    return spec, encoders_from_settings(settings, spec)


def _keep_settings(folder: Path, settings: CacheSettings) -> None:
    """Write the resolved settings into the cache folder, unless they are there already."""
    text = to_toml(settings, "lapwan cache --config with this file makes this cache")
    path = folder / SETTINGS_FILE
    if not path.is_file() or path.read_bytes() != text.encode():
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
    from lapwan.caching.verify import verify_folder, warn_unchecked

    folder = _folder(settings, "--verify")
    result = verify_folder(folder)
    warn_unchecked(folder, result)
    for name, reason in result.problems.items():
        console.results.print(f"{name}: {reason}", markup=False)
    if result.problems:
        config = folder / SETTINGS_FILE
        source = f"--config {config}" if config.is_file() else "--dataset FILE --model MODEL"
        raise UserError(f"{folder}: {len(result.problems)} of {result.count} files are damaged or do not match the "
                        f"index (listed above); `lapwan cache {source} --verify` makes them again")
    console.results.print(f"{folder}: all {result.count} files are intact", markup=False)


def _write_sheet(settings: CacheSettings, path: Path, options: RunOptions) -> None:
    from lapwan.caching.dataset_preview import write_sheet

    claim_output(path, options.overwrite)
    spec, encoders = _model(settings)
    folder = settings.output or path.absolute().parent / _NO_CACHE
    cache_options = CacheOptions(settings.latents, settings.text, takeover=True, read=_read_options(settings))
    write_sheet(path, [plan_cache(cache, encoders, cache_options)[0] for cache in _dataset(settings, spec, folder)])
    console.results.print(f"{path}: the dataset before it is encoded, one picture per clip", markup=False)


def _preview(settings: CacheSettings, count: int) -> None:
    from lapwan.caching.preview import write_preview

    if settings.model is None:
        raise UserError("--preview decodes with the model's VAE; add --model MODEL")
    folder = _folder(settings, "--preview")
    path = write_preview(folder, resolve(settings.model), count, settings.device)
    console.results.print(f"{path}: what the model will see, one row per clip", markup=False)


def _folder(settings: CacheSettings, flag: str) -> Path:
    if settings.output is None:
        raise UserError(f"{flag} needs the cache folder: --output DIR")
    return settings.output
