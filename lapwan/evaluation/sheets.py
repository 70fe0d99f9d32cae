"""Contact sheets side by side: for each clip its own frames, then every adapter's video at the same noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

from lapwan.evaluation.clips import EvalClip, VideoShape, spread
from lapwan.evaluation.store import VideoStore
from lapwan.evaluation.study import Study
from lapwan.sampling.image import read_clip
from lapwan.sampling.sheet import contact_sheet

_COLUMNS, _SEEN_WIDTH = 6, 128  # frames a row; pixels of a frame


def side_by_side_sheet(study: Study, store: VideoStore, count: int) -> Image.Image:
    """`count` of the clips, spread evenly, at the first seed."""
    assert study.sampling is not None
    shape = study.sampling.shape
    rows: list[np.ndarray] = []
    captions: list[str] = []
    for clip in spread(study.clips, count):
        if clip.lacking(shape) is None:
            rows.append(clip.frames(shape))
            captions.append(f"clip: {clip.prompt}")
        for arm in study.arms:
            rows.append(_read(store, study, clip, arm.name))
            hint = arm.hint_for(clip)
            captions.append(arm.name if hint is None else f"{arm.name} ({hint})")
    return contact_sheet(rows, _COLUMNS, captions, scale=_scale(shape))


def arm_sheet(study: Study, store: VideoStore, name: str, count: int) -> Image.Image:
    """One adapter's videos of `count` clips, prompts above them."""
    assert study.sampling is not None
    clips = spread(study.clips, count)
    return contact_sheet([_read(store, study, clip, name) for clip in clips], _COLUMNS,
                         [_title(clip) for clip in clips], scale=_scale(study.sampling.shape))


def _title(clip: EvalClip) -> str:
    return f"{clip.instrument}: {clip.prompt}" if clip.instrument else clip.prompt


def _read(store: VideoStore, study: Study, clip: EvalClip, name: str) -> np.ndarray:
    assert study.sampling is not None
    shape = study.sampling.shape
    arm = next(arm for arm in study.arms if arm.name == name)
    return read_clip(store.path(arm, clip, 0), shape.frames, shape.size, shape.fps)


def _scale(shape: VideoShape) -> int:
    return max(1, round(_SEEN_WIDTH / shape.size[1]))

