"""Settings of the callbacks of a training run: statistics of the weights, validation, previews, health."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Flag, Settings


class WatchSettings(Settings):
    """Magnitudes, norms and ratios of the trained weights."""

    every: int = Field(100, ge=1, description="Steps of the run between two measurements.")


class ValidationSettings(Settings):
    """Loss on held-out clips. Noise and sigmas are always the same, so that two evaluations can be compared."""

    every: int | None = Field(None, ge=1, description="Steps of the run between two evaluations; absent: none.")
    split: str = Field("test", description="Clips of this split.")
    clips: int = Field(8, ge=1, description="Largest number of clips, evenly spaced over the split.")
    sigmas: int = Field(4, ge=1, description="Noise levels per clip, at equal quantiles of each noise expert's "
                                             "distribution.")


class PreviewSettings(Settings):
    """Videos sampled through both noise experts with the current weights."""

    every: int | None = Field(None, ge=1, description="Steps of the run between two previews; absent: none.")
    prompts: tuple[str, ...] = ()
    hints: tuple[str, ...] | Literal["families"] = Field(
        (), description="train-moe: each prompt also with these hints; families: one hint for each family.")
    images: tuple[Path, ...] = Field((), description="First frame of each prompt, for image-to-video models.")
    last_images: tuple[Path, ...] = Field((), description="Last frame of each prompt, beside images.")
    steps: int | None = Field(None, ge=1, le=10_000, description="Sampling steps; absent: the model's default.")
    size: tuple[int, int] | None = Field(None, description="Height, width; absent: those of the first clip.")
    num_frames: int | None = Field(None, ge=1, description="4N+1; absent: that of the first clip.")
    guidance: float | None = Field(None, ge=1, description="Absent: the model's default.")
    seed: int = 42

    @model_validator(mode="after")
    def _some(self) -> PreviewSettings:
        if self.every is not None and not self.prompts:
            raise ValueError("every is set, but prompts is empty; give prompts, or leave every out")
        if self.images and len(self.images) != len(self.prompts):
            raise ValueError(f"{len(self.images)} images for {len(self.prompts)} prompts; give one for each")
        if self.last_images and len(self.last_images) != len(self.images):
            raise ValueError(f"{len(self.last_images)} last_images for {len(self.images)} images; give one for each")
        return self


class HealthSettings(Settings):
    """The rules of `inspect-weights`, applied during training. Their thresholds come from experience with one run."""

    preset: Annotated[Literal["motion", "character"] | None, Flag("--preset")] = Field(
        None, description="Check the weights during the run: motion (the high noise expert must lead) or character "
        "(the low one).")
    on_unhealthy: Literal["warn", "stop"] = Field("warn", description="stop: save the state and end the run.")
    after: int = Field(100, ge=1, description="Steps of each noise expert before the first check.")
    patience: int = Field(2, ge=1, description="Consecutive measurements (watch.every) at which a rule must fail.")
