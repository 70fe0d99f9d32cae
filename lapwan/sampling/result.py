"""A generated video: its frames, and what made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lapwan import __version__
from lapwan.errors import UserError
from lapwan.files import atomic_file, claim_output
from lapwan.lora.tensorfile import read_header
from lapwan.sampling.video import DEFAULT_CRF, check_video_path, read_video_metadata, write_video

LATENTS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Video:
    """`frames` uint8 RGB [T, H, W, 3]; `latents` normalised [1, C, T, H, W] on the CPU.

    `settings` as the command line names them, enough to make it again; `facts`: fingerprints of model, adapters and
    image, the chosen gates, versions.
    """

    frames: np.ndarray
    fps: int
    latents: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """What is stored in the file: settings and facts as JSON."""
        return {
            "lapwan": __version__,
            "settings": json.dumps(self.settings, ensure_ascii=False),
            "facts": json.dumps(self.facts, ensure_ascii=False),
        }

    def save(self, path: str | Path, overwrite: bool = False, crf: int | None = None) -> Path:
        """Write `.mp4`, `.gif`, `.webp`, `.png` (one frame), a folder of frames, or the latents as `.safetensors`,
        atomically; the path, absolute.

        Args:
            crf: H.264 quality, 0 (best) to 51; None is 18.

        Raises:
            UserError: the output exists and `overwrite` is False, a path that is not written, or a full disk.
        """
        target = Path(path).expanduser().absolute()
        claim_output(target, overwrite)
        try:
            if target.suffix == LATENTS_SUFFIX:
                with atomic_file(target) as temporary:
                    save_file({"latents": self.latents}, temporary, metadata=self.metadata())
            else:
                write_video(target, self.frames, self.fps, self.metadata(), DEFAULT_CRF if crf is None else crf)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {target}: {error}") from None
        return target


def check_output(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Refuse, before any work, a path that a video of `frames` frames of `size` (H, W) could not be saved to."""
    if path.suffix != LATENTS_SUFFIX:
        check_video_path(path, frames, size)


def read_metadata(path: Path) -> dict[str, str]:
    """What `Video.save` stored in a file; {} if it is somebody else's.

    Raises:
        UserError: missing, or neither a video, an image nor safetensors.
    """
    if path.suffix == LATENTS_SUFFIX:
        return read_header(path).metadata
    return read_video_metadata(path)
