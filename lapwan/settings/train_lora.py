"""Settings of `lapwan train-lora`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.train import TrainSettings


class TrainLoraSettings(TrainSettings):
    """Stage 1: one LoRA for each noise expert, from one run."""

    init_lora: dict[NoiseExpert, Path] = Field(
        {}, description="LoRA to continue from, by noise expert; modules, ranks and alpha are then those of the file.")
    one_file: bool = Field(
        False, description="Save the LoRAs of both noise experts as one file {name}.safetensors (ai-toolkit's form) "
        "instead of two; ComfyUI, musubi and diffusers read two.")

    def keys_of_two(self) -> list[str]:
        return [*super().keys_of_two(), *["one_file"] * self.one_file]

    @model_validator(mode="after")
    def _both(self) -> TrainLoraSettings:
        if self.one_file and len(self.noise_experts) < 2:
            raise ValueError(
                f"one_file is for both noise experts, but noise_experts is only '{self.noise_experts[0].value}'")
        return self

    @model_validator(mode="after")
    def _continued(self) -> TrainLoraSettings:
        if self.preview.hints:
            raise ValueError("preview.hints chooses among a mixture's experts, and a plain LoRA has none; leave it out")
        for noise_expert in self.init_lora:
            side = noise_expert.value
            if noise_expert not in self.noise_experts:
                raise ValueError(f"init_lora.{side} is given, but noise_experts does not include '{side}'")
            if self.of(noise_expert, 1).alpha_schedule.phases:
                raise ValueError(f"init_lora.{side} has its own alpha, which alpha_schedule would override; leave "
                                 "one of them out")
        return self
