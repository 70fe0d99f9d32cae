"""Settings of `lapwan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lapwan.settings.base import Flag, Settings


class DemoSettings(Settings):
    """The whole pipeline on the embedded model."""

    output: Annotated[Path, Flag("-o", metavar="DIR")] = Field(
        Path("lapwan-demo"), description="Folder for everything the demo writes.")
    clips: Annotated[int, Flag()] = Field(96, ge=8, description="Synthetic clips to make.")
    steps: Annotated[int, Flag()] = Field(72, ge=1, description="Optimizer steps of each noise expert, in each stage.")
    prompts: Annotated[int, Flag()] = Field(
        16, ge=2, description="Held-out prompts. Base, stage 1 and stage 2 each generate a video for every prompt; "
        "for three of eight also a video from a first frame.")
    seed: Annotated[int, Flag()] = Field(7, description="Seed of clips, training and videos.")
