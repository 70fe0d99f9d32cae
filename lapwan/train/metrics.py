"""The metrics of a run: sums over the steps between two log lines, written to metrics.jsonl, TensorBoard and a tracker.

`StepLog` accumulates on the device, `merge_logs` joins the processes' logs, `MetricsWriter` writes one JSON object
per logged step and the same figures as TensorBoard scalars.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwan import files
from lapwan.diagnostics.run_folder import METRICS_FILE
from lapwan.documents import json_lines
from lapwan.errors import UserError
from lapwan.faults import quiet_system_errors_of_threads
from lapwan.names import Band
from lapwan.train.objective import Loss
from lapwan.train.run_folder import TRACKER_FILE

HostLog = tuple[dict[str, tuple[float, int]], list[float], list[float]]  # sums and counts, flow losses, sigmas


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that cannot run, before any weights are loaded.

    Raises:
        UserError: its package is not installed.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"tracker = '{name}' needs the package {name}, which is not installed; "
                        f"pip install 'lapwan[{name}]', or leave tracker out: TensorBoard files are written anyway")


def start_tracker(name: str, run: Path) -> Any:
    """accelerate's tracker of that name for a run folder; a run that is continued goes on under its id.

    The project is called lapwan; other settings are the tracker's own, such as WANDB_PROJECT or WANDB_MODE=offline.

    Args:
        name: wandb or trackio.
    """
    from accelerate import PartialState
    from accelerate.tracking import TrackioTracker, WandBTracker

    PartialState()  # which the trackers' logging reads; it joins the processes that there are
    file = run / TRACKER_FILE
    if not file.is_file():
        files.write_text(file, uuid.uuid4().hex[:12])
    identity = file.read_text(encoding="utf-8").strip()
    title = f"{run.absolute().name}-{identity}"
    if name == "wandb":
        tracker = WandBTracker(os.environ.get("WANDB_PROJECT", "lapwan"), name=title, id=identity, resume="allow",
                               dir=str(run))
    else:
        tracker = TrackioTracker(os.environ.get("TRACKIO_PROJECT", "lapwan"), name=title, resume="allow")
    tracker.start()
    return tracker


class MetricsWriter:
    """Appends to a run's metrics; on resume the lines after the resumed step are removed first.

    Args:
        run: the run folder.
        resumed_step: the step that the run goes on from.
        tracker: what gets the same figures besides TensorBoard: wandb or trackio.
    """

    def __init__(self, run: Path, resumed_step: int, tracker: str | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        quiet_system_errors_of_threads()
        self._path = run / METRICS_FILE
        if self._path.exists():
            kept = (line for _, line, value in json_lines(self._path) if _step(value) <= resumed_step)
            files.write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)
        self._tracker = None if tracker is None else start_tracker(tracker, run)

    @property
    def board(self) -> Any:
        """The TensorBoard writer, for images."""
        return self._board

    def write(self, step: int, noise_expert: str, figures: Mapping[str, float], shared: Mapping[str, float]) -> None:
        """One line: `figures` of this noise expert's steps, and `shared` figures of the whole run.

        Keys with a slash are TensorBoard tags, other keys get `train/` in front. Each of the figures is also written
        under a tag of its noise expert.
        """
        row: dict[str, Any] = {"step": step, "noise_expert": noise_expert}
        row |= {k: v if math.isfinite(v) else None for k, v in {**figures, **shared}.items()}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        for key, value in figures.items():
            tag = key if "/" in key else f"train/{key}"
            self._board.add_scalar(tag, value, step)
            self._board.add_scalar(f"{tag}/{noise_expert}_noise", value, step)
        for key, value in shared.items():
            self._board.add_scalar(key, value, step)
        if self._tracker is not None:
            own = {f"{key if '/' in key else f'train/{key}'}/{noise_expert}_noise": value
                   for key, value in figures.items() if math.isfinite(value)}
            self._tracker.log({**own, **{key: v for key, v in shared.items() if math.isfinite(v)}}, step=step)

    def histogram(self, tag: str, values: list[float], step: int) -> None:
        """A histogram in TensorBoard."""
        import numpy as np

        self._board.add_histogram(tag, np.asarray(values), step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.finish()


def _step(value: Any) -> int:
    """The step of a line; of one that a kill has cut short a later one than any."""
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) else 2**63


@dataclass
class LogSummary:
    """Means of figures, and the flow loss and sigma of every sample."""

    means: dict[str, float]
    losses: list[float]
    sigmas: list[float]

    def by_sigma_bin(self, band: Band, bins: int) -> dict[str, float]:
        """Mean flow loss in each of `bins` equal sigma bins that has samples, as `loss_at_sigma/0.900-0.925`."""
        width = (band.high - band.low) / bins
        groups: dict[int, list[float]] = {}
        for loss, sigma in zip(self.losses, self.sigmas, strict=True):
            groups.setdefault(bin_of(sigma, band, bins), []).append(loss)
        return {
            f"loss_at_sigma/{band.low + i * width:.3f}-{band.low + (i + 1) * width:.3f}": sum(losses) / len(losses)
            for i, losses in sorted(groups.items())
        }


def bin_of(sigma: float, band: Band, bins: int) -> int:
    """The index of the equal part of the band that sigma lies in."""
    return min(bins - 1, max(0, int((sigma - band.low) / (band.high - band.low) * bins)))


@dataclass
class StepLog:
    """Sums and counts of one noise expert's figures since the last log line, and its samples."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    sigmas: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, loss: Loss, total_B: Tensor, sigma_B: Tensor) -> None:
        """Add a batch."""
        for name, values in {**loss.figures, "loss": total_B.detach()}.items():
            self.sums[name] = self.sums.get(name, 0) + values.sum()
            self.counts[name] = self.counts.get(name, 0) + values.numel()
        self.losses.append(loss.figures.get("loss/diffusion", total_B.detach()))
        self.sigmas.append(sigma_B.detach())

    def to_host(self) -> HostLog:
        """All of it as plain numbers; waits for the device."""
        sums = {name: (float(total), self.counts[name]) for name, total in self.sums.items()}
        losses = torch.cat(self.losses).tolist() if self.losses else []
        return sums, losses, torch.cat(self.sigmas).tolist() if self.sigmas else []


def merge_logs(logs: Sequence[HostLog]) -> LogSummary:
    """The logs of all processes as one."""
    totals: dict[str, tuple[float, int]] = {}
    for sums, _, _ in logs:
        for name, (total, count) in sums.items():
            before = totals.get(name, (0.0, 0))
            totals[name] = (before[0] + total, before[1] + count)
    means = {name: total / count for name, (total, count) in totals.items() if count}
    return LogSummary(
        means, [loss for _, losses, _ in logs for loss in losses], [sigma for *_, sigmas in logs for sigma in sigmas])
