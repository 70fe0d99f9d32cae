"""metrics.jsonl and TensorBoard: one object, or one set of tags, a logged step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapwan import files

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Appends to a run's metrics; on resume what lies after the resumed step is cut off first."""

    def __init__(self, run: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / METRICS_FILE
        if self._path.exists():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step(line) <= resumed_step]
            files.write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    @property
    def board(self) -> Any:
        """TensorBoard's writer, for pictures."""
        return self._board

    def write(self, step: int, noise_expert: str, figures: Mapping[str, float], shared: Mapping[str, float]) -> None:
        """`figures` of this noise expert's step, and `shared` ones of the whole run.

        Keys that hold a slash are TensorBoard tags; each figure of the step is also kept by noise expert.
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

    def histogram(self, tag: str, values: list[float], step: int) -> None:
        """A histogram in TensorBoard."""
        import numpy as np

        self._board.add_histogram(tag, np.asarray(values), step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**63  # a line cut short by a kill
