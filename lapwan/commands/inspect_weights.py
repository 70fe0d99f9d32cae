"""`lapwan inspect-weights`: what LoRA files say about themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapwan import files
from lapwan.console import log, progress, results
from lapwan.diagnostics import gates, tables
from lapwan.diagnostics.growth import growth, history
from lapwan.diagnostics.lora_figures import Figures, ModuleFigures, measure, summarise, weight_norms
from lapwan.diagnostics.mixture import MixtureSide, describe
from lapwan.diagnostics.plot import picture
from lapwan.diagnostics.run_folder import (
    METRICS,
    UNSAID,
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
from lapwan.models.resolve import resolve
from lapwan.models.spec import weight_files
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions, to_toml
from lapwan.settings.inspect_weights import InspectWeightsSettings

_STDOUT = "-"


def run(settings: InspectWeightsSettings, options: RunOptions) -> None:
    """Read, measure, judge; tables on stdout, JSON where asked."""
    json_file = Path(settings.json_file) if settings.json_file not in (None, _STDOUT) else None
    for output in (json_file, settings.plot):
        if output is not None:
            files.claim_output(output, options.overwrite)
    points, metrics_folder = _points(settings)
    if options.dry_run:
        results.print(to_toml(settings), markup=False)
        for point in points:
            log(f"step {point.step}: " + ", ".join(f"{label} {lora.path}" for label, lora in point.loras.items()))
        return
    document = _document(settings, points, metrics_folder)
    if settings.json_file == _STDOUT:
        results.print(json.dumps(document, indent=2), markup=False)
    elif json_file is not None:
        files.write_text(json_file, json.dumps(document, indent=2) + "\n")


def inspect(settings: InspectWeightsSettings) -> dict[str, Any]:
    """The JSON document of one inspection, for Python; prints nothing and writes only a plot that is asked for."""
    quiet = settings.model_copy(update={"json_file": _STDOUT})
    return _document(quiet, *_points(quiet))


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
    over_time = [*history(points[:-1]), figures]
    grown = growth(points, over_time, lines)
    rates = stated_rates(last) | learning_rates(lines, last.step)  # what was, over what was planned
    rates |= {expert.value: rate for expert, rate in (settings.lr or {}).items()}
    sides = {label: side for label, side in last.loras.items() if isinstance(side, MixtureSide)}
    mixture = {label: describe(side) for label, side in sides.items()} or None
    overlaps = {label: one["overlap"] for label, one in mixture.items()} if mixture else None
    routed = _routing(sides, lines, last.step)
    verdict = judge(Evidence(PRESETS[settings.preset], figures, rates, grown, last.step, overlaps, routed))
    norms = _base_norms(settings.base, last) if settings.base else None
    document = tables.document(figures, modules, rates, grown, verdict, settings.by, mixture, routed, norms)
    if settings.plot is not None:
        image = picture([point.step for point in points], over_time, modules, PRESETS[settings.preset], mixture, routed)
        with files.atomic_file(settings.plot) as temporary:
            image.save(temporary, format="PNG")
    if settings.json_file != _STDOUT:
        _tell(settings, document, figures, modules, f"step {last.step}" if last.step is not None else "")
    return document


def _routing(
    sides: Mapping[str, MixtureSide], lines: Sequence[Mapping[str, Any]], step: int | None
) -> dict[str, Any] | None:
    """A mixture's router, and how it routed over the run whose metrics these are; None for LoRAs."""
    if not sides:
        return None
    mixture = next(iter(sides.values())).mixture  # one router serves both noise experts
    return {"router": gates.router(mixture), "windows": gates.routing(lines, mixture.families, step)}


def _base_norms(model: str, point: Checkpoint) -> dict[str, dict[str, float]]:
    spec = resolve(model)
    found: dict[str, dict[str, float]] = {}
    for label, source in point.loras.items():
        if label == UNSAID and len(spec.experts) > 1:
            raise UserError(f"{source.path} does not say which noise expert it is for, so --base cannot be compared; "
                            "give HIGH LOW files")
        expert = spec.experts[0] if label == UNSAID else NoiseExpert(label)
        if expert not in spec.experts:
            raise UserError(f"--base {model} has no {label} noise expert, but {source.path} is for it")
        paths = list(source.modules)
        if isinstance(source, MixtureSide):  # several experts change one weight
            paths = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
        with progress(f"norms of {expert.component}", len(paths), "weight") as bar:
            found[label] = weight_norms(weight_files(spec.component(expert)), paths, bar.advance)
    return found


def _tell_routing(document: dict[str, Any]) -> None:
    if (routed := document.get("routing")) is None:
        return
    for line in (*tables.gate_lines(document["mixture"]), tables.router_line(routed["router"])):
        results.print(line, markup=False)
    if (table := tables.routing_table(routed)) is not None:
        results.print(table)
    if not routed["windows"]:
        results.print("usage and entropy of the router: not in the file; give the run folder, whose metrics.jsonl has "
                      "them", markup=False)


def _tell(
    settings: InspectWeightsSettings, document: dict[str, Any], figures: dict[str, Figures],
    modules: dict[str, list[ModuleFigures]], title: str,
) -> None:
    results.print(tables.figure_table(title, figures))
    for label, one in document["experts"].items():
        if "relative_delta" in one:
            results.print(f"update / weights of the base, {label}: {tables.shown(one['relative_delta'])}", markup=False)
    if rate := document["ratios"]["lr"]:
        results.print(f"lr, high / low: {rate:.4g}", markup=False)
    for label, described in document.get("mixture", {}).items():
        results.print(tables.overlap_table(label, described))
    _tell_routing(document)
    if settings.by != "expert":
        for table in tables.group_tables(tables.grouped(modules, settings.by), settings.by):
            results.print(table)
        results.print("update: its norm; largest, stable, effect.: largest singular value, stable and effective rank; "
                      "dead, bad: modules with B = 0, and non-finite ones", markup=False)
    if document["growth"]:
        results.print(tables.growth_table(document["growth"]))
    for line in tables.verdict_lines(document["verdict"]):
        results.print(line, markup=False)
