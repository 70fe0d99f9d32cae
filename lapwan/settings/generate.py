"""Settings of `lapwan generate`: the model (`ModelSettings`), a video (`VideoSettings`), the command.

How to add an option of a video: a field of `VideoSettings` with a Flag, and a field of the same name in
`lapwan.sampling.request.Request`, which the generator reads. It then works on the command line, in TOML, in a prompts
file, in --grid and --from, and is in the video's metadata. Python takes it once `VideoGenerator.generate` has it.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lapwan.files import is_plain_name
from lapwan.names import NoiseExpert
from lapwan.settings.base import Flag, Settings, height_width
from lapwan.settings.lora_argument import LORA_METAVAR, AdapterRule, CommonModules, LoraArgument, Strict
from lapwan.settings.memory import MEMORY_METAVAR, GenerateDtype, MemoryChoice
from lapwan.settings.model import ModelChoice


def parse_numbers(text: str, names: str) -> dict[str, float]:
    """`high=4,low=3` -> {"high": 4.0, "low": 3.0}; `:` and full-width punctuation are accepted too.

    Raises:
        ValueError: a part without a name or number, or a name twice.
    """
    numbers: dict[str, float] = {}
    for part in re.split(r"[,，;；]", text):
        match = re.fullmatch(r"\s*(?P<name>.+?)\s*[=＝:：]\s*(?P<number>[^=＝:：]+?)\s*", part)
        try:
            if match is None:
                raise ValueError
            name, number = match["name"], float(match["number"])
        except ValueError:
            raise ValueError(f"'{part.strip()}' is not understood; write a number, or {names}") from None
        if name in numbers:
            raise ValueError(f"'{name}' is given twice")
        numbers[name] = number
    return numbers


def number_or_named(value: Any, names: str) -> Any:
    """Parse a text as a number, or `name=number,...` as a dict; any other type is left to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return parse_numbers(value, names)


def _by_noise_expert(value: Any, example: str) -> Any:
    parsed = number_or_named(value, example)
    if isinstance(parsed, dict) and (unknown := [name for name in parsed if name not in tuple(NoiseExpert)]):
        raise ValueError(f"'{unknown[0]}' is not a noise expert; write a number, or {example}")
    return parsed


class ModelSettings(AdapterRule):
    """The model and its adapters, loaded once for any number of videos."""

    model: Annotated[ModelChoice | None, Flag(metavar="MODEL")] = Field(
        default=None, description="'tiny' (embedded), a model folder in diffusers layout, or the hub id of a "
        "downloaded model."
    )
    lora: Annotated[tuple[LoraArgument, ...], Flag(metavar=LORA_METAVAR)] = Field(
        default=(), description="A LoRA, repeatable: FILE:0.8, or for one noise expert high=FILE, low=FILE, or "
        "both=FILE; by default the file decides. FILE:0.8@blocks.20-39@ffn applies its modules in these parts only."
    )
    fold: Annotated[bool, Flag()] = Field(
        default=False, description="Merge the LoRAs into the weights in memory, rounded as by lapwan merge, instead of "
        "computing them beside the weights: faster steps, slower loading."
    )
    moe: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="A mixture of LoRA experts; its router chooses among them by the prompt, unless a "
        "hint is given."
    )
    device: Annotated[str, Flag(metavar="DEVICE")] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N.", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
    )
    dtype: Annotated[GenerateDtype, Flag(metavar="auto|fp32|bf16|fp16|fp8|int8|nf4")] = Field(
        default="auto", description="Dtype of the transformers; auto: bf16 on a GPU, fp32 on a CPU. fp8 (faster on "
        "recent GPUs), int8 and nf4 (for little memory) quantise the blocks; the rest is computed as with auto."
    )
    text_dtype: Annotated[Literal["auto", "fp8", "int8"], Flag(metavar="auto|fp8|int8")] = Field(
        default="auto", description="Dtype of the text encoder; auto: as stored."
    )
    memory: Annotated[MemoryChoice, Flag(metavar=MEMORY_METAVAR)] = Field(
        default="auto", description="Keep both noise experts on the device, one at a time (one), or stream their "
        "blocks from host memory (stream); a number is a limit in GiB; auto: the fastest that fits."
    )
    compile: Annotated[Literal["auto", "on", "off"], Flag(metavar="auto|on|off")] = Field(
        default="auto", description="Run the blocks through torch.compile; auto: on a GPU, if the videos save more "
        "time than compiling takes."
    )
    strict: Strict = False
    common_modules: CommonModules = False


class VideoSettings(Settings):
    """One video; absent values are the model's defaults. These are also the keys of a line of a prompts file."""

    prompt: Annotated[str | None, Flag(metavar="TEXT")] = Field(default=None, description="What the video shows.")
    image: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="First frame, for an image-to-video model; scaled and cropped to the size."
    )
    last_image: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Last frame, together with --image."
    )
    video: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Start from the frames of this video instead of from pure noise; see --start-sigma."
    )
    start_sigma: Annotated[float | None, Flag(metavar="SIGMA")] = Field(
        default=None, gt=0, le=1, description="With --video: noise level to start from, 0 to 1; larger values change "
        "the video more. Default: 0.8."
    )
    negative_prompt: Annotated[str | None, Flag(metavar="TEXT")] = Field(
        default=None, description="What the video must not show; default: Wan's official one; '' for none."
    )
    instrument_hint: Annotated[str | None, Flag(metavar="NAME|MIX")] = Field(
        default=None, description="Expert of the mixture: hook, 电凝钩, or a mix such as hook:0.7,suction:0.3."
    )
    alpha_base: Annotated[float | None, Flag(metavar="NUMBER")] = Field(
        default=None, description="Strength of the base LoRA that the mixture was trained with; default: 1."
    )
    alpha_expert: Annotated[float | dict[str, float] | None, Flag(metavar="X|NAME=X,..")] = Field(
        default=None, description="Strength of the mixture's experts: 1.2, or hook=1.2,other=0.8; default: 1."
    )
    num_frames: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Frames, 4N+1; default: the model's."
    )
    size: Annotated[tuple[int, int] | None, Flag(metavar="HEIGHTxWIDTH")] = Field(
        default=None, description="Height x width in pixels; default: the model's, with the aspect ratio of --image."
    )
    steps: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, le=10_000, description="Sampling steps; default: the model's."
    )
    guidance: Annotated[float | dict[NoiseExpert, float] | None, Flag(metavar="G|high=G,low=G")] = Field(
        default=None, description="Scale of classifier-free guidance, 1 for none; one number, or one for each noise "
        "expert."
    )
    guidance_interval: Annotated[tuple[float, float] | None, Flag(metavar="LOW,HIGH")] = Field(
        default=None, description="Apply guidance only while sigma is in this interval, such as 0.2,0.95."
    )
    flow_shift: Annotated[float | None, Flag(metavar="S")] = Field(
        default=None, gt=0, description="Shift of the sigma schedule; larger values spend more steps at high noise. "
        "Default: the checkpoint's."
    )
    boundary: Annotated[float | None, Flag(metavar="SIGMA")] = Field(
        default=None, gt=0, lt=1, description="Sigma from which on the high noise expert is used, the low one below; "
        "default: the model's."
    )
    sampler: Annotated[Literal["unipc", "euler", "dpmpp"], Flag(metavar="unipc|euler|dpmpp")] = Field(
        default="unipc", description="Solver of the sampling steps."
    )
    sigmas: Annotated[tuple[float, ...] | None, Flag(metavar="S,S,...")] = Field(
        default=None, description="Custom noise levels, decreasing from at most 1, instead of --steps and --flow-shift."
    )
    first_block_cache: Annotated[float | dict[NoiseExpert, float] | None, Flag(metavar="E|high=E,low=E")] = Field(
        default=None, description="First-block cache (approximate): skip all blocks but the first in steps where the "
        "predicted relative error of the velocity is below E, such as 0.05."
    )
    seed: Annotated[int, Flag(metavar="N")] = Field(
        default=42, ge=0, lt=2**63, description="The same seed gives the same noise on every machine."
    )

    def moe_options(self) -> list[str]:
        """Names of the given options that act on a mixture only. A strength of 1 is the default, so not counted."""
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
            raise ValueError("must be two sigmas LOW,HIGH, such as 0.2,0.95")
        return tuple(parts)

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 1:
            raise ValueError("must be two sigmas LOW,HIGH with 0 <= LOW < HIGH <= 1")
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
            raise ValueError("must be decreasing numbers, at most 1 and above 0, such as 1,0.94,0.83,0.62")
        return value

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance(cls, value: Any) -> Any:
        return _by_noise_expert(value, "high=4,low=3")

    @field_validator("first_block_cache", mode="before")
    @classmethod
    def _first_block_cache(cls, value: Any) -> Any:
        return _by_noise_expert(value, "high=0.1,low=0.05")

    @field_validator("first_block_cache")
    @classmethod
    def _first_block_cache_is_an_error(cls, value: float | dict[NoiseExpert, float] | None) -> Any:
        for error in value.values() if isinstance(value, dict) else [value]:
            if error is not None and not 0 < error < 1:
                raise ValueError(f"{error:g} must be a relative error above 0 and below 1, such as 0.05")
        return value

    @field_validator("alpha_expert", mode="before")
    @classmethod
    def _alpha_expert(cls, value: Any) -> Any:
        return number_or_named(value, "hook=1.2,other=0.8")


class LineSettings(VideoSettings):
    """A line of a prompts file."""

    output: Path | None = Field(default=None, description="File name of this video inside the output folder.")

    @field_validator("output", mode="before")
    @classmethod
    def _inside(cls, value: Any) -> Any:
        if value is not None and not is_plain_name(str(value)):
            raise ValueError("must be a plain file name, without a folder; --output names the folder")
        return value


class GenerateSettings(VideoSettings, ModelSettings):
    """Settings of `lapwan generate`."""

    prompts: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Many videos from one load: JSON lines with a prompt and any options of a video."
    )
    from_video: Annotated[Path | None, Flag("--from", metavar="VIDEO")] = Field(
        default=None, description="Repeat a video made by lapwan, from the settings stored in it; other options "
        "override them."
    )
    interactive: Annotated[bool, Flag()] = Field(
        default=False, description="Ask for one prompt after the other; the model stays loaded."
    )
    videos: Annotated[int, Flag(metavar="N")] = Field(
        default=1, ge=1, le=1000, description="Videos per prompt, with seeds SEED, SEED+1, ..."
    )
    grid: Annotated[tuple[str, ...], Flag(metavar="OPTION=A,B,...")] = Field(
        default=(), description="Compare values of an option at the same noise, such as alpha_expert=0,0.5,1, "
        "moe=none;A;B, or lora.high=0,0.5,1 for the strength of the LoRAs on a noise expert (lora.high, lora.low, "
        "lora.both); repeatable. Also writes all videos side by side, and a contact sheet."
    )
    output: Annotated[Path | None, Flag("-o", "--output", metavar="PATH")] = Field(
        default=None, description="NAME.mp4, .gif, .webp, .png (one frame), .safetensors (latents), or a folder of PNG "
        "frames; for several videos their folder."
    )
    crf: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=0, le=51, description="Quality of an .mp4, 0 (best) to 51; default: 18."
    )
    preview: Annotated[bool, Flag()] = Field(
        default=False, description="Write the current estimate to a PNG beside the output after every step."
    )
    sheet: Annotated[bool, Flag()] = Field(
        default=False, description="Also write a contact sheet beside the output."
    )
