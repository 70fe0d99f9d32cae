"""Settings of `lapwan srpo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.aliases import current_keys, spell_out
from lapwan.settings.base import Flag, Settings, height_width
from lapwan.settings.cache import NEGATIVE_PROMPT
from lapwan.settings.memory import TrainDtype, precision_of
from lapwan.settings.model import BaseModelSettings
from lapwan.settings.optimizers import AdamWSettings, OptimizerSettings, ScheduleSettings
from lapwan.settings.rewards import REWARD_METAVAR, Rewards
from lapwan.settings.targets import TargetSettings

LR = {"lora": 1e-4, "full": 5e-6}
_EXPERTS = {
    "transformer": ("high",), "transformer_2": ("low",), "high": ("high",), "low": ("low",), "both": ("high", "low"),
}


class PromptSettings(Settings):
    """Captions to train on: a file of them, or the clips of a cache."""

    file: Annotated[Path | None, Flag("--prompts", metavar="FILE")] = Field(
        None, description="captions.json, prompts.yaml, clips.jsonl, or text with a prompt a line.")
    cache: Annotated[Path | None, Flag("--cache", metavar="DIR")] = Field(
        None, description="Instead: a folder that `lapwan cache` wrote; its captions, and for offline its latents.")
    split: str | None = Field("train", description="Of a cache: train on clips of this split and those without one.")
    negative: str = Field(NEGATIVE_PROMPT, description="Negative prompt of rollouts with guidance above 1.")
    features: Path | None = Field(
        None, description="File that keeps the prompts' text features between runs; absent: one in the run folder.")

    @model_validator(mode="after")
    def _one(self) -> PromptSettings:
        if (self.file is None) == (self.cache is None):
            raise ValueError("give exactly one of prompts.file (--prompts FILE) and prompts.cache (--cache DIR)")
        if self.cache is not None:
            for name, unset in (("features", None), ("negative", NEGATIVE_PROMPT)):
                if getattr(self, name) != unset:
                    raise ValueError(f"prompts.{name} is for prompts.file; a cache holds its own text features, of its "
                                     f"own negative prompt too: leave prompts.{name} out")
        return self


class RolloutSettings(Settings):
    """How the clean latents come about: sampled through the noise experts by sigma, or read."""

    offline: Annotated[bool, Flag("--offline")] = Field(
        False, description="No rollout: the clean latents are those of the cache's images or clips.")
    steps: int = Field(25, ge=1, description="Euler steps.")
    guidance: float = Field(1.0, ge=1, description="Classifier-free guidance; 1: none, half the work.")
    flow_shift: float | None = Field(None, gt=0, description="Absent: the model's own.")


class PreferenceSettings(Settings):
    """What the reward compares: the picture with "positive word. caption" against "negative word. caption"."""

    positive: tuple[str, ...] = Field(
        ("Natural-lighting", "Detail", "Detailed", "Real"), min_length=1,
        description="Control words; each sample draws one. Only the reward reads them.")
    negative: tuple[str, ...] = Field(("Concept art", "Painting", "Anime", "Flat", "Oil"), min_length=1)
    branches: Literal["both", "denoise", "inversion"] = Field(
        "both", description="Evaluate above the target sigma (denoise), below it (inversion), or half of each.")
    discount_denoise: tuple[float, float] = Field(
        (0.1, 0.25), description="Discount at the interval's low and high end; negative ones are allowed.")
    discount_inversion: tuple[float, float] = (0.3, 0.01)
    margin: float = Field(0.7, gt=0, description="m of the hinge relu(m - R), on cosines.")
    frames: Literal["all", "first"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="Frames of a video that are judged, their reward averaged: all, first, or k evenly spread.")


class HeldOutSettings(Settings):
    """Prompts that are not trained on, sampled again and again from the same noise."""

    count: int = Field(16, ge=0, description="Prompts split off by seed; 0: none, and nothing below applies.")
    seed: int | None = Field(None, description="Chooses them and their noise; absent: the run's.")
    every: int = Field(10, ge=1, description="Steps of the run between two looks.")
    images: int = Field(8, ge=0, description="Of them, so many are written to previews/ and TensorBoard.")
    size: tuple[int, int] | None = Field(None, description="Height, width; absent: as trained.")
    num_frames: int | None = Field(None, ge=1, description="4N+1; absent: as trained.")
    steps: int | None = Field(None, ge=1, description="Euler steps; absent: the rollout's.")
    guidance: float | None = Field(None, ge=1, description="Absent: the rollout's.")
    patience: int | None = Field(
        None, ge=1, description="End the run when the margin has not risen for so many looks; absent: never.")

    _size = field_validator("size", mode="before")(height_width)


class SrpoSettings(Settings):
    """Preference alignment: one noise expert (or both), pushed towards what a reward model prefers."""

    model: Annotated[str | BaseModelSettings, Flag("--model", metavar="MODEL")] = Field(
        "tiny", description="tiny, or a folder in diffusers layout; in TOML also {model, lora, multiplier}.")
    output: Annotated[Path, Flag("--output", "-o", metavar="DIR")] = Field(description="Run folder.")
    resume: Annotated[bool, Flag("--resume")] = Field(
        False, description="Go on from the newest checkpoint of the run folder, if it has one.")
    name: Annotated[str, Flag("--name")] = Field("lapwan", pattern=r"^[\w.-]+$", description="Stem of the LoRA files.")
    noise_experts: Annotated[tuple[NoiseExpert, ...] | None, Flag("--noise-experts")] = Field(
        None, min_length=1, description="Trained noise experts: low (transformer_2), high (transformer) or both, by "
        "sigma; absent: low, or the only one.")
    train: Annotated[Literal["lora", "full"], Flag("--train")] = Field(
        "lora", description="A LoRA, or every weight (full: writes a transformer folder).")
    prompts: PromptSettings
    rewards: Annotated[Rewards, Flag("--reward", metavar=REWARD_METAVAR)] = Field(
        description="What judges the pictures: hps=FILE, clip=FOLDER, pickscore=FOLDER or tiny; repeatable.")
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    sigma: Annotated[tuple[float, float], Flag(metavar="LOW,HIGH")] = Field(
        (0.7, 0.95), description="Bounds of the noise levels trained, cut to the trained noise expert's band.")
    reach: float = Field(0.0215, gt=0, lt=1, description="Largest distance of evaluation and target sigma.")
    size: Annotated[tuple[int, int] | None, Flag(metavar="HEIGHTxWIDTH")] = Field(
        None, description="Height x width in pixels, multiples of 16; by default the model's.")
    num_frames: Annotated[int, Flag()] = Field(1, ge=1, description="1: an image; 4N+1: a video.")
    steps: Annotated[int, Flag("--steps")] = Field(20, ge=1, description="Optimiser steps of the run.")
    batch_size: Annotated[int, Flag("--batch-size")] = Field(1, ge=1, description="Prompts at a time.")
    accumulate: int = Field(32, ge=1, description="Batches an optimizer step; 32 samples a step are advised.")
    turn: int = Field(1, ge=1, description="With both noise experts: steps one takes before the other's turn.")
    targets: TargetSettings = Field(default_factory=lambda: TargetSettings(
        last_blocks="all", ffn_last_blocks="all", q=16, k=16, v=16, o=16, ffn_in=16, ffn_out=16))
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; absent: each module's rank, a scale of 1.")
    optimizer: OptimizerSettings = Field(default_factory=lambda: AdamWSettings(lr=LR["lora"], weight_decay=1e-4))
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    max_grad_norm: float = Field(0.1, gt=0)
    kl_weight: float = Field(
        0.0, ge=0, description="Weight of the squared distance of the velocity from the base's; LoRA only.")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Running mean of what is trained, which is then what is saved; absent: none.")
    master_weights: Annotated[Literal["fp32", "bf16"], Flag()] = Field(
        "fp32", description="What the optimizer updates: an fp32 copy, or bf16 itself with stochastic rounding.")
    optimizer_on_cpu: Annotated[bool, Flag()] = Field(
        False, description="Keep the optimizer's states (and an fp32 copy) in host memory; adamw only.")
    memory: Literal["auto", "both", "one"] = Field(
        "auto", description="Noise experts on the device: both, or one with the idle one parked in host memory.")
    activation_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Recompute the transformer's activations in the backward pass; auto: where needed.")
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    held_out: HeldOutSettings = Field(default_factory=HeldOutSettings)
    seed: Annotated[int, Flag("--seed")] = Field(42, description="Order, noise, sigma, words and initial weights.")
    save_every: Annotated[int, Flag("--save-every")] = Field(10, ge=1, description="Steps between checkpoints.")
    keep_last: int | None = Field(None, ge=1, description="Newest checkpoints to keep; absent: all.")
    keep_best: int | None = Field(
        None, ge=1, description="Checkpoints of the highest held-out margin to keep besides the newest.")
    allow_changed: Annotated[bool, Flag("--allow-changed")] = Field(
        False, description="With --resume: go on although settings, prompts or base have changed.")
    sigma_bins: int = Field(4, ge=1, description="Parts of the trained interval whose figures are logged apart.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    device: Annotated[str, Flag("--device")] = Field("auto", description="auto, cpu, cuda or cuda:N.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="Blocks through torch.compile; auto: on a GPU, for runs that save more than it takes.")
    dtype: Annotated[TrainDtype, Flag("--dtype", metavar="auto|fp32|bf16|fp8|int8|nf4")] = Field(
        "auto", description="Of the transformers; auto: bf16 on a GPU. fp8, int8 and nf4 quantise a LoRA's base.")

    @model_validator(mode="before")
    @classmethod
    def _lr_by_kind(cls, value: Any) -> Any:
        """Without an optimizer of the user's: the lr that suits a LoRA or all weights."""
        if isinstance(value, dict):
            value = spell_out(current_keys(value))
            own = value.get("optimizer") or {}
            if isinstance(own, dict) and own.get("type", "adamw") == "adamw":
                lr = LR.get(str(value.get("train", "lora")), LR["lora"])
                value = {**value, "optimizer": {"lr": lr, "weight_decay": 1e-4, **own}}
        return value

    @field_validator("noise_experts", mode="before")
    @classmethod
    def _noise_experts(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list | tuple):
            names = [name.value if isinstance(name, NoiseExpert) else str(name).strip() for name in names]
            if unknown := [name for name in names if name not in _EXPERTS]:
                raise ValueError(f"'{unknown[0]}' is no noise expert; give low (transformer_2), high (transformer) or "
                                 "both")
            return tuple(dict.fromkeys(one for name in names for one in _EXPERTS[name]))
        return value

    _size = field_validator("size", mode="before")(height_width)

    @field_validator("sigma", mode="before")
    @classmethod
    def _bounds(cls, value: Any) -> Any:
        if isinstance(value, str):
            parts = value.replace(",", " ").split()
            if len(parts) != 2:
                raise ValueError("must be two bounds, low first, such as 0.7,0.95")
            return tuple(parts)
        return value

    @model_validator(mode="after")
    def _check(self) -> SrpoSettings:
        low, high = self.sigma
        if not 0 <= low < high < 1:
            raise ValueError(f"sigma = [{low:g}, {high:g}]: the bounds must satisfy 0 <= low < high < 1")
        if self.rollout.offline and self.prompts.cache is None:
            raise ValueError("rollout.offline reads clean latents from a cache: set prompts.cache (--cache DIR)")
        if self.train == "full" and self.kl_weight:
            raise ValueError(f"kl_weight = {self.kl_weight:g} needs the base beside what is trained, which a full "
                             "fine-tune overwrites; set kl_weight = 0 (the held-out looks log the distance), or train "
                             "= \"lora\"")
        for name, wanted in (("master_weights = \"bf16\"", self.master_weights == "bf16"),
                             ("optimizer_on_cpu = true", self.optimizer_on_cpu)):
            if wanted and self.optimizer.type != "adamw":
                raise ValueError(f"{name} is made for optimizer.type = 'adamw', not '{self.optimizer.type}'")
        if self.train == "full" and precision_of(self.dtype) is not None:
            raise ValueError(f"dtype = '{self.dtype}' is for a base that stays frozen, but train = \"full\" trains it; "
                             "set dtype = \"bf16\", or train = \"lora\"")
        if self.train == "full" and self.optimizer.type != "adamw":
            raise ValueError(f"a full fine-tune takes optimizer.type = 'adamw', not '{self.optimizer.type}'")
        frames = self.preference.frames
        if isinstance(frames, int) and frames > self.num_frames:
            raise ValueError(f"preference.frames = {frames}, but num_frames = {self.num_frames} has no more than "
                             f"{self.num_frames} to judge; set it to at most that, or to \"all\" or \"first\"")
        if self.held_out.patience is not None and not self.held_out.count:
            raise ValueError("held_out.patience needs held-out prompts: set held_out.count above 0")
        if self.keep_best is not None and (not self.held_out.count or self.save_every % self.held_out.every):
            raise ValueError(f"keep_best needs a held-out look at every checkpoint: save_every = {self.save_every} "
                             f"must be a multiple of held_out.every = {self.held_out.every}")
        return self

    @property
    def held_out_seed(self) -> int:
        """What the held-out prompts and their noise are chosen by."""
        return self.seed if self.held_out.seed is None else self.held_out.seed
