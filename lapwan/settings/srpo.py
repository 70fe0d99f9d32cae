"""Settings of `lapwan srpo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lapwan.names import NEGATIVE_PROMPT, NoiseExpert
from lapwan.settings.aliases import current_keys, expand_short_forms
from lapwan.settings.base import Flag, Settings, height_width
from lapwan.settings.memory import TrainDtype, precision_of
from lapwan.settings.optimizers import AdamWSettings, OptimizerChoice, ScheduleSettings, kinds_that
from lapwan.settings.rewards import REWARD_EXAMPLES, REWARD_METAVAR, Rewards
from lapwan.settings.targets import TargetSettings
from lapwan.settings.train import (
    TRACKER,
    Alpha,
    BaseModelChoice,
    CompileChoice,
    DeviceName,
    EmaDecay,
    KeepLast,
    LogEvery,
    Resume,
    RunFolder,
    TrackerName,
)

LR = {"lora": 1e-4, "full": 5e-6}
_NOISE_EXPERTS = {
    "transformer": ("high",), "transformer_2": ("low",), "high": ("high",), "low": ("low",), "both": ("high", "low"),
}


class PromptSettings(Settings):
    """Prompts to train on: from a file, or the captions of a cache."""

    file: Annotated[Path | None, Flag("--prompts", metavar="FILE")] = Field(
        None, description="Prompts to train on: captions.json, prompts.yaml, clips.jsonl, or text with one prompt per "
        "line.")
    cache: Annotated[Path | None, Flag("--cache", metavar="DIR")] = Field(
        None, description="Instead of --prompts: a folder written by `lapwan cache`, for its captions, and with "
        "--offline for its latents.")
    split: str | None = Field(
        "train", description="With a cache: train on clips of this split and on those without one.")
    negative: str = Field(NEGATIVE_PROMPT, description="Negative prompt of rollouts with guidance above 1.")
    features: Path | None = Field(
        None, description="File that keeps the text features of the prompts between runs; absent: one in the run "
        "folder.")

    @model_validator(mode="after")
    def _one_source(self) -> PromptSettings:
        if (self.file is None) == (self.cache is None):
            raise ValueError("give exactly one of prompts.file (--prompts FILE) and prompts.cache (--cache DIR)")
        if self.cache is not None:
            for name, unset in (("features", None), ("negative", NEGATIVE_PROMPT)):
                if getattr(self, name) != unset:
                    raise ValueError(f"prompts.{name} is for prompts.file; a cache holds its own text features, also "
                                     f"those of its negative prompt: leave prompts.{name} out")
        return self


class RolloutSettings(Settings):
    """The source of the clean latents: sampled by the noise experts (a rollout), or read from a cache."""

    offline: Annotated[bool, Flag("--offline")] = Field(
        False, description="No rollout: use the latents of the images or clips in --cache as clean latents.")
    steps: int = Field(25, ge=1, le=10_000, description="Euler steps.")
    guidance: float = Field(
        1.0, ge=1, description="Scale of classifier-free guidance; 1: none, at half the cost.")
    flow_shift: float | None = Field(None, gt=0, description="Absent: the model's default.")


class PreferenceSettings(Settings):
    """The texts that the reward compares for an image: "positive word. caption" and "negative word. caption"."""

    positive: tuple[str, ...] = Field(
        ("Natural-lighting", "Detail", "Detailed", "Real"), min_length=1,
        description="Control words; each sample draws one. Only the reward model sees them.")
    negative: tuple[str, ...] = Field(("Concept art", "Painting", "Anime", "Flat", "Oil"), min_length=1)
    branches: Literal["both", "denoise", "inversion"] = Field(
        "both", description="Evaluate above the target sigma (denoise), below it (inversion), or half of each.")
    discount_denoise: tuple[float, float] = Field(
        (0.1, 0.25), description="Discount at the low and the high end of the sigma interval; may be negative.")
    discount_inversion: tuple[float, float] = (0.3, 0.01)
    margin: float = Field(0.7, gt=0, description="m of the hinge relu(m - R), on cosines.")
    frames: Literal["all", "first"] | Annotated[int, Field(ge=1)] = Field(
        "all", description="Frames of a video whose mean reward counts: all, first, or k evenly spaced ones.")


class HeldOutSettings(Settings):
    """Prompts that are not trained on, sampled from the same noise at each evaluation."""

    count: int = Field(16, ge=0, description="Prompts held out, chosen by seed; 0: none, and the keys below have no "
                                             "effect.")
    seed: int | None = Field(None, description="Chooses the prompts and their noise; absent: the run's seed.")
    every: int = Field(10, ge=1, description="Steps of the run between two evaluations.")
    images: int = Field(8, ge=0, description="Number of samples written to previews/ and TensorBoard.")
    size: tuple[int, int] | None = Field(None, description="Height, width; absent: as trained.")
    num_frames: int | None = Field(None, ge=1, description="4N+1; absent: as trained.")
    steps: int | None = Field(None, ge=1, le=10_000, description="Euler steps; absent: those of the rollout.")
    guidance: float | None = Field(None, ge=1, description="Absent: that of the rollout.")
    patience: int | None = Field(
        None, ge=1, description="End the run if the margin has not increased for this many evaluations; absent: never.")

    _size = field_validator("size", mode="before")(height_width)


class SrpoSettings(Settings):
    """Preference alignment of one noise expert, or both, with reward models."""

    model: BaseModelChoice = "tiny"
    output: RunFolder
    resume: Resume = False
    name: Annotated[str, Flag("--name")] = Field("lapwan", pattern=r"^[\w.-]+$", description="Stem of the LoRA files.")
    noise_experts: Annotated[tuple[NoiseExpert, ...] | None, Flag("--noise-experts")] = Field(
        None, min_length=1, description="Noise experts to train: low (transformer_2), high (transformer) or both; "
        "default: low, or the only one.")
    train: Annotated[Literal["lora", "full"], Flag("--train")] = Field(
        "lora", description="Train a LoRA, or all weights (full; writes a transformer folder).")
    prompts: PromptSettings
    rewards: Annotated[Rewards, Flag("--reward", metavar=REWARD_METAVAR)] = Field(
        description=f"Reward model: {', '.join(REWARD_EXAMPLES[:-1])} or {REWARD_EXAMPLES[-1]}; repeatable.")
    preference: PreferenceSettings = Field(default_factory=PreferenceSettings)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    sigma: Annotated[tuple[float, float], Flag(metavar="LOW,HIGH")] = Field(
        (0.7, 0.95), description="Interval of noise levels to train, limited to the noise expert's band.")
    reach: float = Field(0.0215, gt=0, lt=1, description="Largest distance between evaluation and target sigma.")
    size: Annotated[tuple[int, int] | None, Flag(metavar="HEIGHTxWIDTH")] = Field(
        None, description="Height x width in pixels, multiples of 16 (TI2V-5B: 32); default: the model's.")
    num_frames: Annotated[int, Flag()] = Field(
        1, ge=1, description="Frames of a sample; 1: an image; 4N+1: a video.")
    steps: Annotated[int, Flag("--steps")] = Field(20, ge=1, description="Optimizer steps of the run.")
    batch_size: Annotated[int, Flag("--batch-size")] = Field(1, ge=1, description="Prompts per batch.")
    accumulate: int = Field(
        32, ge=1, description="Batches per optimizer step; 32 samples per step are recommended.")
    turn: int = Field(1, ge=1, description="With both noise experts: consecutive steps of one before the other's turn.")
    targets: TargetSettings = Field(default_factory=lambda: TargetSettings(
        last_blocks="all", ffn_last_blocks="all", q=16, k=16, v=16, o=16, ffn_in=16, ffn_out=16))
    alpha: Alpha = None
    optimizer: OptimizerChoice = Field(default_factory=lambda: AdamWSettings(lr=LR["lora"], weight_decay=1e-4))
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    max_grad_norm: float = Field(0.1, gt=0)
    kl_weight: float = Field(
        0.0, ge=0, description="Weight of the squared distance between the velocity and the base's; LoRA only.")
    ema_decay: EmaDecay = None
    master_weights: Annotated[Literal["fp32", "bf16"], Flag()] = Field(
        "fp32", description="Weights that the optimizer updates: an fp32 copy, or the bf16 weights with stochastic "
        "rounding.")
    optimizer_on_cpu: Annotated[bool, Flag()] = Field(
        False, description="Keep the optimizer's states (and the fp32 copy) in host memory; adamw only.")
    memory: Literal["auto", "both", "one"] = Field(
        "auto", description="Noise experts on the device: both, or one, with the other offloaded to host memory.")
    activation_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="Recompute the transformer's activations in the backward pass; auto: if memory requires "
        "it.")
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    held_out: HeldOutSettings = Field(default_factory=HeldOutSettings)
    seed: Annotated[int, Flag("--seed")] = Field(
        42, description="Seed of order, noise, sigma, control words and initial weights.")
    save_every: Annotated[int, Flag("--save-every")] = Field(10, ge=1, description="Steps between checkpoints.")
    keep_last: KeepLast = None
    keep_best: int | None = Field(
        None, ge=1, description="Checkpoints of the highest held-out margin to keep besides the newest.")
    allow_changed: Annotated[bool, Flag("--allow-changed")] = Field(
        False, description="With --resume: continue although settings, prompts or base have changed.")
    sigma_bins: int = Field(4, ge=1, description="Bins of the sigma interval that are logged separately.")
    log_every: LogEvery = 1
    tracker: TrackerName = Field(None, description=TRACKER)
    device: DeviceName = "auto"
    compile: CompileChoice = "auto"
    dtype: Annotated[TrainDtype, Flag("--dtype", metavar="auto|fp32|bf16|fp8|int8|nf4")] = Field(
        "auto", description="Dtype of the transformers; auto: bf16 on a GPU. fp8, int8 and nf4 quantise the frozen "
        "base of a LoRA.")

    @model_validator(mode="before")
    @classmethod
    def _lr_by_kind(cls, value: Any) -> Any:
        """Defaults of AdamW that depend on what is trained: a LoRA, or all weights."""
        if isinstance(value, dict):
            value = expand_short_forms(current_keys(value))
            optimizer = value.get("optimizer") or {}
            if isinstance(optimizer, dict) and optimizer.get("type", "adamw") == "adamw":
                lr = LR.get(str(value.get("train", "lora")), LR["lora"])
                value = {**value, "optimizer": {"lr": lr, "weight_decay": 1e-4, **optimizer}}
        return value

    @field_validator("noise_experts", mode="before")
    @classmethod
    def _noise_experts(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list | tuple):
            names = [name.value if isinstance(name, NoiseExpert) else str(name).strip() for name in names]
            if unknown := [name for name in names if name not in _NOISE_EXPERTS]:
                raise ValueError(f"'{unknown[0]}' is not a noise expert; give low (transformer_2), high (transformer) "
                                 "or both")
            return tuple(dict.fromkeys(noise_expert for name in names for noise_expert in _NOISE_EXPERTS[name]))
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
            raise ValueError(f"kl_weight = {self.kl_weight:g} needs the weights of the base, which a full fine-tune "
                             "overwrites; set kl_weight = 0 (the held-out evaluations log the distance), or train = "
                             "\"lora\"")
        masters = " or ".join(f"'{kind}'" for kind in kinds_that("takes_master_weights"))
        for name, wanted in (("master_weights = \"bf16\"", self.master_weights == "bf16"),
                             ("optimizer_on_cpu = true", self.optimizer_on_cpu)):
            if wanted and not self.optimizer.takes_master_weights:
                raise ValueError(f"{name} is only for optimizer.type = {masters}, not '{self.optimizer.kind}'")
        if self.train == "full" and precision_of(self.dtype) is not None:
            raise ValueError(f"dtype = '{self.dtype}' is for a base that stays frozen, but train = \"full\" trains it; "
                             "set dtype = \"bf16\", or train = \"lora\"")
        if self.train == "full" and not self.optimizer.takes_master_weights:
            raise ValueError(f"a full fine-tune takes optimizer.type = {masters}, not '{self.optimizer.kind}'")
        frames = self.preference.frames
        if isinstance(frames, int) and frames > self.num_frames:
            raise ValueError(f"preference.frames = {frames} is more than num_frames = {self.num_frames}; set it to at "
                             f"most {self.num_frames}, or to \"all\" or \"first\"")
        if self.held_out.patience is not None and not self.held_out.count:
            raise ValueError("held_out.patience needs held-out prompts: set held_out.count above 0")
        if self.keep_best is not None and (not self.held_out.count or self.save_every % self.held_out.every):
            raise ValueError(f"keep_best needs a held-out evaluation at every checkpoint: save_every = "
                             f"{self.save_every} must be a multiple of held_out.every = {self.held_out.every}")
        return self

    @property
    def held_out_seed(self) -> int:
        """The seed of the held-out prompts and their noise."""
        return self.seed if self.held_out.seed is None else self.held_out.seed
