"""Settings of `lapwan doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lapwan.settings.base import Flag, Settings


class DoctorSettings(Settings):
    """What this machine can do, and what of Wan2.2 fits on it."""

    memory: Annotated[float | None, Flag(metavar="GIB")] = Field(
        default=None, gt=0, le=4096, description="Plan for a GPU with this much free memory; default: what is free on "
        "this machine's.")
    folder: Annotated[Path | None, Flag(metavar="DIR")] = Field(
        default=None, description="Folder whose disk is measured; default: lapwan's cache folder.")
    as_json: Annotated[bool, Flag("--json")] = Field(default=False, description="Print JSON instead of tables.")
