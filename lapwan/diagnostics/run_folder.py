"""The input of an inspection: a pair of LoRA files, one file, or a run folder with its checkpoints.

A file is a LoRA or a mixture. Its content is labelled `high`, `low`, or `file` if nothing records the noise expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field

from lapwan.checkpoints.container import read_header
from lapwan.diagnostics.mixture import is_mixture_file, open_mixture
from lapwan.documents import Number, checked, json_lines
from lapwan.errors import UserError
from lapwan.files import is_temporary
from lapwan.lora.assign import check_role
from lapwan.lora.formats import open_lora
from lapwan.lora.metadata import saved_step
from lapwan.lora.state import Entry
from lapwan.names import NoiseExpert

UNLABELLED = "file"
METRICS_FILE = "metrics.jsonl"
_TEXT_FEATURES = "lapwan.text_encoder"  # metadata of the prompts' text features, which an srpo run keeps in its folder


class LoraSource(Protocol):
    """The low-rank modules of one noise expert in a file: of a LoRA or of a mixture."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def modules(self) -> Mapping[str, Entry]: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Checkpoint:
    """The files saved at one step, by label; `step` is None if nothing records it."""

    step: int | None
    loras: Mapping[str, LoraSource]


def pair(high: Path, low: Path) -> Checkpoint:
    """A checkpoint from two LoRA files.

    Args:
        high: the high noise expert's.
        low: the low noise expert's.

    Raises:
        UserError: a file whose metadata names the other noise expert.
    """
    loras: dict[str, LoraSource] = {}
    for noise_expert, path in zip(NoiseExpert, (high, low), strict=True):
        by_noise_expert = open_lora(path, rule="common")
        lora = by_noise_expert.get(noise_expert) or by_noise_expert.get(None) or next(iter(by_noise_expert.values()))
        check_role(lora, noise_expert)
        loras[noise_expert.value] = lora
    return Checkpoint(_common_step(loras), loras)


def single(path: Path) -> Checkpoint:
    """One file: a LoRA of one noise expert, of both, or of an unrecorded one; or a mixture."""
    loras = _open(path)
    return Checkpoint(_common_step(loras), loras)


def _open(path: Path) -> Mapping[str, LoraSource]:
    if is_mixture_file(path):
        return open_mixture(path)
    loras = open_lora(path, rule="common")  # what is left out is reported
    return {noise_expert.value if noise_expert else UNLABELLED: lora for noise_expert, lora in loras.items()}


def _common_step(loras: Mapping[str, LoraSource]) -> int | None:
    steps = {saved_step(lora.path, lora.metadata) for lora in loras.values()}
    return steps.pop() if len(steps) == 1 else None


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint of a run folder, ordered by step: its LoRAs, or its mixtures if it has no LoRAs.

    Raises:
        UserError: no such files, or two of one noise expert and step.
    """
    paths = [p for p in [*folder.glob("*.safetensors"), *folder.glob("step_*/*.safetensors")]
             if not is_temporary(p) and _TEXT_FEATURES not in read_header(p).metadata]
    paths = [p for p in paths if not is_mixture_file(p)] or paths
    if not paths:
        raise UserError(f"{folder} holds no LoRA or mixture (*.safetensors, or step_N/*.safetensors); give a run "
                        "folder or LoRA files")
    by_step: dict[int | None, dict[str, LoraSource]] = {}
    for path in sorted(paths):
        for label, lora in _open(path).items():
            step = saved_step(lora.path, lora.metadata)
            loras = by_step.setdefault(step, {})
            if (other := loras.setdefault(label, lora)) is lora:
                continue
            if not other.path.samefile(path) and other.fingerprint() != lora.fingerprint():
                raise UserError(f"{other.path} and {path} are both for the {label} noise expert at step {step}; give "
                                "the folder of one run, or two files")
    if None in by_step and len(by_step) > 1:  # final files of a run that does not record steps in them
        del by_step[None]
    return [Checkpoint(step, by_step[step]) for step in sorted(by_step, key=lambda s: -1 if s is None else s)]


class MetricsLine(BaseModel):
    """What is read of every line."""

    step: Annotated[int, Field(strict=True, ge=0)]
    noise_expert: str | None = None
    own_step: Number | None = None
    lr: Number | None = None


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, if it has one; a last line that a kill truncated is left out.

    Raises:
        UserError: a line before the last that is not a JSON object.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    cut: int | None = None  # the number of a line that is no object
    for number, _, value in json_lines(path):
        if cut is not None:
            raise UserError(f"{path}, line {cut}: not a JSON object; remove this line")
        if isinstance(value, dict):
            checked(value, MetricsLine, f"{path}, line {number}")
            records.append(value)
        else:
            cut = number
    return records


def noise_expert_steps(lines: Sequence[Mapping[str, Any]], label: str, step: int | None) -> float | None:
    """Optimizer steps of one noise expert at the run's `step`: the count in its last line, else the number of its lines
    so far, else the run's step.

    If only every k-th step is logged, there are 1/k as many lines; growth uses a quotient of two counts, in which k
    cancels.

    Args:
        lines: the run's metrics.
        label: of the noise expert.
        step: the run's step; None: unknown.

    Returns:
        The count; None if `step` is None.
    """
    counted = [line["own_step"] for line in lines if line.get("noise_expert") == label and "own_step" in line
               and step is not None and line["step"] <= step]
    if counted:
        return float(max(counted))
    logged = [line["step"] for line in lines if line.get("noise_expert") == label and isinstance(line.get("step"), int)]
    if step is None or not logged:
        return step
    return float(sum(at <= step for at in logged))


def learning_rates(lines: Sequence[Mapping[str, Any]], step: int | None) -> dict[str, float]:
    """The last lr of each noise expert at or before `step`.

    Args:
        lines: the run's metrics.
        step: None: the last line counts.
    """
    rates: dict[str, float] = {}
    for line in lines:
        rate, label, at = line.get("lr"), line.get("noise_expert"), line.get("step")
        if isinstance(rate, int | float) and isinstance(label, str) and isinstance(at, int) \
                and (step is None or at <= step):
            rates[label] = float(rate)
    return rates


def metadata_rates(checkpoint: Checkpoint) -> dict[str, float]:
    """The lr recorded in the files' metadata."""
    rates: dict[str, float] = {}
    for label, lora in checkpoint.loras.items():
        for key in ("lapwan.lr", "ss_unet_lr", "ss_learning_rate"):
            try:
                rates[label] = float(lora.metadata[key])
            except (KeyError, ValueError):
                continue
            break
    return rates
