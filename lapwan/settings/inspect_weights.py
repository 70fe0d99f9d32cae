"""Settings of `lapwan inspect-weights`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Flag, Settings


class InspectWeightsSettings(Settings):
    """Statistics of a pair of LoRA files, of one LoRA or mixture, or of a run folder."""

    files: Annotated[tuple[Path, ...], Flag(positional=True, metavar="HIGH LOW | FILE | RUN_FOLDER")] = Field(
        default=(), description="The LoRAs of the high and the low noise expert, one file, or a run folder.")
    preset: Annotated[Literal["motion", "character"], Flag(metavar="motion|character")] = Field(
        default="motion", description="Purpose of the LoRA: for motion the high noise expert must lead, for character "
                                      "(and style) the low one.")
    by: Annotated[Literal["expert", "block", "projection"], Flag(metavar="expert|block|projection")] = Field(
        default="expert", description="Rows of the table: one for each noise expert, block, or projection.")
    json_file: Annotated[str | None, Flag("--json", metavar="FILE|-")] = Field(
        default=None, description="Write the figures as JSON to a file, or to stdout with -.")
    plot: Annotated[Path | None, Flag(metavar="FILE.png")] = Field(
        default=None, description="Plot magnitudes over steps and a heat map by block and projection.")
    page: Annotated[Path | None, Flag(metavar="FILE.html")] = Field(
        default=None, description="Verdict, tables and plot as one page for a browser.")
    lr: Annotated[dict[NoiseExpert, float] | None, Flag(metavar="high=A,low=B")] = Field(
        default=None, description="Learning rates, if neither the files nor metrics.jsonl hold them.")
    base: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        default=None, description="Also compare the LoRA's updates with the weights of this model, or of a "
                                  "transformer's file or folder.")

    @field_validator("lr", mode="before")
    @classmethod
    def _rates(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        rates: dict[str, str] = {}
        for part in value.split(","):
            name, equals, rate = part.partition("=")
            if not equals:
                raise ValueError("must be written as high=4e-4,low=1e-4")
            rates[name.strip()] = rate
        return rates

    @model_validator(mode="after")
    def _check(self) -> InspectWeightsSettings:
        if not 1 <= len(self.files) <= 2:
            raise ValueError(f"{len(self.files)} files given; give HIGH LOW, one FILE, or a RUN_FOLDER")
        if len(self.files) == 2 and self.files[0] == self.files[1]:
            raise ValueError(f"the same file twice: {self.files[0]}; give the high noise expert's and the low one's")
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            raise ValueError(f"plot {self.plot}: a plot must be a .png file")
        if self.page is not None and self.page.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"page {self.page}: a page must be an .html file")
        if self.lr and not all(rate > 0 and math.isfinite(rate) for rate in self.lr.values()):
            raise ValueError("lr: learning rates must be above 0")
        return self
