"""The numbers of a run that the trainer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainerConfig:
    """The numbers of a run that no algorithm depends on.

    Args:
        max_grad_norm: gradients are scaled to at most this norm.
        save_every, log_every: steps between checkpoints, and between lines of metrics.jsonl.
        sigma_bins: bins of a noise expert's band whose losses are logged separately.
        keep_last, keep_best: checkpoints to keep; None: all.
        identity: hashes of clips and base, checked on resume.
        allow_changed: resume although settings or contents differ.
        resume_command: the command that continues the run, for messages.
        memory_summary: the memory plan in one line, for an out-of-memory message.
        predicted_peak: bytes on the device; 0: not predicted.
        tracker: what gets the metrics besides TensorBoard: wandb or trackio.
        skip_bad_clips: train no longer on a clip that has spoiled two steps.
    """

    run_folder: Path
    max_grad_norm: float = 1.0
    save_every: int = 100
    log_every: int = 1
    sigma_bins: int = 4
    keep_last: int | None = None
    keep_best: int | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    allow_changed: bool = False
    resume_command: str = "--resume"
    memory_summary: str = ""
    predicted_peak: int = 0
    tracker: str | None = None
    skip_bad_clips: bool = False
