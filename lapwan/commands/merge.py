"""`lapwan merge`: LoRAs into a model folder, one transformer or one LoRA; differences and means of models."""

from __future__ import annotations

from collections.abc import Iterator

from lapwan.console import PlanRow, log, results, show_plan, show_settings
from lapwan.files import write_text
from lapwan.models.average import average_run
from lapwan.models.extract import extract_models
from lapwan.models.merge import merge
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.merge import MergeSettings
from lapwan.tiny.resolve import with_tiny


def run(settings: MergeSettings, options: RunOptions) -> None:
    """Check, then merge and write; `--dry-run` stops after the checks."""
    models = {name: with_tiny(model) for name in ("model", "base") if (model := getattr(settings, name)) is not None}
    merged = settings.model_copy(update=models)
    for line in _lines(merged, options):
        if options.dry_run:
            log(line)
        else:
            results.print(line, markup=False)
    if options.dry_run:
        show_plan([settings_row(settings, "lora"), PlanRow("output", str(settings.output))])
        show_settings(to_toml(settings))
    else:
        output = settings.output
        # Beside a model folder, not inside it: the folder holds the files of a model only.
        name = output.name if output.is_dir() else output.stem
        text = to_toml(settings, "lapwan merge --config with this file repeats the merge")
        write_text(output.with_name(f"{name}.settings.toml"), text)


def _lines(settings: MergeSettings, options: RunOptions) -> Iterator[str]:
    if settings.extract:
        return extract_models(settings, options)
    if settings.average is not None:
        return average_run(settings, settings.average, options)
    return merge(settings, options)
