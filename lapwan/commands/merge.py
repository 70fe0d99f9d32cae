"""`lapwan merge`: LoRAs into a model folder, into one transformer, or into one LoRA."""

from __future__ import annotations

from lapwan.console import PlanRow, log, results, show_plan, show_settings
from lapwan.files import write_text
from lapwan.models.merge import merge
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.merge import MergeSettings
from lapwan.tiny.resolve import with_tiny


def run(settings: MergeSettings, options: RunOptions) -> None:
    """Check, then merge and write; `--dry-run` stops after the checks."""
    show_plan([settings_row(settings, "lora"), PlanRow("output", str(settings.output))])
    merged = settings if settings.model is None else settings.model_copy(update={"model": with_tiny(settings.model)})
    for line in merge(merged, options):
        if options.dry_run:
            log(line)
        else:
            results.print(line, markup=False)
    if options.dry_run:
        show_settings(to_toml(settings))
    else:
        output = settings.output
        # Beside a model folder, not inside it: the folder holds the files of a model only.
        name = output.name if output.is_dir() else output.stem
        text = to_toml(settings, "lapwan merge --config with this file repeats the merge")
        write_text(output.with_name(f"{name}.settings.toml"), text)
