"""Settings of `lapwan train-judge`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.settings.base import Flag, Settings, height_width
from lapwan.settings.model import ModelChoice

_STRIDE = 16  # pixels


class TrainJudgeSettings(Settings):
    """A judge of videos, trained on a cache's labels and boxes."""

    cache: Annotated[Path, Flag("--cache", metavar="DIR")] = Field(
        description="Cache whose labelled clips it learns from; boxes (roi) give it pictures without instruments, and "
        "tips.")
    output: Annotated[Path, Flag("-o", "--output", metavar="FILE")] = Field(description="The .safetensors to write.")
    model: Annotated[ModelChoice | None, Flag("-m", metavar="MODEL")] = Field(
        None, description="Model whose VAE made the cache; absent: tiny.")
    labels: Annotated[Path | None, Flag("--labels", metavar="FILE")] = Field(
        None, description="labels.jsonl for caches that carry no labels.")
    clips: Annotated[Path | None, Flag("--clips", metavar="FILE")] = Field(
        None, description="clips.jsonl whose lines have \"tip\", x and y in 0..1 for every frame; absent: tips are the "
        "middles of the boxes.")
    taxonomy: str = Field("surgical4", description="surgical4, cholec6 or a TOML file: the families it names.")
    unlabelled: Annotated[Literal["skip", "none"], Flag("--unlabelled", metavar="skip|none")] = Field(
        "skip", description="Clips without label and boxes: left out, or examples of no instrument.")
    group: Annotated[str | None, Flag("--group", metavar="REGEX")] = Field(
        None, description="What of a clip's path names its source video, such as 'case_(\\d+)'; absent: the file.")
    sources: bool = Field(True, description="Also learn from the source files that the index names, where they are.")
    size: Annotated[tuple[int, int] | None, Flag("--size", metavar="HEIGHTxWIDTH")] = Field(
        None, description="What the network sees, multiples of 16; absent: the clips' shape at no more than 128² "
        "pixels.")
    frames: int = Field(8, ge=1, le=256, description="Frames of each clip, evenly spaced.")
    steps: Annotated[int, Flag("--steps", metavar="N")] = Field(1500, ge=1, description="Optimizer steps.")
    batch_size: int = Field(64, ge=1, description="Frames a step.")
    lr: float = Field(2e-3, gt=0, description="Learning rate of AdamW, with warm-up and a cosine.")
    device: Annotated[str, Flag()] = Field("auto", description="auto, cpu, cuda or cuda:N.")
    seed: Annotated[int, Flag("--seed", metavar="N")] = Field(0, ge=0, description="Seed of weights and draws.")

    _size = field_validator("size", mode="before")(height_width)

    @model_validator(mode="after")
    def _possible(self) -> TrainJudgeSettings:
        if self.output.suffix != ".safetensors":
            raise ValueError(f"output = {self.output} must end in .safetensors")
        if self.size is not None and any(side < 2 * _STRIDE or side % _STRIDE or side > 4096 for side in self.size):
            raise ValueError(f"size = {self.size[0]}x{self.size[1]}: both must be multiples of {_STRIDE}, from "
                             f"{2 * _STRIDE} to 4096")
        return self

    @field_validator("group")
    @classmethod
    def _expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value
