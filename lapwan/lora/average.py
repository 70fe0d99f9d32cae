"""The mean of a run's checkpoints: of what the LoRAs do, not of their factors.

    ΔW = Σ_k w_k ΔW_k,  Σ w_k = 1,  then resized by SVD to the rank of the checkpoints

Equal weights, or those that an exponential moving average with decay d a step would have had, each checkpoint standing
for the steps since the one before it:

    w_k ∝ d^(S − s_k) − d^(S − s_{k−1}),    s_k the checkpoints' steps, S the last one
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lapwan.console import progress
from lapwan.errors import UserError
from lapwan.files import is_temporary
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.combine import concatenate
from lapwan.lora.formats import open_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.lora.svd import product_svd
from lapwan.names import NoiseExpert

_STEP = re.compile(r"^step_(\d+)$")


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint's folder; `since` is the step of the checkpoint before it, or 0."""

    step: int
    since: int
    folder: Path

    @property
    def paths(self) -> list[Path]:
        """Its adapter files; none after a full fine-tune."""
        return sorted(path for path in self.folder.glob("*.safetensors") if not is_temporary(path))


@dataclass(frozen=True)
class SavedLora:
    """One noise expert's LoRA in a checkpoint."""

    step: int
    since: int
    file: AdapterFile


def saved_steps(run: Path, last: int | None = None, steps: Sequence[int] | None = None) -> list[SavedStep]:
    """A run's checkpoints, oldest first.

    Args:
        run: the run's folder.
        last: the last n checkpoints; None: all.
        steps: those of these steps, instead of `last`; None: all.

    Raises:
        UserError: no checkpoints, or not those asked for.
    """
    folders = sorted((int(match[1]), path) for path in run.glob("step_*")
                     if (match := _STEP.match(path.name)) and path.is_dir())
    if not folders:
        raise UserError(f"{run} has no checkpoints (folders such as step_000100); give the folder of a run")
    known = [step for step, _ in folders]
    if missing := sorted(set(steps or ()) - set(known)):
        raise UserError(f"{run} has no checkpoint of step {missing[0]}; it has: {', '.join(map(str, known))}")
    if last is not None and last > len(folders):
        raise UserError(f"--last {last}: {run} has {len(folders)} checkpoints")
    chosen = folders[-last:] if last else [item for item in folders if steps is None or item[0] in steps]
    saved: list[SavedStep] = []
    for step, folder in chosen:
        before = [other for other in known if other < step]
        saved.append(SavedStep(step, saved[-1].step if saved else before[-1] if before else 0, folder))
    return saved


def saved_loras(steps: Sequence[SavedStep]) -> dict[NoiseExpert | None, list[SavedLora]]:
    """The LoRAs of checkpoints by noise expert, oldest first; reads headers only.

    Raises:
        UserError: a checkpoint that does not have one LoRA for each noise expert.
    """
    saved: dict[NoiseExpert | None, list[SavedLora]] = {}
    for step in steps:
        files = [item for path in step.paths for item in open_lora(path).items()]
        for noise_expert, file in files:
            loras = saved.setdefault(noise_expert, [])
            if loras and loras[-1].step == step.step:
                raise UserError(f"{loras[-1].file.path} and {file.path} are for the same noise expert; a checkpoint "
                                "has one LoRA for each")
            loras.append(SavedLora(step.step, step.since, file))
    for step in steps:
        if any(step.step not in {lora.step for lora in loras} for loras in saved.values()):
            raise UserError(f"{step.folder} does not have a LoRA for each noise expert that other checkpoints have; "
                            "leave that step out")
    return saved


def average_weights(saved: Sequence[SavedLora | SavedStep], decay: float | None) -> list[float]:
    """w_k, the weight of each checkpoint in the average, by the formula above; they sum to 1.

    Args:
        saved: checkpoints by rising step.
        decay: per training step, in (0, 1); None: equal weights.
    """
    if decay is None:
        return [1 / len(saved)] * len(saved)
    end = saved[-1].step
    masses = [decay ** (end - item.step) * (1.0 - decay ** (item.step - item.since)) for item in saved]
    return [mass / sum(masses) for mass in masses]


def average(
    saved: Sequence[SavedLora], decay: float | None = None, rank: int | None = None, dtype: torch.dtype | None = None
) -> tuple[AdapterState, float]:
    """(Σ w_k ΔW_k as a LoRA, the share of its energy that the rank keeps).

    Args:
        saved: checkpoints of one noise expert, by rising step.
        decay: of the moving average, per step; None: equal weights.
        rank: the largest rank of a module; None: for each module that of the checkpoints.
        dtype: of the result; None: the widest of the checkpoints.

    Raises:
        UserError: one of the files is not a plain LoRA, or holds values that are not finite.
    """
    states = [lora.file.read_finite(f"leave step {lora.step} out") for lora in saved]
    pairs = [state.low_rank("--average needs plain LoRAs") for state in states]
    ranks: dict[str, int] = {}
    for entries in pairs:
        for path, entry in entries.items():
            ranks[path] = rank or max(entry.rank, ranks.get(path, 0))
    widest = dtype or max((e.up.dtype for entries in pairs for e in entries.values()), key=lambda d: d.itemsize)
    total = concatenate(list(zip(states, average_weights(saved, decay), strict=True)), torch.float32)
    kept = energy = 0.0
    with progress("average", len(total.entries), "module") as bar:
        for path, entry in total.low_rank("--average needs plain LoRAs").items():
            left, right, values, _ = product_svd(*entry.factors())
            k = min(ranks[path], len(values))
            root = values[:k].sqrt()
            up, down = ((side[:, :k] * root).to(widest) for side in (left, right))
            total.entries[path] = LowRank(down.T.contiguous(), up.contiguous(), float(k))
            kept, energy = kept + float(values[:k].square().sum()), energy + float(values.square().sum())
            bar.advance()
    total.metadata["lapwan.averaged_steps"] = ",".join(str(lora.step) for lora in saved)
    if decay is not None:
        total.metadata["lapwan.ema_decay"] = repr(decay)
    return total, kept / energy if energy > 0 else 1.0
