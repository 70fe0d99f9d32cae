"""`lapwan inspect-weights`: statistics of LoRA files, with a verdict."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from lapwan import files
from lapwan.console import PlanRow, results, show_plan, show_settings, warn
from lapwan.diagnostics import tables
from lapwan.diagnostics.inspect import Inspection, inspect, read_points
from lapwan.diagnostics.page import inspection_page
from lapwan.lora.adapter_file import AdapterFile
from lapwan.report.page import write_page
from lapwan.settings.base import RunOptions, settings_row, to_toml
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.tiny.resolve import with_tiny

_STDOUT = "-"


def run(settings: InspectWeightsSettings, options: RunOptions) -> None:
    """Read the files, measure and judge them; tables on stdout, JSON, a plot and a page if asked for."""
    json_file = Path(settings.json_file) if settings.json_file not in (None, _STDOUT) else None
    for output in (json_file, settings.plot, settings.page):
        if output is not None:
            files.claim_output(output, options.overwrite)
    points, folder = read_points(settings)
    for lora in points[-1].loras.values():
        if isinstance(lora, AdapterFile) and lora.loses:
            warn(lora.report())
    if options.dry_run:
        show_plan([settings_row(settings, "files"), *(
            PlanRow("weights" if point.step is None else f"step {point.step}",
                    ", ".join(f"{label} {lora.path}" for label, lora in point.loras.items())) for point in points),
            *([] if settings.page is None else [PlanRow("page", f"{settings.page}, for a browser")])])
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
    else:
        _print_tables(settings, inspection)
    if json_file is not None:
        files.write_text(json_file, text + "\n")
    if settings.page is not None:
        command = shlex.join(["lapwan", "inspect-weights", *map(str, settings.files)])
        page = inspection_page(settings.files, inspection, _parts(settings, inspection), command, to_toml(settings))
        write_page(settings.page, page, replace_any=True)


def _routing_parts(document: dict[str, Any]) -> Iterator[Table | str]:
    if (routed := document.get("routing")) is None:
        return
    yield from tables.gate_lines(document["mixture"])
    yield tables.router_line(routed["router"])
    if (table := tables.routing_table(routed)) is not None:
        yield table
    if not routed["windows"]:
        yield ("usage and entropy of the router: not in the file; give the run folder, whose metrics.jsonl has them")


def _parts(settings: InspectWeightsSettings, inspection: Inspection) -> Iterator[Table | str]:
    """Tables and lines, in the order of the terminal, up to the verdict."""
    document, step = inspection.document, inspection.step
    yield tables.figure_table("" if step is None else f"step {step}", inspection.figures)
    if other := document.get("other_kinds"):
        yield tables.kinds_table(other)
    for label, figures in document["experts"].items():
        if "relative_delta" in figures:
            ratio = tables.format_number(figures["relative_delta"])
            yield f"update / weights of the base, {label}: {ratio}"
    if rate := document["ratios"]["lr"]:
        yield f"lr, high / low: {rate:.4g}"
    for label, described in document.get("mixture", {}).items():
        yield tables.overlap_table(label, described)
    yield from _routing_parts(document)
    if settings.by != "expert":
        yield from tables.group_tables(tables.grouped(inspection.modules, settings.by), settings.by)
        yield ("update: its norm; largest, stable, effect.: largest singular value, stable and effective rank; "
               "dead, bad: modules with B = 0, and non-finite ones")
    if document["growth"]:
        yield tables.growth_table(document["growth"])


def _print_tables(settings: InspectWeightsSettings, inspection: Inspection) -> None:
    for part in (*_parts(settings, inspection), *tables.verdict_lines(inspection.document["verdict"])):
        results.print(part, markup=False)
