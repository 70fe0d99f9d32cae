"""Settings of `lapwan merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Flag, Settings
from lapwan.settings.lora_argument import LORA_METAVAR, LoraArgument

LoraLayout = Literal["comfy", "musubi", "diffusers"]
LoraDtype = Literal["float32", "float16", "bfloat16"]


class MergeSettings(Settings):
    """Merge LoRAs into a model folder, into one transformer, or into one LoRA.

    How to add a kind of merge: its source field here, its checks in `_form`, a branch in `lapwan.models.merge.merge`.
    """

    model: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        default=None, description="Merge into this model (a folder, or tiny) and write a model folder.")
    dit: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Merge into this single transformer: a .safetensors file, or a folder of shards.")
    lora: Annotated[tuple[LoraArgument, ...], Flag(metavar=LORA_METAVAR)] = Field(
        default=(), description="A LoRA to merge, repeatable: FILE:0.8, or high=FILE, low=FILE, both=FILE. "
                                "Without --model and --dit the LoRAs become one LoRA.")
    moe: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="A mixture to convert to plain LoRAs at the mix given by --mix.")
    mix: Annotated[str | None, Flag(metavar="NAME=W,...")] = Field(
        default=None, description="With --moe: the experts' shares, such as hook=0.7,suction=0.3.")
    sigma: Annotated[float | None, Flag(metavar="SIGMA")] = Field(
        default=None, ge=0, le=1, description="With --moe: use the timestep gates at this sigma instead of their mean "
                                              "over the model's default sampling steps.")
    multiplier: Annotated[float, Flag()] = Field(default=1.0, description="Multiplies every LoRA's strength.")
    output: Annotated[Path, Flag("-o", "--output", metavar="OUT")] = Field(
        description="The model folder or .safetensors file to write.")
    rank: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Write low-rank pairs of at most this rank, by SVD: a LoRA resized, and LoKr, "
                                        "LoHa and full deltas of weights as a LoRA.")
    format: Annotated[LoraLayout | None, Flag(metavar="comfy|musubi|diffusers")] = Field(
        default=None, description="Key layout of the resulting LoRA; default: comfy.")
    dtype: Annotated[LoraDtype | None, Flag(metavar="float32|float16|bfloat16")] = Field(
        default=None, description="Dtype of the resulting LoRA; default: that of the inputs.")
    fold_alpha: Annotated[bool, Flag()] = Field(
        default=False, description="Multiply the scale into B, so that alpha is the rank, for tools that ignore alpha.")
    one_file: Annotated[bool, Flag()] = Field(
        default=False, description="Write the LoRAs of both noise experts into one file (ai-toolkit's form of the "
                                   "comfy layout) instead of two; ComfyUI, musubi and diffusers read two.")
    link: Annotated[bool, Flag()] = Field(
        default=True, description="Hard-link large unchanged files instead of copying them.")
    verify: Annotated[bool, Flag()] = Field(
        default=False, description="Read a merged model back and compare it with the sum computed in fp64.")

    def _check_mixture(self) -> None:
        if self.model is not None or self.dit is not None or self.lora:
            raise ValueError("--moe only converts a mixture to LoRA files; merge those in a second step")
        if self.mix is None:
            raise ValueError("--moe needs the shares of its experts: --mix hook=0.7,suction=0.3")

    @model_validator(mode="after")
    def _form(self) -> MergeSettings:
        if self.model is not None and self.dit is not None:
            raise ValueError("give --model (a whole model) or --dit (one transformer), not both")
        if self.moe is not None:
            self._check_mixture()
        elif self.mix is not None or self.sigma is not None:
            raise ValueError("--mix and --sigma are for a mixture; give one with --moe FILE")
        elif not self.lora:
            raise ValueError("nothing to merge: give at least one --lora FILE, or --moe FILE")
        into_weights = self.model is not None or self.dit is not None
        for name in ("rank", "format", "dtype", "fold_alpha", "one_file"):
            if into_weights and getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} applies only if the result is a LoRA; a merged model keeps its "
                                 "layout and dtype")
        if self.one_file and self.format not in (None, "comfy"):
            raise ValueError(f"one_file is written in comfy layout; {self.format} has no such form: leave out --format "
                             "or --one-file")
        if not into_weights and self.verify:
            raise ValueError("--verify applies only to merging into a model: add --model or --dit")
        if not into_weights and self.output.suffix != ".safetensors":
            raise ValueError(f"output {self.output}: a LoRA is written as a .safetensors file (to merge into a "
                             "model, add --model or --dit)")
        return self
