"""What LoRA files, mixtures and run folders say about themselves, as one document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lapwan.console import progress
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
from lapwan.settings.inspect_weights import InspectWeightsSettings


@dataclass(frozen=True)
class Inspection:
    """`document` is the JSON that scripts rely on; figures, by noise expert, are of the newest checkpoint.

    `plot` draws the picture of `--plot`.
    """

    document: dict[str, Any]
    figures: dict[str, Figures]
    modules: dict[str, list[ModuleFigures]]
    step: int | None
    plot: Callable[[], Image.Image]


def inspect(settings: InspectWeightsSettings, points: Sequence[Checkpoint], folder: Path) -> Inspection:
    """Measure and judge what `read_points` found; prints and writes nothing.

    Raises:
        UserError: a base that does not have the LoRA's noise expert or modules.
    """
    last = points[-1]
    modules = {label: measure(lora.modules) for label, lora in last.loras.items()}
    figures = {label: summarise(own) for label, own in modules.items()}
    lines = metrics(folder)
    over_time = [*history(points[:-1]), figures]
    grown = growth(points, over_time, lines)
    rates = stated_rates(last) | learning_rates(lines, last.step)  # what was, over what was planned
    rates |= {noise_expert.value: rate for noise_expert, rate in (settings.lr or {}).items()}
    sides = {label: side for label, side in last.loras.items() if isinstance(side, MixtureSide)}
    mixture = {label: describe(side) for label, side in sides.items()} or None
    overlaps = {label: side["overlap"] for label, side in mixture.items()} if mixture else None
    routed = _routing(sides, lines, last.step)
    verdict = judge(Evidence(PRESETS[settings.preset], figures, rates, grown, last.step, overlaps, routed))
    norms = _base_norms(settings.base, last) if settings.base else None
    document = tables.document(figures, modules, rates, grown, verdict, settings.by, mixture, routed, norms)
    steps = [point.step for point in points]
    return Inspection(
        document, figures, modules, last.step,
        lambda: picture(steps, over_time, modules, PRESETS[settings.preset], mixture, routed))


def read_points(settings: InspectWeightsSettings) -> tuple[list[Checkpoint], Path]:
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
        if label == UNSAID and len(spec.noise_experts) > 1:
            raise UserError(f"{source.path} does not say which noise expert it is for, so --base cannot be compared; "
                            "give HIGH LOW files")
        noise_expert = spec.noise_experts[0] if label == UNSAID else NoiseExpert(label)
        if noise_expert not in spec.noise_experts:
            raise UserError(f"--base {model} has no {label} noise expert, but {source.path} is for it")
        paths = list(source.modules)
        if isinstance(source, MixtureSide):  # several experts change one weight
            paths = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
        with progress(f"norms of {noise_expert.component}", len(paths), "weight") as bar:
            found[label] = weight_norms(weight_files(spec.component(noise_expert)), paths, bar.advance)
    return found
