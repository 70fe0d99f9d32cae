"""Looking at a run while it goes: figures of the weights, held-out losses, previews, health."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Flag, Settings


class WatchSettings(Settings):
    """Magnitudes, norms and ratios of what is trained."""

    every: int = Field(100, ge=1, description="Steps of the run between two looks.")


class ValidationSettings(Settings):
    """Loss on held-out clips with noise and sigmas that are always the same, so that two looks can be compared."""

    every: int | None = Field(None, ge=1, description="Steps of the run between two looks; absent: none.")
    split: str = Field("test", description="Clips of this split.")
    clips: int = Field(8, ge=1, description="At most so many, spread over the split.")
    sigmas: int = Field(4, ge=1, description="Noise levels a clip, at equal parts of each noise expert's draws.")


class PreviewSettings(Settings):
    """Videos sampled through both noise experts with the weights as they are."""

    every: int | None = Field(None, ge=1, description="Steps of the run between two previews; absent: none.")
    prompts: tuple[str, ...] = ()
    hints: tuple[str, ...] | Literal["families"] = Field(
        (), description="train-moe: each prompt also with these hints; families: one of every family.")
    images: tuple[Path, ...] = Field((), description="First frame of each prompt, for image-to-video models.")
    steps: int | None = Field(None, ge=1, description="Sampling steps; absent: the model's own.")
    size: tuple[int, int] | None = Field(None, description="Height, width; absent: of the first clip.")
    num_frames: int | None = Field(None, ge=1, description="4N+1; absent: of the first clip.")
    guidance: float | None = Field(None, ge=1, description="Absent: the model's own.")
    seed: int = 42

    @model_validator(mode="after")
    def _some(self) -> PreviewSettings:
        if self.every is not None and not self.prompts:
            raise ValueError("every is set, but there are no prompts to sample")
        if self.images and len(self.images) != len(self.prompts):
            raise ValueError(f"{len(self.images)} images for {len(self.prompts)} prompts; give one for each")
        return self


class HealthSettings(Settings):
    """The rules of `inspect-weights`, applied while training. Their thresholds are one run's experience."""

    preset: Annotated[Literal["motion", "character"] | None, Flag("--preset")] = Field(
        None, description="Judge the run: motion (the high-noise expert must lead) or character (the low one).")
    on_unhealthy: Literal["warn", "stop"] = Field("warn", description="stop: save the state and end the run.")
    after: int = Field(100, ge=1, description="Own steps each noise expert must have had before anything is judged.")
    patience: int = Field(2, ge=1, description="Looks in a row (watch.every) at which a rule must say stop.")
