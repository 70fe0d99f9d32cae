"""Settings of `lapwan split`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from lapwan.settings.base import Flag, Settings


class SplitSettings(Settings):
    """Long recordings to a clips.jsonl of windows."""

    recordings: Annotated[tuple[Path, ...], Flag(positional=True, metavar="RECORDING...")] = Field(
        default=(), description="Video files, or folders of them.")
    output: Annotated[Path, Flag("-o", metavar="FILE")] = Field(description="The clips.jsonl to write.")
    seconds: Annotated[float, Flag()] = Field(
        5.1, ge=0.01, le=3600, description="Length of a window; 5.1 s are 81 frames at 16 fps.")
    stride: Annotated[float | None, Flag()] = Field(
        None, ge=0.01, description="Seconds between the starts of windows; default: their length.")
    every: Annotated[float, Flag()] = Field(
        0.0, ge=0, description="At most one window in so many seconds; 0: all.")
    scenes: Annotated[bool, Flag()] = Field(False, description="Find scene changes; no window crosses one.")
    keep_black: Annotated[bool, Flag()] = Field(False, description="Keep windows that are black.")
    keep_still: Annotated[bool, Flag()] = Field(False, description="Keep windows in which nothing moves.")
    caption: Annotated[str | None, Flag()] = Field(
        None, description="Caption of every window; default: the text file beside the recording.")

    skip_bad: Annotated[bool, Flag()] = Field(
        False, description="List recordings that cannot be read, but do not fail.")

    @model_validator(mode="after")
    def _some(self) -> SplitSettings:
        if not self.recordings:
            raise ValueError("no recording given; name video files, or a folder of them")
        if self.caption is not None and not self.caption.strip():
            raise ValueError("caption is empty")
        return self
