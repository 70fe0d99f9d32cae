"""Inspect LoRA files, mixtures and run folders: every figure and the verdict, as one JSON document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lapwan.console import progress
from lapwan.diagnostics import tables
from lapwan.diagnostics.growth import growth, history
from lapwan.diagnostics.lora_figures import Figures, ModuleFigures, measure, summarise, weight_norms, weight_reader
from lapwan.diagnostics.mixture import NoiseExpertMixture, describe_router, mixture_json, routing_windows
from lapwan.diagnostics.plot import draw_plot
from lapwan.diagnostics.run_folder import (
    METRICS_FILE,
    UNLABELLED,
    Checkpoint,
    LoraSource,
    learning_rates,
    metadata_rates,
    metrics,
    pair,
    read_checkpoints,
    single,
)
from lapwan.diagnostics.verdict import PRESETS, Evidence, judge
from lapwan.errors import UserError
from lapwan.lora.formats import is_peft_folder
from lapwan.lora.noise_expert import of_one_transformer
from lapwan.models.resolve import transformers_of
from lapwan.names import NoiseExpert
from lapwan.settings.inspect_weights import InspectWeightsSettings


@dataclass(frozen=True)
class Inspection:
    """`document` is the JSON; `figures` and `modules`, by noise expert, are of the newest checkpoint.

    `plot` draws the picture of `--plot`.
    """

    document: dict[str, Any]
    figures: dict[str, Figures]
    modules: dict[str, list[ModuleFigures]]
    step: int | None
    plot: Callable[[], Image.Image]


def inspect(settings: InspectWeightsSettings, points: Sequence[Checkpoint], folder: Path) -> Inspection:
    """Measure and judge checkpoints; prints and writes nothing.

    Args:
        settings: the base, the preset and learning rates of the verdict, and the grouping.
        points: as `read_points` returns them, by rising step.
        folder: the run's, with its metrics.

    Raises:
        UserError: a base without the LoRA's noise expert or modules.
    """
    last = points[-1]
    bases = _base_files(settings.base, last) if settings.base else {}
    weights = {label: weight_reader(files) for label, files in bases.items()}
    modules = {label: measure(lora.modules, weight=weights.get(label)) for label, lora in last.loras.items()}
    figures = {label: summarise(label_modules) for label, label_modules in modules.items()}
    lines = metrics(folder)
    over_time = [*history(points[:-1], weights), figures]
    grown = growth(points, over_time, lines)
    rates = metadata_rates(last) | learning_rates(lines, last.step)  # measured rates win over planned ones
    rates |= {noise_expert.value: rate for noise_expert, rate in (settings.lr or {}).items()}
    mixtures = {label: lora for label, lora in last.loras.items() if isinstance(lora, NoiseExpertMixture)}
    mixture = {label: mixture_json(lora) for label, lora in mixtures.items()} or None
    overlaps = {label: described["overlap"] for label, described in mixture.items()} if mixture else None
    routing = _routing(mixtures, lines, last.step)
    one_transformer = all(of_one_transformer(lora.metadata) for lora in last.loras.values())
    verdict = judge(Evidence(
        PRESETS[settings.preset], figures, rates, grown, last.step, overlaps, routing, one_transformer))
    norms = {label: _base_norms(last.loras[label], files) for label, files in bases.items()} or None
    document = tables.document(figures, modules, rates, grown, verdict, settings.by, mixture, routing, norms)
    steps = [point.step for point in points]
    return Inspection(
        document, figures, modules, last.step,
        lambda: draw_plot(steps, over_time, modules, PRESETS[settings.preset], mixture, routing))


def read_points(settings: InspectWeightsSettings) -> tuple[list[Checkpoint], Path]:
    """The checkpoints, oldest first, and the run folder whose metrics.jsonl belongs to them.

    Raises:
        UserError: two folders, a folder and a file, or a file that is not a LoRA.
    """
    if len(settings.files) == 2:
        if any(path.is_dir() and not is_peft_folder(path) for path in settings.files):
            raise UserError("two folders or a folder and a file given; give HIGH LOW files, or one RUN_FOLDER")
        return [pair(*settings.files)], _run_folder(settings.files[0])
    path = settings.files[0]
    if path.is_dir() and not is_peft_folder(path):
        return read_checkpoints(path), path
    return [single(path)], _run_folder(path)


def _run_folder(path: Path) -> Path:
    """The run folder of a file that lies in it or in one of its step folders."""
    return path.parent if (path.parent / METRICS_FILE).is_file() else path.parent.parent


def _routing(
    mixtures: Mapping[str, NoiseExpertMixture], lines: Sequence[Mapping[str, Any]], step: int | None
) -> dict[str, Any] | None:
    """A mixture's router and its routing over the run with the metrics `lines`; None for LoRAs."""
    if not mixtures:
        return None
    mixture = next(iter(mixtures.values())).mixture  # one router serves both noise experts
    return {"router": describe_router(mixture), "windows": routing_windows(lines, mixture.families, step)}


def _base_files(model: str, point: Checkpoint) -> dict[str, list[Path]]:
    """The weights of the base's noise experts, by label."""
    transformers, _ = transformers_of(model)
    single = next(iter(transformers)) if len(transformers) == 1 else None
    files: dict[str, list[Path]] = {}
    for label, source in point.loras.items():
        if label == UNLABELLED and len(transformers) > 1:
            raise UserError(f"{source.path} does not record its noise expert, so it cannot be compared with --base; "
                            "give HIGH LOW files")
        unnamed = len(transformers) == 1 and (label == UNLABELLED or (single is None and len(point.loras) == 1))
        noise_expert = single if unnamed else NoiseExpert(label)
        if noise_expert not in transformers:
            raise UserError(f"--base {model} has no {label} noise expert, but {source.path} is for it")
        files[label] = transformers[noise_expert]
    return files


def _base_norms(source: LoraSource, files: Sequence[Path]) -> dict[str, float]:
    """‖W‖ of every adapted tensor of the base, by path."""
    paths = list(source.modules)
    if isinstance(source, NoiseExpertMixture):  # several experts change one weight
        paths = list(dict.fromkeys(path.rpartition(".")[0] for path in paths))
    with progress(f"norms of {files[0].parent.name}", len(paths), "weight") as bar:
        return weight_norms(files, paths, bar.advance)
