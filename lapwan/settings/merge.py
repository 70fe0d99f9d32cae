"""Settings of `lapwan merge`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.settings.base import Flag
from lapwan.settings.lora_argument import LORA_METAVAR, AdapterRule, CommonModules, LoraArgument, Strict

LoraLayout = Literal["comfy", "musubi", "diffusers"]
LoraDtype = Literal["float32", "float16", "bfloat16"]


class MergeSettings(AdapterRule):
    """Merge LoRAs into a model folder, into one transformer, or into one LoRA; extract a LoRA from two models.

    How to add a kind of merge: its source field here, its checks in `_check_source`, a branch in
    `lapwan.models.merge.merge` or `lapwan.commands.merge`.
    """

    model: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        default=None, description="Merge into this model (a folder, or tiny) and write a model folder. With "
                                  "--extract: the fine-tuned model.")
    dit: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Merge into this single transformer: a .safetensors file, or a folder of shards.")
    lora: Annotated[tuple[LoraArgument, ...], Flag(metavar=LORA_METAVAR)] = Field(
        default=(), description="A LoRA to merge, repeatable: FILE:0.8, or high=FILE, low=FILE, both=FILE; "
                                "FILE:0.8@blocks.20-39@ffn only its modules in these parts; a negative strength "
                                "subtracts. Without --model and --dit the LoRAs become one LoRA.")
    moe: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="A mixture to convert to plain LoRAs at the mix given by --mix.")
    mix: Annotated[str | None, Flag(metavar="NAME=W,...")] = Field(
        default=None, description="With --moe: the experts' shares, such as hook=0.7,suction=0.3.")
    sigma: Annotated[float | None, Flag(metavar="SIGMA")] = Field(
        default=None, ge=0, le=1, description="With --moe: use the timestep gates at this sigma instead of their mean "
                                              "over the model's default sampling steps.")
    extract: Annotated[bool, Flag()] = Field(
        default=False, description="Write the difference of --model and --base as a LoRA. Each is a model folder, a "
                                   "transformer's folder or file, or an srpo run.")
    base: Annotated[str | None, Flag(metavar="MODEL")] = Field(
        default=None, description="With --extract: the model that the fine-tune started from.")
    energy: Annotated[float | None, Flag(metavar="SHARE")] = Field(
        default=None, gt=0, lt=1, description="With --extract: the smallest rank of each module that keeps this share "
                                              "of its energy (squared norm) above the rounding of the two dtypes, such "
                                              "as 0.95; at most --rank, or 256.")
    keep_rest: Annotated[bool, Flag()] = Field(
        default=True, description="With --extract: keep changed biases, norms and modulations as full deltas (comfy "
                                  "layout only; other layouts leave them out).")
    plot: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="With --extract: also draw the energy kept by rank into this PNG.")
    device: Annotated[str, Flag(metavar="DEVICE")] = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="With --extract: auto, cpu, cuda or cuda:N; other merges run on the CPU.")
    average: Annotated[Path | None, Flag(metavar="RUN")] = Field(
        default=None, description="Average this run's checkpoints (step_N folders): its LoRAs into one, or "
                                  "after a full fine-tune its transformers into a folder.")
    last: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="With --average: the last N checkpoints; default: all.")
    checkpoints: Annotated[tuple[int, ...] | None, Flag(metavar="N,N,...")] = Field(
        default=None, description="With --average: the checkpoints of these steps, such as 100,200,300.")
    ema_decay: Annotated[float | None, Flag(metavar="D")] = Field(
        default=None, gt=0, lt=1, description="With --average: weights of an exponential moving average with this "
                                              "decay a step, such as 0.99; default: equal weights.")
    multiplier: Annotated[float, Flag()] = Field(default=1.0, description="Multiplies every LoRA's strength.")
    output: Annotated[Path, Flag("-o", "--output", metavar="OUT")] = Field(
        description="The model folder or .safetensors file to write.")
    rank: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Write low-rank pairs of at most this rank, by SVD: a LoRA resized, and LoKr, "
                                   "LoHa and full deltas as a LoRA. With --extract: rank of the LoRA, by default 64. "
                                   "With --average: by default that of the checkpoints.")
    format: Annotated[LoraLayout | None, Flag(metavar="comfy|musubi|diffusers")] = Field(
        default=None, description="Key layout of the resulting LoRA; default: comfy.")
    dtype: Annotated[LoraDtype | None, Flag(metavar="float32|float16|bfloat16")] = Field(
        default=None, description="Dtype of the resulting LoRA; default: that of the inputs. Of a quantised "
                                  "model (fp8, GGUF): dequantise to it, then merge.")
    fold_alpha: Annotated[bool, Flag()] = Field(
        default=False, description="Multiply the scale into B, so that alpha is the rank, for tools that ignore alpha.")
    one_file: Annotated[bool, Flag()] = Field(
        default=False, description="Write the LoRAs of both noise experts into one file (ai-toolkit's form of the "
                                   "comfy layout) instead of two; ComfyUI, musubi and diffusers read two.")
    link: Annotated[bool, Flag()] = Field(
        default=True, description="Hard-link large unchanged files instead of copying them.")
    verify: Annotated[bool, Flag()] = Field(
        default=False, description="Read a merged model back and compare it with the sum computed in fp64.")

    strict: Strict = False
    common_modules: CommonModules = False

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return re.split(r"[,，]", value) if isinstance(value, str) else value

    def _check_alone(self, flag: str, does: str, *others: str) -> None:
        """Refuse sources beside the one that `flag` names."""
        for name in others:
            if getattr(self, name):
                raise ValueError(f"{flag} {does}: leave out --{name.replace('_', '-')}")

    def _check_source(self) -> None:
        if self.extract:
            self._check_alone("--extract", "writes the difference of two models", "dit", "lora", "moe", "average")
            if self.model is None or self.base is None:
                raise ValueError("--extract needs two models: --model TUNED --base BASE")
        elif self.average is not None:
            self._check_alone("--average", "reads the LoRAs of one run", "model", "dit", "lora", "moe")
            if self.last is not None and self.checkpoints is not None:
                raise ValueError("give --last or --checkpoints, not both")
        elif self.moe is not None:
            if self.model is not None or self.dit is not None or self.lora:
                raise ValueError("--moe only converts a mixture to LoRA files; merge those in a second step")
            if self.mix is None:
                raise ValueError("--moe needs the shares of its experts: --mix hook=0.7,suction=0.3")
        elif self.mix is not None or self.sigma is not None:
            raise ValueError("--mix and --sigma are for a mixture; give one with --moe FILE")
        elif not self.lora:
            raise ValueError("nothing to merge: give at least one --lora FILE, or --moe FILE")

    def _check_options(self) -> None:
        """Refuse an option of another kind of merge."""
        for source, given, names in (("--extract", self.extract, ("base", "energy", "plot")),
                                     ("--average", self.average is not None, ("last", "checkpoints", "ema_decay"))):
            for name in names:
                if not given and getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} applies only with {source}")
        if self.extract and self.multiplier != 1:
            raise ValueError("--extract writes the whole difference; give the LoRA's strength where it is used")

    @model_validator(mode="after")
    def _form(self) -> MergeSettings:
        if self.model is not None and self.dit is not None:
            raise ValueError("give --model (a whole model) or --dit (one transformer), not both")
        self._check_source()
        self._check_options()
        into_weights = not self.extract and (self.model is not None or self.dit is not None)
        for name in ("rank", "format", "fold_alpha", "one_file"):
            if into_weights and getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} applies only if the result is a LoRA; a merged model keeps its "
                                 "layout and dtype")
        if self.one_file and self.format not in (None, "comfy"):
            raise ValueError(f"one_file is written in comfy layout; {self.format} has no such form: leave out --format "
                             "or --one-file")
        if not into_weights and self.verify:
            raise ValueError("--verify applies only to merging into a model: add --model or --dit")
        if not into_weights and self.average is None and self.output.suffix != ".safetensors":
            raise ValueError(f"output {self.output}: a LoRA is written as a .safetensors file (to merge into a "
                             "model, add --model or --dit)")
        return self
