"""`lapwan inspect-weights`: statistics of LoRA files, with a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lapwan import files
from lapwan.console import PlanRow, results, show_plan, show_settings, warn
from lapwan.diagnostics import tables
from lapwan.diagnostics.inspect import Inspection, inspect, read_points
from lapwan.lora.adapter_file import AdapterFile
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.tiny.resolve import with_tiny

_STDOUT = "-"


def run(settings: InspectWeightsSettings, options: RunOptions) -> None:
    """Read the files, measure and judge them; tables on stdout, JSON and a plot if asked for."""
    json_file = Path(settings.json_file) if settings.json_file not in (None, _STDOUT) else None
    for output in (json_file, settings.plot):
        if output is not None:
            files.claim_output(output, options.overwrite)
    points, folder = read_points(settings)
    for lora in points[-1].loras.values():
        if isinstance(lora, AdapterFile) and lora.loses:
            warn(lora.report())
    if options.dry_run:
        show_plan([settings_row(settings, "files"), *(
            PlanRow("weights" if point.step is None else f"step {point.step}",
                    ", ".join(f"{label} {lora.path}" for label, lora in point.loras.items())) for point in points)])
        show_settings(to_toml(settings))
        return
    base = None if settings.base is None else with_tiny(settings.base)
    inspection = inspect(settings.model_copy(update={"base": base}), points, folder)
    if settings.plot is not None:
        with files.atomic_file(settings.plot) as temporary:
            inspection.plot().save(temporary, format="PNG")
    text = json.dumps(inspection.document, indent=2)
    if settings.json_file == _STDOUT:
        results.print(text, markup=False)
        return
    _print_tables(settings, inspection)
    if json_file is not None:
        files.write_text(json_file, text + "\n")


def _print_routing(document: dict[str, Any]) -> None:
    if (routed := document.get("routing")) is None:
        return
    for line in (*tables.gate_lines(document["mixture"]), tables.router_line(routed["router"])):
        results.print(line, markup=False)
    if (table := tables.routing_table(routed)) is not None:
        results.print(table)
    if not routed["windows"]:
        results.print("usage and entropy of the router: not in the file; give the run folder, whose metrics.jsonl has "
                      "them", markup=False)


def _print_tables(settings: InspectWeightsSettings, inspection: Inspection) -> None:
    document, step = inspection.document, inspection.step
    results.print(tables.figure_table("" if step is None else f"step {step}", inspection.figures))
    if other := document.get("other_kinds"):
        results.print(tables.kinds_table(other))
    for label, figures in document["experts"].items():
        if "relative_delta" in figures:
            ratio = tables.format_number(figures["relative_delta"])
            results.print(f"update / weights of the base, {label}: {ratio}", markup=False)
    if rate := document["ratios"]["lr"]:
        results.print(f"lr, high / low: {rate:.4g}", markup=False)
    for label, described in document.get("mixture", {}).items():
        results.print(tables.overlap_table(label, described))
    _print_routing(document)
    if settings.by != "expert":
        for table in tables.group_tables(tables.grouped(inspection.modules, settings.by), settings.by):
            results.print(table)
        results.print("update: its norm; largest, stable, effect.: largest singular value, stable and effective rank; "
                      "dead, bad: modules with B = 0, and non-finite ones", markup=False)
    if document["growth"]:
        results.print(tables.growth_table(document["growth"]))
    for line in tables.verdict_lines(document["verdict"]):
        results.print(line, markup=False)
