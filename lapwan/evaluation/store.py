"""Finished videos of an evaluation with their scores, so that an interrupted one goes on where it stopped.

`videos/ARM/NAME_SEED.mp4` and, written after it, `NAME_SEED.json` with what the video was made from: a video counts
only with its JSON, and only if everything that decides it is still the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lapwan import __version__, files
from lapwan.evaluation.arms import Arm
from lapwan.evaluation.clips import EvaluationClip
from lapwan.sampling.video import write_video

if TYPE_CHECKING:
    from lapwan.evaluation.engine import Sampling

_CRF = 12  # finer than the default: small instruments are judged by eye too


class VideoStore:
    """A folder of videos by arm.

    Args:
        decides: what else decides the pixels or scores: the machine's kind, the precision, the rewards' weights.
    """

    def __init__(self, folder: Path, *decides: str) -> None:
        self.folder, self._decides = folder, decides

    def path(self, arm: Arm, clip: EvaluationClip, index: int) -> Path:
        """Where the video of a clip and seed lies."""
        name = f"{_plain(Path(clip.id).stem)[:40]}_{hashlib.sha256(clip.id.encode()).hexdigest()[:8]}_{index}.mp4"
        return self.folder_of(arm) / name

    def folder_of(self, arm: Arm) -> Path:
        """Where an arm's videos lie."""
        return self.folder / _plain(arm.name)

    def find(
        self, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int, names: Sequence[str]
    ) -> dict[str, float] | None:
        """The scores of a finished video, if it is the one that would be made now and has all of `names`."""
        path = self.path(arm, clip, index)
        try:
            said = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        scores = said.get("scores", {})
        if said.get("key") != self._key(arm, clip, sampling, index) or not path.is_file():
            return None
        if any(name not in scores for name in names):
            return None
        return {name: math.nan if scores[name] is None else float(scores[name]) for name in names}

    def keep(
        self, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int, frames: np.ndarray, scores: Mapping[str, float]
    ) -> None:
        """Write the video, then its scores."""
        path = self.path(arm, clip, index)
        path.with_suffix(".json").unlink(missing_ok=True)
        write_video(path, frames, sampling.shape.fps, {"prompt": clip.prompt}, _CRF)
        said = {"key": self._key(arm, clip, sampling, index), "clip": clip.id, "prompt": clip.prompt, "seed": index,
                "scores": {name: None if math.isnan(value) else value for name, value in scores.items()}}
        files.write_text(path.with_suffix(".json"), json.dumps(said, ensure_ascii=False) + "\n")

    def _key(self, arm: Arm, clip: EvaluationClip, sampling: Sampling, index: int) -> str:
        shape = sampling.shape
        said = [
            __version__, arm.fingerprint, clip.id, clip.prompt, clip.weights, clip.instrument, _content(clip), index,
            shape.frames, shape.size, shape.fps, sampling.steps, sorted((e.value, g) for e, g in
                                                                      sampling.guidance.items()),
            sampling.seed, sampling.negative_prompt, sampling.flow_shift, sampling.sampler, sampling.guidance_interval,
            *self._decides,
        ]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _content(clip: EvaluationClip) -> list[object]:
    """What stands for the reference video: its size and time of change; its tip and boxes."""
    files_ = [path.stat() for path in (clip.video, clip.mask) if path is not None]
    tips = None if clip.tips_T2 is None else clip.tips_T2.tolist()
    return [[[facts.st_size, facts.st_mtime_ns] for facts in files_], tips, list(clip.roi)]


def _plain(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name) or "_"
