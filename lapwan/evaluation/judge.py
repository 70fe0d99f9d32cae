"""What judges videos by their content: whoever runs an evaluation gives one to `metrics.make_scorers`.

`lapwan.tiny.evaluators.SceneJudge` knows the embedded model's scenes. How to add a judge: a class with these members;
a metric that no judge has had yet also needs its name in `lapwan.settings.evaluate.METRICS` and a line in
`metrics.refusals`.
Shapes: T frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from lapwan.evaluation.clips import EvaluationClip, VideoShape


class Judge(Protocol):
    """Reads a video and scores it against the clip that it was made for."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The answers it can give, in the order of its outputs; "none" and "unclear" may be among them."""
        ...

    @property
    def figures(self) -> Mapping[str, tuple[str, ...]]:
        """The figures of each metric it has: `{"identity": ("identity",), "tip": ("tip_accuracy",)}`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of its weights: scores of another judge are not used again. "" if they change with lapwan's version only."""
        ...

    def refuses(self, clip: EvaluationClip) -> str | None:
        """Why videos made for this clip cannot be judged; None if they can."""
        ...

    def refuses_shape(self, shape: VideoShape) -> str | None:
        """Why videos of this shape cannot be judged; None if they can."""
        ...

    def score(self, metric: str, frames_THWC: np.ndarray, clip: EvaluationClip) -> Mapping[str, float]:
        """The figures of one metric for one video (uint8 RGB), NaN where it has none."""
        ...
