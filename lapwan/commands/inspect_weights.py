"""`lapwan inspect-weights`: what LoRA files say about themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lapwan import files
from lapwan.console import log, results
from lapwan.diagnostics import report
from lapwan.diagnostics.figures import measure, summarise
from lapwan.diagnostics.growth import growth, history
from lapwan.diagnostics.run_folder import (
    METRICS,
    Checkpoint,
    checkpoints,
    learning_rates,
    metrics,
    pair,
    single,
    stated_rates,
)
from lapwan.diagnostics.verdict import PRESETS, Evidence, judge
from lapwan.errors import UserError
from lapwan.settings.base import to_toml
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.run import RunOptions

_STDOUT = Path("-")


def run(settings: InspectWeightsSettings, options: RunOptions) -> None:
    """Read, measure, judge; tables on stdout, JSON where asked."""
    if settings.json_file not in (None, _STDOUT):
        files.claim_output(settings.json_file, options.overwrite)
    points, metrics_folder = _points(settings)
    if options.dry_run:
        results.print(to_toml(settings), markup=False)
        for point in points:
            log(f"step {point.step}: " + ", ".join(f"{label} {lora.path}" for label, lora in point.loras.items()))
        return
    document = _document(settings, points, metrics_folder)
    if settings.json_file == _STDOUT:
        results.print(json.dumps(document, indent=2), markup=False)
    elif settings.json_file is not None:
        files.write_text(settings.json_file, json.dumps(document, indent=2) + "\n")


def _points(settings: InspectWeightsSettings) -> tuple[list[Checkpoint], Path]:
    """The checkpoints, oldest first, and the folder whose metrics.jsonl goes with them."""
    if len(settings.files) == 2:
        if any(path.is_dir() for path in settings.files):
            raise UserError("two folders or a folder and a file given; give HIGH LOW files, or one RUN_FOLDER")
        return [pair(*settings.files)], _run_of(settings.files[0])
    path = settings.files[0]
    if path.is_dir():
        return checkpoints(path), path
    return [single(path)], _run_of(path)


def _run_of(path: Path) -> Path:
    """The run folder of a file in it or in one of its step folders."""
    return path.parent if (path.parent / METRICS).is_file() else path.parent.parent


def _document(settings: InspectWeightsSettings, points: list[Checkpoint], folder: Path) -> dict[str, Any]:
    last = points[-1]
    modules = {label: measure(lora.modules) for label, lora in last.loras.items()}
    figures = {label: summarise(own) for label, own in modules.items()}
    lines = metrics(folder)
    grown = growth(points, [*history(points[:-1]), figures], lines)
    rates = learning_rates(lines, last.step) | stated_rates(last)
    rates |= {expert.value: rate for expert, rate in (settings.lr or {}).items()}
    verdict = judge(Evidence(PRESETS[settings.preset], figures, rates, grown, last.step))
    document = report.document(figures, modules, rates, grown, verdict, settings.by)
    if settings.json_file != _STDOUT:
        title = f"step {last.step}" if last.step is not None else ""
        results.print(report.figure_table(title, figures))
        if rate := document["ratios"]["lr"]:
            results.print(f"lr, high / low: {rate:.4g}", markup=False)
        if settings.by != "expert":
            results.print(report.group_table(report.grouped(modules, settings.by), settings.by))
        if grown:
            results.print(report.growth_table(grown))
        for line in report.verdict_lines(verdict):
            results.print(line, markup=False)
    return document
