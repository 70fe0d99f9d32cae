"""What may be asked of `lapwan generate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Flag, Settings
from lapwan.settings.lora_argument import LORA_METAVAR, LoraArgument


def parse_numbers(text: str, names: str) -> dict[str, float]:
    """`high=4,low=3` -> {"high": 4.0, "low": 3.0}; `:` and full-width punctuation are taken too.

    Raises:
        ValueError: a part without a name or number, or a name twice.
    """
    found: dict[str, float] = {}
    for part in re.split(r"[,，;；]", text):
        match = re.fullmatch(r"\s*(?P<name>.+?)\s*[=＝:：]\s*(?P<number>[^=＝:：]+?)\s*", part)
        try:
            if match is None:
                raise ValueError
            name, number = match["name"], float(match["number"])
        except ValueError:
            raise ValueError(f"'{part.strip()}' is not understood; write a number, or {names}") from None
        if name in found:
            raise ValueError(f"'{name}' is given twice")
        found[name] = number
    return found


def number_or_named(value: Any, names: str) -> Any:
    """A number as it is, its text as a number, `name=number,...` as a dict; anything else for pydantic to judge."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return parse_numbers(value, names)


class GenerateSettings(Settings):
    """Settings of `lapwan generate`; what is left out is the model's own."""

    model: Annotated[str, Flag(metavar="MODEL")] = Field(
        description="'tiny' (embedded), or a model folder in diffusers layout."
    )
    prompt: Annotated[str, Flag(metavar="TEXT")] = Field(description="What the video shows.")
    output: Annotated[Path, Flag("-o", "--output", metavar="PATH")] = Field(
        description="NAME.mp4, NAME.png (one frame), or a folder for PNG frames."
    )
    image: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="First frame, for an image-to-video model; fitted to the size by scaling and cutting."
    )
    negative_prompt: Annotated[str | None, Flag(metavar="TEXT")] = Field(
        default=None, description="What to steer away from; Wan's official one by default, '' for none."
    )
    lora: Annotated[tuple[LoraArgument, ...], Flag(metavar=LORA_METAVAR)] = Field(
        default=(), description="A LoRA, repeatable; without high= or low= the file says its noise expert."
    )
    moe: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="A mixture of LoRA experts; the prompt chooses among them unless a hint does."
    )
    instrument_hint: Annotated[str | None, Flag(metavar="NAME|MIX")] = Field(
        default=None, description="The mixture's expert: hook, 电凝钩, or a mix such as hook:0.7,suction:0.3."
    )
    alpha_base: Annotated[float | None, Flag(metavar="NUMBER")] = Field(
        default=None, description="Strength of the base LoRA the mixture was trained over; 1 if not given."
    )
    alpha_expert: Annotated[float | dict[str, float] | None, Flag(metavar="NUMBER|NAME=NUMBER,...")] = Field(
        default=None, description="Strength of the mixture's experts: 1.2, or hook=1.2,other=0.8; 1 if not given."
    )
    num_frames: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Frames, 4N+1; the model's own by default."
    )
    size: Annotated[tuple[int, int] | None, Flag(metavar="HEIGHTxWIDTH")] = Field(
        default=None, description="HEIGHT x WIDTH in pixels; by default the model's own, with an image in its shape."
    )
    steps: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Sampling steps; the model's own by default."
    )
    guidance: Annotated[float | dict[NoiseExpert, float] | None, Flag(metavar="G|high=G,low=G")] = Field(
        default=None, description="Classifier-free guidance, 1 for none; each noise expert decides by its own number."
    )
    flow_shift: Annotated[float | None, Flag(metavar="S")] = Field(
        default=None, gt=0, description="More steps at high noise the larger it is; the checkpoint's own by default."
    )
    sampler: Annotated[Literal["unipc", "euler", "dpmpp"], Flag(metavar="unipc|euler|dpmpp")] = Field(
        default="unipc", description="Solver."
    )
    seed: Annotated[int, Flag(metavar="N")] = Field(
        default=42, ge=0, lt=2**63, description="The same seed gives the same noise on every machine."
    )
    device: Annotated[str, Flag(metavar="DEVICE")] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N.", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
    )
    dtype: Annotated[Literal["auto", "fp32", "bf16"], Flag(metavar="auto|fp32|bf16")] = Field(
        default="auto", description="Of the transformers; auto is bf16 on a GPU, fp32 on a CPU."
    )

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*(\d+)\s*[xX×*]\s*(\d+)\s*", value)
        if match is None:
            raise ValueError("HEIGHTxWIDTH in pixels, such as 480x832")
        return int(match[1]), int(match[2])

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance(cls, value: Any) -> Any:
        parsed = number_or_named(value, "high=4,low=3")
        if isinstance(parsed, dict) and (unknown := [name for name in parsed if name not in tuple(NoiseExpert)]):
            raise ValueError(f"'{unknown[0]}' is no noise expert; write a number, or high=4,low=3")
        return parsed

    @field_validator("alpha_expert", mode="before")
    @classmethod
    def _alpha_expert(cls, value: Any) -> Any:
        return number_or_named(value, "hook=1.2,other=0.8")
