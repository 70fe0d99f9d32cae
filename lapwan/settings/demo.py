"""Settings of `lapwan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lapwan.settings.base import Flag, Settings


class DemoSettings(Settings):
    """The whole road on the embedded model."""

    output: Annotated[Path, Flag("-o", metavar="DIR")] = Field(
        Path("lapwan-demo"), description="Folder for everything the demo makes.")
    clips: Annotated[int, Flag()] = Field(128, ge=8, description="Synthetic clips to make.")
    steps: Annotated[int, Flag()] = Field(144, ge=1, description="Optimiser steps of each noise expert, in each stage.")
    prompts: Annotated[int, Flag()] = Field(
        16, ge=2, description="Held-out prompts that base, stage 1 and stage 2 each make a video of; of three in eight "
        "as many first frames too.")
    seed: Annotated[int, Flag()] = Field(7, description="Of clips, training and videos.")
