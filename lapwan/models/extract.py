"""`lapwan merge --extract`: which transformers of two models belong together, and what is printed of each difference.

The arithmetic is in `lapwan.lora.extract`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from lapwan.checkpoints.fingerprints import checkpoint_fingerprint
from lapwan.checkpoints.weights import WeightFile, read_weights
from lapwan.console import log, warn
from lapwan.errors import UserError
from lapwan.files import atomic_file, claim_output
from lapwan.lora.extract import ExtractedLora, ExtractedModule, RankChoice, check_pair, extract
from lapwan.lora.formats import write_both, write_lora
from lapwan.lora.noise_expert import NOISE_EXPERT_KEY
from lapwan.lora.read_back import reader
from lapwan.lora.state import AdapterState
from lapwan.models.device import pick_device
from lapwan.models.merge import claim_file, lora_outputs
from lapwan.models.resolve import transformers_of
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.report import plots
from lapwan.settings.base import RunOptions
from lapwan.settings.merge import MergeSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RANK, _ENERGY_RANK = 64, 256  # default rank; the largest one of a search for the energy


@dataclass(frozen=True)
class ModelPair:
    """A noise expert's weights in the two models; `noise_expert` None: one transformer that no name tells."""

    noise_expert: NoiseExpert | None
    tuned: tuple[WeightFile, ...]
    base: tuple[WeightFile, ...]
    spec: ModelSpec | None

    def metadata(self) -> dict[str, str]:
        """What the LoRA's file records."""
        tuned, base = (checkpoint_fingerprint([file.path for file in files]) for files in (self.tuned, self.base))
        metadata = {"lapwan.base_fingerprint": base, "lapwan.extracted_from": tuned}
        if self.noise_expert is not None and not (self.spec is not None and self.spec.one_transformer):
            metadata[NOISE_EXPERT_KEY] = self.noise_expert.value
        if self.spec is not None:
            boundary = self.spec.boundary
            metadata |= {"lapwan.task": self.spec.task, "lapwan.boundary": "" if boundary is None else repr(boundary)}
        return metadata


def model_pairs(tuned: str, base: str) -> dict[NoiseExpert | None, ModelPair]:
    """The transformers of TUNED by noise expert, each with that of BASE; reads headers only.

    Each is a single file, a transformer's folder, a model folder or hub id, or the folder of a run or
    checkpoint that holds `transformer` or `transformer_2`.

    Raises:
        UserError: no such model, or it is not clear which transformer belongs to which.
    """
    (of_tuned, tuned_spec), (of_base, base_spec) = transformers_of(tuned), transformers_of(base)
    spec = base_spec or tuned_spec
    pairs: dict[NoiseExpert | None, tuple[Sequence[Path], Sequence[Path]]] = {}
    if len(of_tuned) == 1 and len(of_base) == 1:
        ((role, files),), ((base_role, base_files),) = of_tuned.items(), of_base.items()
        if None not in (role, base_role) and role is not base_role:
            raise UserError(f"{tuned} is for the {role} noise expert by its name, {base} for the {base_role} one; give "
                            "the transformers of one noise expert")
        pairs[role or base_role] = files, base_files
    else:
        for role, files in of_tuned.items():
            if role not in of_base:
                have, name = " and ".join(str(e) for e in of_base if e) or "one transformer", role or "unknown"
                raise UserError(f"{tuned} has a transformer of the {name} noise expert, {base} has {have}; give the "
                                "folder or file of that transformer for both, such as MODEL/transformer_2")
            pairs[role] = files, of_base[role]
    return {role: ModelPair(role, tuple(map(read_weights, files)), tuple(map(read_weights, base_files)), spec)
            for role, (files, base_files) in pairs.items()}


def extract_models(settings: MergeSettings, options: RunOptions) -> Iterator[str]:
    """The LoRA of each noise expert that takes `base` to `model`; yields one line per result, while it works.

    Raises:
        UserError: models that do not fit together, before anything is written.
    """
    pairs = model_pairs(settings.model or "", settings.base or "")
    outputs = lora_outputs(settings, list(pairs))
    inputs = [file.path for pair in pairs.values() for file in (*pair.tuned, *pair.base)]
    for output in outputs.values():
        claim_file(output, inputs, options)
    if settings.plot is not None:
        claim_output(settings.plot, options.overwrite)
    for noise_expert, pair in pairs.items():
        log(f"{outputs[noise_expert].name}: {pair.tuned[0].path} - {pair.base[0].path}")
    for pair in pairs.values():
        check_pair(pair.tuned, pair.base)
        for file in (pair.tuned[0], pair.base[0]):
            if file.quantised:
                types = ", ".join(file.quantised)
                warn(f"{file.path} is quantised ({types}): the LoRA will hold part of its rounding; better give the "
                     "unquantised model")
    if not options.dry_run:
        yield from _write_differences(pairs, outputs, settings)


def _write_differences(
    pairs: Mapping[NoiseExpert | None, ModelPair], outputs: Mapping[NoiseExpert | None, Path], settings: MergeSettings
) -> Iterator[str]:
    """Extract, write and read back the LoRA of each noise expert, or with `one_file` one file for both."""
    layout, device = settings.format or "comfy", pick_device(settings.device)
    choice = RankChoice(settings.rank or (_ENERGY_RANK if settings.energy else _RANK), settings.energy)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    extractions: dict[NoiseExpert | None, ExtractedLora] = {}
    both: dict[NoiseExpert, AdapterState] = {}
    for noise_expert, pair in pairs.items():
        extraction = extract(pair.tuned, pair.base, choice, settings.keep_rest and layout == "comfy", dtype, device)
        one = noise_expert is None or (pair.spec is not None and pair.spec.one_transformer)
        name, state = "LoRA" if one else str(noise_expert), extraction.state
        yield from _lines(name, extraction)
        if not state.entries:
            yield f"{name}: no file is written, since nothing was changed that a LoRA holds"
            continue
        extractions[noise_expert] = extraction
        state.metadata |= pair.metadata()
        if settings.one_file and noise_expert is not None:
            both[noise_expert] = state
            continue
        output = outputs[noise_expert]
        write_lora(output, state, layout, fold_alpha=settings.fold_alpha, check=reader(output, {noise_expert: state}))
        state.entries = {}  # a file's worth of memory, which the next noise expert needs
        yield f"LoRA: {output}"
    if both:
        write_both(settings.output, both, fold_alpha=settings.fold_alpha, check=reader(settings.output, both))
        yield f"LoRA: {settings.output}"
    if settings.plot is not None and extractions:
        with atomic_file(settings.plot) as temporary:
            _energy_plot(extractions).save(temporary, format="PNG")
        yield f"plot: {settings.plot}"


def _lines(name: str, extraction: ExtractedLora) -> Iterator[str]:
    """What was kept of one noise expert's update, for the terminal."""
    modules, total = extraction.modules, extraction.total
    unchanged = f"{extraction.unchanged} tensors unchanged"
    if extraction.only_rounding:
        unchanged += f", {extraction.only_rounding} differ by no more than rounding: left out"
    yield f"{name}: {len(modules)} Linears changed, {extraction.rest} other tensors kept as full deltas, {unchanged}"
    if extraction.left_out:
        yield (f"{name}: {extraction.left_out} changed biases, norms and modulations are left out (squared norm "
               f"{extraction.left_out_energy:.4g}); --keep-rest in comfy layout keeps them as full deltas")
    if not modules:
        return
    yield (f"{name}: energy (squared norm) of the update {total:.4g}, of which predicted rounding floor "
           f"{extraction.floor:.4g} ({extraction.floor / total:.2%})")
    cells = [(f"{rank}", f"{kept:.2%}") for rank, kept in extraction.curve()]
    widths = [max(len(a), len(b)) for a, b in cells]
    for title, column in (("rank", 0), ("kept", 1)):
        row = "  ".join(cell[column].rjust(width) for cell, width in zip(cells, widths, strict=True))
        yield f"{name}: {title}  {row}"
    ranks = sorted(module.rank for module in modules)
    worst = min(modules, key=_kept)
    yield (f"{name}: rank {ranks[0]} to {ranks[-1]} (median {ranks[len(ranks) // 2]}) keeps {extraction.kept():.4%} of "
           f"the energy above the floor; least in {worst.path}: {_kept(worst):.4%}")
    yield f"{name}: relative error of the update as written, noise included: {extraction.relative_error:.3g}"


def _kept(module: ExtractedModule) -> float:
    return module.captured(module.rank) / module.signal if module.signal > 0 else 1.0


def _energy_plot(extractions: Mapping[NoiseExpert | None, ExtractedLora]) -> Image.Image:
    """Energy kept by rank, a line for each noise expert."""
    series = {(e.value if e else "file"): extraction.curve() for e, extraction in extractions.items()}
    titles = {name: [(float(rank), 100 * kept) for rank, kept in curve] for name, curve in series.items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        plots.line_chart(axes, "energy of the update kept, above the rounding floor", titles,
                         plots.NOISE_EXPERT_COLOURS, "rank", "energy kept, %")
        axes.set_xscale("log", base=2)

    return plots.render(draw, 6.0, 3.6)
