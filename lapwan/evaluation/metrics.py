"""From the metrics asked for to scorers: what the clips allow, and a clear word where they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.evaluation.clips import EvalClip, VideoShape
from lapwan.evaluation.scorers import Identity, Made, Reference, Scorer, Temporal, TipAccuracy
from lapwan.rewards.base import Reward, score
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.wan.folder import Task


class RewardScore:
    """`NAME_score`: mean over frames of a reward's score against the prompt (CLIP: 100·cosine with its own scale), and
    `NAME_steadiness`: mean cosine of neighbouring frames' embeddings."""

    def __init__(self, name: str, load: Callable[[], Reward], device: torch.device, frames: int = 8) -> None:
        self._name, self._load, self._device, self._frames = name, load, device, frames

    @property
    def names(self) -> tuple[str, ...]:
        """`clip_score`, `clip_steadiness`."""
        return f"{self._name}_score", f"{self._name}_steadiness"

    @cached_property
    def _reward(self) -> Reward:
        return self._load()

    @torch.no_grad()
    def score(self, made: Made) -> Mapping[str, float]:
        chosen = np.linspace(0, len(made.frames_THWC) - 1, min(self._frames, len(made.frames_THWC))).round().astype(int)
        pixels = torch.from_numpy(made.frames_THWC[chosen]).permute(0, 3, 1, 2).float().to(self._device) / 255
        told = score(self._reward, pixels, [made.clip.prompt] * len(pixels))
        return {self.names[0]: float(told.mean()), self.names[1]: _steadiness(self._reward.image(pixels))}


def _steadiness(embeddings_ND: Tensor) -> float:
    if len(embeddings_ND) < 2:
        return float("nan")
    return float((embeddings_ND[1:] * embeddings_ND[:-1]).sum(dim=1).mean())


def make_scorers(
    asked: Sequence[str] | None, clips: Sequence[EvalClip], task: Task, shape: VideoShape,
    rewards: Mapping[str, Callable[[], Reward]], device: torch.device,
) -> list[Scorer]:
    """The scorers of the metrics asked for; None: all that the clips allow.

    Raises:
        UserError: a metric that the clips or the task do not allow.
    """
    refusals = {
        "identity": _no_identity(clips, shape), "tip": _no_tip(clips, task, shape),
        "reference": next((why for clip in clips if (why := clip.lacking(shape)) is not None), None),
        "temporal": None, "reward": None if rewards else "no rewards are given; set rewards, such as clip=FOLDER",
    }
    if asked is None:
        # Against a reference only where the video starts as it does: text alone does not say how a clip looks.
        asked = [m for m, why in refusals.items() if why is None and (m != "reference" or task == "i2v")]
    found: list[Scorer] = []
    for metric in dict.fromkeys(asked):
        if (why := refusals[metric]) is not None:
            raise UserError(f"metric '{metric}': {why}")
        match metric:
            case "identity":
                found.append(Identity())
            case "tip":
                found.append(TipAccuracy())
            case "reference":
                found.append(Reference())
            case "temporal":
                found.append(Temporal())
            case "reward":
                found += [RewardScore(name, load, device) for name, load in rewards.items()]
    return found


def _no_identity(clips: Sequence[EvalClip], shape: VideoShape) -> str | None:
    """Why the instrument cannot be judged; None if it can."""
    foreign = next((clip for clip in clips if not clip.synthetic or clip.instrument not in INSTRUMENTS), None)
    if foreign is not None:
        return (f"clip '{foreign.id}' is none of the embedded model's synthetic scenes (source = \"synthetic\", "
                f"instrument one of {', '.join(INSTRUMENTS)}), and its evaluators know no other")
    if shape.size[0] != shape.size[1]:
        return f"the evaluators take square frames, not {shape.size[0]}x{shape.size[1]}"
    return None


def _no_tip(clips: Sequence[EvalClip], task: Task, shape: VideoShape) -> str | None:
    if task != "i2v":
        return "where the tip goes follows from the first frame, so it is measured on image-to-video only"
    if (why := _no_identity(clips, shape)) is not None:
        return why
    if any(clip.tips_T2 is None for clip in clips):
        first = next(clip for clip in clips if clip.tips_T2 is None)
        return f"clip '{first.id}' has no tip, which it needs"
    short = next((clip for clip in clips if clip.tips_T2 is not None and len(clip.tips_T2) < shape.frames), None)
    if short is not None and short.tips_T2 is not None:
        return f"clip '{short.id}' says its tip in {len(short.tips_T2)} frames, {shape.frames} are made"
    return None
