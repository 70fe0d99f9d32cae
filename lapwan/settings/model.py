"""The model setting: a name or folder, a base with LoRAs merged into it, or separate files of an original release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Settings
from lapwan.settings.lora_argument import AdapterRule, CommonModules, Strict


class BaseModelSettings(AdapterRule):
    """A base with LoRAs merged into it in memory, such as those of stage 1."""

    model: str = Field(description="The base: tiny, or a folder.")
    lora: dict[NoiseExpert, Path] = Field(description="LoRA file by noise expert.")
    multiplier: float = Field(1.0, description="Strength at which the LoRAs are merged.")
    strict: Strict = False
    common_modules: CommonModules = False


class ModelFilesSettings(Settings):
    """`[model]` in TOML: either `high` and `low`, or one `transformer` (Wan2.1 T2V, TI2V-5B)."""

    high: Path | None = Field(default=None, description="High-noise transformer: a file, or a folder of shards.")
    low: Path | None = Field(default=None, description="Low-noise transformer.")
    transformer: Path | None = Field(default=None, description="The only transformer of a model without a boundary.")
    vae: Path = Field(description="Wan2.1_VAE.pth (TI2V-5B: Wan2.2_VAE.pth) or .safetensors.")
    text_encoder: Path = Field(description="models_t5_umt5-xxl-enc-bf16.pth or .safetensors.")
    tokenizer: Path = Field(description="Folder of umT5's tokenizer (google/umt5-xxl).")
    boundary: float | None = Field(
        default=None, gt=0, lt=1, description="Sigma between the noise experts; default: Wan2.2's.")
    flow_shift: float | None = Field(default=None, gt=0, description="Shift of the sigma schedule; default: Wan's.")

    @property
    def transformers(self) -> dict[NoiseExpert, Path]:
        """The transformer's file or folder by noise expert; a single one is the high noise expert."""
        if self.transformer is not None:
            return {NoiseExpert.HIGH: self.transformer}
        paths: dict[NoiseExpert, Path | None] = {e: getattr(self, e.value) for e in NoiseExpert}
        return {noise_expert: path for noise_expert, path in paths.items() if path is not None}

    @model_validator(mode="after")
    def _transformers(self) -> ModelFilesSettings:
        pair = self.high is not None, self.low is not None
        if self.transformer is not None and any(pair):
            raise ValueError("give high and low, or transformer, not both")
        if self.transformer is None and not all(pair):
            missing = "high and low" if not any(pair) else "low" if pair[0] else "high"
            raise ValueError(f"{missing} is missing: Wan2.2 A14B has two noise experts; a model with one transformer "
                             "is given as transformer = FILE")
        return self


def _kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return "files" if "model" not in value and value.keys() & ModelFilesSettings.model_fields.keys() else "base"
    kinds = {str: "name", BaseModelSettings: "base", ModelFilesSettings: "files"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), None)


# A name or folder; in TOML also a base with LoRAs merged in memory, or separate files. The discriminator picks the form
# first, so that a mistake is reported for that form only.
ModelChoice = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[BaseModelSettings, Tag("base")]
    | Annotated[ModelFilesSettings, Tag("files")],
    Discriminator(_kind, custom_error_type="model_form",
                  custom_error_message="must be a text or a table of keys and values"),
]
