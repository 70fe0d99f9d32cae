"""A generated video: its frames, and what made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lapwan import __version__
from lapwan.files import claim_output
from lapwan.sampling.video import write_video


@dataclass(frozen=True)
class Video:
    """`frames` uint8 RGB [T, H, W, 3]; `settings` as the command line names them, enough to make it again; `facts`:
    fingerprints of model, adapters and image, the chosen gates, versions."""

    frames: np.ndarray
    fps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """What is stored in the file: settings and facts as JSON."""
        return {
            "lapwan": __version__,
            "settings": json.dumps(self.settings, ensure_ascii=False),
            "facts": json.dumps(self.facts, ensure_ascii=False),
        }

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write `.mp4`, `.png` (one frame) or a folder of frames, atomically; the path, absolute.

        Raises:
            UserError: the output exists and `overwrite` is False, or a path that is not written.
        """
        target = Path(path).expanduser().absolute()
        claim_output(target, overwrite)
        write_video(target, self.frames, self.fps, self.metadata())
        return target
