"""What may be asked of `lapwan generate`.

How to add an option of a video: a field of `VideoSettings` with a Flag, its use in `lapwan.sampling.request` and
`lapwan.api`; it then works on the command line, in TOML and in a prompts file.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Flag, Settings, height_width
from lapwan.settings.lora_argument import LORA_METAVAR, LoraArgument
from lapwan.settings.memory import MEMORY_METAVAR, GenerateDtype, MemoryChoice
from lapwan.settings.model import ModelChoice


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


class ModelSettings(Settings):
    """What is loaded once, for any number of videos."""

    model: Annotated[ModelChoice | None, Flag(metavar="MODEL")] = Field(
        default=None, description="'tiny' (embedded), a model folder in diffusers layout, or a hub id fetched before."
    )
    lora: Annotated[tuple[LoraArgument, ...], Flag(metavar=LORA_METAVAR)] = Field(
        default=(), description="A LoRA, repeatable: FILE:0.8, or with its noise expert high=FILE, low=FILE, "
        "both=FILE; otherwise the file says it."
    )
    fold: Annotated[bool, Flag()] = Field(
        default=False, description="LoRAs go into the weights in memory, rounded as lapwan merge does, instead of "
        "acting beside them: each step is shorter, loading longer."
    )
    moe: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="A mixture of LoRA experts; the prompt chooses among them unless a hint does."
    )
    device: Annotated[str, Flag(metavar="DEVICE")] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N.", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
    )
    dtype: Annotated[GenerateDtype, Flag(metavar="auto|fp32|bf16|fp16|fp8|int8|nf4")] = Field(
        default="auto", description="Of the transformers; auto is bf16 on a GPU, fp32 on a CPU. fp8 is faster on new "
        "GPUs, int8 and nf4 are for small ones; they quantise the blocks and compute the rest as auto does."
    )
    text_dtype: Annotated[Literal["auto", "fp8", "int8"], Flag(metavar="auto|fp8|int8")] = Field(
        default="auto", description="Of the text encoder; auto: as it is stored."
    )
    memory: Annotated[MemoryChoice, Flag(metavar=MEMORY_METAVAR)] = Field(
        default="auto", description="Both noise experts on the device, one at a time, or their blocks streamed from "
        "host memory; a number is the GiB to stay below; auto: what fits and is fastest."
    )
    compile: Annotated[Literal["auto", "on", "off"], Flag(metavar="auto|on|off")] = Field(
        default="auto", description="Blocks through torch.compile; auto: on a GPU where a video saves what it takes."
    )


class VideoSettings(Settings):
    """One video; what is left out is the model's own. These are also the keys of a line of a prompts file."""

    prompt: Annotated[str | None, Flag(metavar="TEXT")] = Field(default=None, description="What the video shows.")
    image: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="First frame, for an image-to-video model; fitted to the size by scaling and cutting."
    )
    last_image: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Last frame as well, with --image."
    )
    video: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Start from this video's frames instead of from noise alone; see --start-sigma."
    )
    start_sigma: Annotated[float | None, Flag(metavar="SIGMA")] = Field(
        default=None, gt=0, le=1, description="With --video: noise it starts from, 0 to 1, 0.8 if not given; "
        "more changes more."
    )
    negative_prompt: Annotated[str | None, Flag(metavar="TEXT")] = Field(
        default=None, description="What to steer away from; Wan's official one by default, '' for none."
    )
    instrument_hint: Annotated[str | None, Flag(metavar="NAME|MIX")] = Field(
        default=None, description="The mixture's expert: hook, 电凝钩, or a mix such as hook:0.7,suction:0.3."
    )
    alpha_base: Annotated[float | None, Flag(metavar="NUMBER")] = Field(
        default=None, description="Strength of the base LoRA the mixture was trained over; 1 if not given."
    )
    alpha_expert: Annotated[float | dict[str, float] | None, Flag(metavar="X|NAME=X,..")] = Field(
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
    guidance_interval: Annotated[tuple[float, float] | None, Flag(metavar="LOW,HIGH")] = Field(
        default=None, description="Guide only where sigma lies in this interval, such as 0.2,0.95."
    )
    flow_shift: Annotated[float | None, Flag(metavar="S")] = Field(
        default=None, gt=0, description="More steps at high noise the larger it is; the checkpoint's own by default."
    )
    boundary: Annotated[float | None, Flag(metavar="SIGMA")] = Field(
        default=None, gt=0, lt=1, description="The high noise expert serves from this sigma on, the low one below; the "
        "model's own by default."
    )
    sampler: Annotated[Literal["unipc", "euler", "dpmpp"], Flag(metavar="unipc|euler|dpmpp")] = Field(
        default="unipc", description="Solver."
    )
    sigmas: Annotated[tuple[float, ...] | None, Flag(metavar="S,S,...")] = Field(
        default=None, description="Own noise levels, falling from at most 1, instead of --steps and --flow-shift."
    )
    first_block_cache: Annotated[float | dict[NoiseExpert, float] | None, Flag(metavar="E|high=E,low=E")] = Field(
        default=None, description="Approximate: a step skips all blocks but the first and keeps the last step's where the "
        "velocity's relative error is predicted under E, such as 0.05."
    )
    seed: Annotated[int, Flag(metavar="N")] = Field(
        default=42, ge=0, lt=2**63, description="The same seed gives the same noise on every machine."
    )

    def moe_options(self) -> list[str]:
        """Names of the options given that act on a mixture only; a strength of 1 is that without any option."""
        names = ("instrument_hint", "alpha_base", "alpha_expert")
        return [name for name in names if getattr(self, name) not in (None, 1.0)]

    _size = field_validator("size", mode="before")(height_width)

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def _interval(cls, value: Any) -> Any:
        if value is None:
            return None
        parts = re.split(r"[,，]", value) if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or len(parts) != 2:
            raise ValueError("two sigmas LOW,HIGH, such as 0.2,0.95")
        return tuple(parts)

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 1:
            raise ValueError("two sigmas LOW,HIGH with 0 <= LOW < HIGH <= 1")
        return value

    @field_validator("sigmas", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return re.split(r"[,，]", value) if isinstance(value, str) else value

    @field_validator("sigmas")
    @classmethod
    def _falling(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        falls = value is None or (bool(value) and value[0] <= 1 and value[-1] > 0 and all(
            before > after for before, after in itertools.pairwise(value)))
        if not falls:
            raise ValueError("numbers falling from at most 1 and above 0, such as 1,0.94,0.83,0.62")
        return value

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance(cls, value: Any) -> Any:
        parsed = number_or_named(value, "high=4,low=3")
        if isinstance(parsed, dict) and (unknown := [name for name in parsed if name not in tuple(NoiseExpert)]):
            raise ValueError(f"'{unknown[0]}' is no noise expert; write a number, or high=4,low=3")
        return parsed

    @field_validator("first_block_cache", mode="before")
    @classmethod
    def _first_block_cache(cls, value: Any) -> Any:
        parsed = number_or_named(value, "high=0.1,low=0.05")
        if isinstance(parsed, dict) and (unknown := [name for name in parsed if name not in tuple(NoiseExpert)]):
            raise ValueError(f"'{unknown[0]}' is no noise expert; write a number, or high=0.1,low=0.05")
        return parsed

    @field_validator("first_block_cache")
    @classmethod
    def _first_block_cache_is_an_error(cls, value: float | dict[NoiseExpert, float] | None) -> Any:
        for one in value.values() if isinstance(value, dict) else [value]:
            if one is not None and not 0 < one < 1:
                raise ValueError(f"{one:g} is no relative error above 0 and below 1, such as 0.05")
        return value

    @field_validator("alpha_expert", mode="before")
    @classmethod
    def _alpha_expert(cls, value: Any) -> Any:
        return number_or_named(value, "hook=1.2,other=0.8")


class LineSettings(VideoSettings):
    """A line of a prompts file."""

    output: Path | None = Field(default=None, description="Name of this video inside the output folder.")


class GenerateSettings(VideoSettings, ModelSettings):
    """Settings of `lapwan generate`."""

    prompts: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Many videos in one load: JSON lines with prompt and any option of a video."
    )
    from_video: Annotated[Path | None, Flag("--from", metavar="VIDEO")] = Field(
        default=None, description="Repeat a video lapwan made, from the settings it carries; other options override."
    )
    interactive: Annotated[bool, Flag()] = Field(
        default=False, description="Ask for one prompt after the other; the model stays loaded."
    )
    videos: Annotated[int, Flag(metavar="N")] = Field(
        default=1, ge=1, le=1000, description="Videos per prompt, with seeds N, N+1, ..."
    )
    grid: Annotated[tuple[str, ...], Flag(metavar="OPTION=A,B,...")] = Field(
        default=(), description="Compare at the same noise, such as alpha_expert=0,0.5,1 or moe=none;A;B, also in one "
        "video."
    )
    output: Annotated[Path | None, Flag("-o", "--output", metavar="PATH")] = Field(
        default=None, description="NAME.mp4, .gif, .webp, .png (one frame), .safetensors (latents), or a folder of PNG "
        "frames; for many videos their folder."
    )
    crf: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=0, le=51, description="Quality of an .mp4, 0 (best) to 51; 18 if not given."
    )
    preview: Annotated[bool, Flag()] = Field(
        default=False, description="Show what is emerging in a PNG beside the output, after every step."
    )
    sheet: Annotated[bool, Flag()] = Field(
        default=False, description="Also write a contact sheet beside the output."
    )
