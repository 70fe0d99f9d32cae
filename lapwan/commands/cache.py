"""`lapwan cache`: clips and captions to latents and text features."""

from __future__ import annotations

from pathlib import Path

from lapwan import console
from lapwan.caching.cache_folder import Choices, Result, cache_set, encoders_of, extraction_of, plan_set
from lapwan.caching.report import drop_lines, plan_lines
from lapwan.data.dataset import read_dataset
from lapwan.data.source_clips import Drop
from lapwan.distributed import launched
from lapwan.errors import UserError
from lapwan.files import write_text
from lapwan.settings.base import RunOptions, to_toml
from lapwan.settings.cache import CacheSettings
from lapwan.tiny.resolve import resolve

SETTINGS_FILE = "lapwan_settings.toml"

def run(settings: CacheSettings, options: RunOptions) -> None:
    """Cache a dataset, or only look at the cache that is there (--verify, --preview without --dataset)."""
    processes = launched()
    if not processes.first:
        console.set_level(console.QUIET)
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False, end="")
    drops = _cache(settings, options) if settings.dataset is not None else []
    if not options.dry_run and processes.first:
        if settings.verify:
            _verify(settings)
        if settings.preview:
            _preview(settings)
    processes.close()
    if drops and not settings.skip_bad and not options.dry_run and processes.first:
        for line in drop_lines(drops):
            console.log(line.strip())
        first = f": {drops[0].where}: {drops[0].reason}" if len(drops) == 1 else ", listed above"
        raise UserError(f"{len(drops)} of the clips could not be cached{first}; all others are done; "
                        "mend or remove them, or pass --skip-bad")


def _cache(settings: CacheSettings, options: RunOptions) -> list[Drop]:
    assert settings.dataset is not None and settings.model is not None
    spec = resolve(settings.model, None if settings.i2v is None else "i2v" if settings.i2v else "t2v")
    encoders = encoders_of(settings, spec)
    choices = Choices(settings.latents, settings.text, settings.device, settings.workers, settings.batch_size,
                      settings.vae_dtype, settings.prune, options.overwrite)
    drops: list[Drop] = []
    for cache in read_dataset(settings.dataset, settings.output, extraction_of(settings, spec), spec.temporal_stride):
        if options.dry_run:
            plan, before = plan_set(cache, encoders, choices)
            for line in plan_lines(plan, before.pixels_per_second if before else None):
                console.results.print(line, markup=False)
            continue
        result = cache_set(cache, encoders, spec, choices, launched())
        drops += result.drops
        if launched().first:
            _report(result)
            _keep_settings(result.folder, settings)
    return drops


def _keep_settings(folder: Path, settings: CacheSettings) -> None:
    """Write the resolved settings beside the cache, unless they stand there already."""
    text = to_toml(settings, "lapwan cache --config with this file makes this cache")
    path = folder / SETTINGS_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _report(result: Result) -> None:
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
        raise UserError(f"{folder}: {len(problems)} of {count} files are wrong, listed above; "
                        "delete them and run lapwan cache again")
    console.results.print(f"{folder}: {count} files read again, all are right", markup=False)


def _preview(settings: CacheSettings) -> None:
    from lapwan.caching.preview import write_preview

    if settings.model is None:
        raise UserError("--preview decodes with the model's VAE; add --model MODEL")
    folder = _folder(settings, "--preview")
    path = write_preview(folder, resolve(settings.model), settings.preview, settings.device)
    console.results.print(f"{path}: what the model will see, a row a clip", markup=False)


def _folder(settings: CacheSettings, flag: str) -> Path:
    if settings.output is None:
        raise UserError(f"{flag} needs the cache folder: --output DIR")
    return settings.output
