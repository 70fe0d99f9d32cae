"""`lapwan merge --average`: the mean of a run's checkpoints, LoRAs or the transformers of a full fine-tune.

    W = Σ w_k W_k,  accumulated in fp32 and rounded once; weights, and the mean of LoRAs, as in `lapwan.lora.average`
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.fingerprints import FINGERPRINT_KEY
from lapwan.checkpoints.rewrite import AddRows, Advance, BaseRows, check_mergeable, rewrite
from lapwan.checkpoints.tensors import load_rows
from lapwan.console import log, progress
from lapwan.errors import UserError
from lapwan.files import atomic_folder, check_targets, leaves
from lapwan.lora.average import SavedStep, average, average_weights, saved_loras, saved_steps
from lapwan.lora.formats import write_both, write_lora
from lapwan.lora.read_back import reader
from lapwan.lora.state import AdapterState
from lapwan.models.merge import check_disk, claim_file, claim_folder, lora_outputs
from lapwan.models.spec import weight_files
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.merge import MergeSettings


def average_run(settings: MergeSettings, run: Path, options: RunOptions) -> Iterator[str]:
    """Plan, check and write; yields one line per result.

    Raises:
        UserError: not a run with checkpoints of one kind, before anything is written.
    """
    steps = saved_steps(run, settings.last, settings.checkpoints)
    weights = ", ".join(f"{step.step} x {weight:.4g}" for step, weight in zip(
        steps, average_weights(steps, settings.ema_decay), strict=True))
    log(f"steps {weights}")
    yield from _loras(settings, steps, options) if steps[-1].paths else _transformers(settings, steps, options)


def _loras(settings: MergeSettings, steps: Sequence[SavedStep], options: RunOptions) -> Iterator[str]:
    """The mean as one LoRA per noise expert."""
    saved = saved_loras(steps)
    outputs = lora_outputs(settings, list(saved))
    for noise_expert, loras in saved.items():
        claim_file(outputs[noise_expert], [lora.file.path for lora in loras], options)
    if options.dry_run:
        return
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    both: dict[NoiseExpert, AdapterState] = {}
    for noise_expert, loras in saved.items():
        state, kept = average(loras, settings.ema_decay, settings.rank, dtype)
        state.entries = {path: entry.scaled(settings.multiplier) for path, entry in state.entries.items()}
        rank = "the checkpoints' rank" if settings.rank is None else f"rank {settings.rank}"
        yield f"{rank} keeps {kept:.4%} of the energy (squared norm)"
        if settings.one_file and noise_expert is not None:
            both[noise_expert] = state
            continue
        output = outputs[noise_expert]
        write_lora(output, state, settings.format or "comfy", dtype, settings.fold_alpha,
                   check=reader(output, {noise_expert: state}))
        yield f"LoRA: {output}"
    if both:
        write_both(settings.output, both, dtype, settings.fold_alpha, reader(settings.output, both))
        yield f"LoRA: {settings.output}"


def _transformers(settings: MergeSettings, steps: Sequence[SavedStep], options: RunOptions) -> Iterator[str]:
    """The mean of a full fine-tune as transformer folders."""
    plans = plan_means(steps, settings.ema_decay)
    if not plans:
        raise UserError(f"{steps[-1].folder} holds neither LoRAs nor a transformer folder")
    for name in ("rank", "format", "dtype", "fold_alpha", "one_file"):
        if getattr(settings, name):
            raise UserError(f"--{name.replace('_', '-')} applies only to a LoRA; this run is a full fine-tune")
    if settings.multiplier != 1:
        raise UserError("--multiplier applies only to a LoRA; this run is a full fine-tune")
    if settings.output.suffix == ".safetensors":
        raise UserError(f"output {settings.output}: this run is a full fine-tune, whose mean is a folder of "
                        "transformers; give a folder's name")
    claim_folder(settings.output, steps[-1].folder, options)
    size = sum(plan.size for plan in plans.values())
    check_disk(settings.output, size)
    log(f"{settings.output}: {', '.join(e.component for e in plans)}, {size / 2**30:.3g} GiB to write")
    if options.dry_run:
        return
    with progress("average", round(size / 2**20, 1), "MiB") as bar:
        write_means(plans, settings.output, lambda written: bar.advance(written / 2**20))
    yield f"averaged transformers: {settings.output}"


@dataclass(frozen=True)
class _Mean:
    """W of the last checkpoint -> the weighted mean; implements `checkpoints.rewrite.Update`."""

    others: Sequence[tuple[TensorFile, str, float]]
    weight: float

    def prepare(self, dtype: torch.dtype, base_rows: BaseRows) -> AddRows:
        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            work.mul_(self.weight)
            for file, name, weight in self.others:
                work.add_(load_rows(file, name, first, len(work)).to(dtype), alpha=weight)

        return add_rows


@dataclass(frozen=True)
class MeanPlan:
    """One noise expert's transformer: the last checkpoint's folder and files, and the mean of each of their tensors."""

    folder: Path
    files: Sequence[TensorFile]
    means: Sequence[Mapping[str, Sequence[_Mean]]]
    steps: str

    @property
    def size(self) -> int:
        """Bytes to write."""
        return sum(file.size for file in self.files)


def plan_means(steps: Sequence[SavedStep], decay: float | None) -> dict[NoiseExpert, MeanPlan]:
    """Check that the checkpoints' transformers belong together; reads headers only.

    Raises:
        UserError: a checkpoint without one, or with other tensors than the last one.
    """
    *others, last = steps
    plans: dict[NoiseExpert, MeanPlan] = {}
    weights = average_weights(steps, decay)
    for noise_expert in NoiseExpert:
        folder = last.folder / noise_expert.component
        if not folder.is_dir():
            continue
        files = [read_header(path) for path in weight_files(folder)]
        earlier = [(_tensors(step.folder / noise_expert.component), weight)
                   for step, weight in zip(others, weights[:-1], strict=True)]
        means = []
        for file in files:
            for name, info in file.tensors.items():
                check_mergeable(file, name)
                for tensors, _ in earlier:
                    if name not in tensors or tensors[name].tensors[name].shape != info.shape:
                        raise UserError(f"'{name}' of {file.path} is missing or has another shape in an earlier "
                                        "checkpoint; the checkpoints are not of one run")
                    check_mergeable(tensors[name], name)
            means.append({name: [_Mean([(tensors[name], name, weight) for tensors, weight in earlier], weights[-1])]
                          for name in file.tensors})
        plans[noise_expert] = MeanPlan(folder, files, means, ",".join(str(step.step) for step in steps))
    return plans


def _tensors(folder: Path) -> dict[str, TensorFile]:
    return {name: file for file in map(read_header, weight_files(folder)) for name in file.tensors}


def write_means(plans: Mapping[NoiseExpert, MeanPlan], output: Path, advance: Advance) -> None:
    """Write OUTPUT/transformer and OUTPUT/transformer_2, those that the run has, atomically; configs are copied."""
    with atomic_folder(output) as temporary:
        for noise_expert, plan in plans.items():
            target = temporary / noise_expert.component
            target.mkdir(parents=True)
            weights = {file.path for file in plan.files}
            for path in plan.folder.iterdir():
                if path.is_file() and path not in weights and not leaves(path, plan.folder):
                    shutil.copyfile(path, target / path.name)
            check_targets(temporary, (target / file.path.name for file in plan.files))
            for file, means in zip(plan.files, plan.means, strict=True):
                kept = {key: value for key, value in file.metadata.items() if key != FINGERPRINT_KEY}
                metadata = {"format": "pt", **kept, "lapwan.averaged_steps": plan.steps}
                rewrite(file, target / file.path.name, means, metadata, advance)
