"""What every training command's settings share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Flag, Settings


class BaseModelSettings(Settings):
    """A base with stage 1 merged into it in memory."""

    model: str = Field(description="MODEL as everywhere: tiny, or a folder.")
    lora: dict[NoiseExpert, Path] = Field(description="LoRA file by noise expert.")
    multiplier: float = Field(1.0, description="Strength at which they are merged.")


class DataSettings(Settings):
    """What to train on."""

    cache: Annotated[Path, Flag("--cache", metavar="DIR")] = Field(description="Folder that `lapwan cache` wrote.")
    labels: Annotated[Path | None, Flag("--labels", metavar="FILE")] = Field(
        None, description="labels.jsonl for caches that carry no labels.")
    split: str | None = Field("train", description="Train on clips of this split and on those without one.")


class AdamWSettings(Settings):
    """AdamW. Source: Loshchilov & Hutter (arXiv 1711.05101)."""

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Flag("--lr")] = Field(1e-4, gt=0, description="Learning rate.")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class ScheduleSettings(Settings):
    """The lr over the steps of each noise expert; names are diffusers'."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = Field(0, ge=0)


class SigmaSettings(Settings):
    """How sigma is drawn: a distribution over [0, 1], truncated to the noise expert's band."""

    sampler: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = Field(0.0, description="Of the logit, for logit_normal.")
    std: float = Field(1.0, gt=0, description="Of the logit, for logit_normal.")
    shift: float = Field(1.0, gt=0, description="s of s·σ/(1+(s−1)·σ), applied to the draw; 1: none.")


class TargetSettings(Settings):
    """The users' recipe: ranks for the last blocks' attention, and for the FFN of fewer blocks; rank 0 leaves out."""

    last_blocks: int | None = Field(8, ge=1, description="Attention of the last n blocks; \"all\" for every block.")
    attention: tuple[Literal["self_attn", "cross_attn"], ...] = ("self_attn", "cross_attn")
    q: int = Field(8, ge=0, description="Rank of the query projections.")
    k: int = Field(4, ge=0)
    v: int = Field(4, ge=0)
    o: int = Field(4, ge=0)
    ffn_last_blocks: int | None = Field(3, ge=1, description="FFN of the last n blocks; \"all\" for every block.")
    ffn_in: int = Field(4, ge=0, description="Rank of the first FFN linear.")
    ffn_out: int = Field(0, ge=0, description="Rank of the second FFN linear.")

    @model_validator(mode="before")
    @classmethod
    def _all_blocks(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: None if k in ("last_blocks", "ffn_last_blocks") and v == "all" else v for k, v in value.items()}
        return value


class ExpertSettings(Settings):
    """What may differ between the noise experts."""

    steps: int
    targets: TargetSettings
    alpha: float | None
    optimiser: AdamWSettings
    schedule: ScheduleSettings
    sigma: SigmaSettings


_SHARED = tuple(ExpertSettings.model_fields)


class TrainSettings(Settings):
    """Shared by train-lora and train-moe."""

    model: Annotated[str | BaseModelSettings, Flag("--model", metavar="MODEL")] = Field(
        "tiny", description="tiny, or a folder in diffusers layout; in TOML also {model, lora, multiplier}.")
    output: Annotated[Path, Flag("--output", "-o", metavar="DIR")] = Field(description="Run folder.")
    resume: Annotated[bool, Flag("--resume")] = Field(
        False, description="Go on from the newest checkpoint of the run folder, if it has one.")
    name: Annotated[str, Flag("--name")] = Field(
        "lapwan", pattern=r"^[\w.-]+$", description="Stem of the adapter files.")
    experts: tuple[NoiseExpert, ...] = Field(
        (NoiseExpert.HIGH, NoiseExpert.LOW), min_length=1, description="The noise experts to train.")
    data: DataSettings
    steps: Annotated[int | None, Flag("--steps")] = Field(
        None, ge=1, description="Optimiser steps of each noise expert; give this or epochs.")
    epochs: Annotated[float | None, Flag("--epochs")] = Field(
        None, gt=0, description="Instead of steps: passes of each noise expert over the clips.")
    batch_size: Annotated[int, Flag("--batch-size")] = Field(1, ge=1, description="Clips at a time.")
    accumulate: int = Field(1, ge=1, description="Batches an optimiser step.")
    turn: int = Field(10, ge=1, description="Steps one noise expert takes before the other's turn.")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; absent: each module's rank, a scale of 1.")
    targets: TargetSettings = TargetSettings()
    optimiser: AdamWSettings = AdamWSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    sigma: SigmaSettings = SigmaSettings()
    high: dict[str, Any] = Field({}, description="What differs for the high-noise expert.")
    low: dict[str, Any] = Field({}, description="What differs for the low-noise expert.")
    roi_weight: float = Field(0.0, ge=0, description="Weight of the loss over the clips' regions; 0: off.")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="Probability of training on the empty caption.")
    max_grad_norm: float = Field(1.0, gt=0)
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    seed: Annotated[int, Flag("--seed")] = Field(42, description="Order, noise, sigma and initial weights.")
    save_every: Annotated[int, Flag("--save-every")] = Field(100, ge=1, description="Steps between checkpoints.")
    keep_last: int | None = Field(None, ge=1, description="Checkpoints to keep; absent: all.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    device: Annotated[str, Flag("--device")] = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="Of the frozen base; auto: bf16 on a GPU.")

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if len(set(self.experts)) != len(self.experts):
            raise ValueError(f"experts = {[e.value for e in self.experts]}: each noise expert at most once")
        for expert in NoiseExpert:
            if self._override(expert) and expert not in self.experts:
                raise ValueError(f"[{expert.value}] is set, but experts does not hold '{expert.value}'")
            self.of(expert, 1)
        return self

    def _override(self, expert: NoiseExpert) -> dict[str, Any]:
        return self.high if expert is NoiseExpert.HIGH else self.low

    def of(self, expert: NoiseExpert, steps: int) -> ExpertSettings:
        """A noise expert's own settings: the shared ones with `[high]` or `[low]` laid over them.

        Args:
            steps: used where neither says a number of steps (epochs were given).
        """
        shared = {key: getattr(self, key) for key in _SHARED}
        plain = {k: v.model_dump() if isinstance(v, Settings) else v for k, v in shared.items()}
        plain["steps"] = self.steps or steps
        try:
            return ExpertSettings.model_validate(_overlay(plain, self._override(expert)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([expert.value, *map(str, first["loc"])])
            if first["type"] == "extra_forbidden":
                raise ValueError(f"unknown key '{key}'; [{expert.value}] takes {', '.join(_SHARED)}") from None
            raise ValueError(f"{key} = {first['input']!r}: {first['msg']}") from None


def _overlay(tree: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged
