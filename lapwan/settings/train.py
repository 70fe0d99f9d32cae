"""What every training command's settings share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.aliases import current_keys, spell_out, suggestion, takes
from lapwan.settings.alpha_schedule import AlphaScheduleSettings
from lapwan.settings.base import Flag, Settings, submodel, union_members
from lapwan.settings.callbacks import HealthSettings, PreviewSettings, ValidationSettings, WatchSettings
from lapwan.settings.memory import MEMORY_METAVAR, MemoryChoice, TrainDtype
from lapwan.settings.model import BaseModelSettings
from lapwan.settings.optimizers import AdamWSettings, OptimizerSettings, ScheduleSettings, take_flat_keys
from lapwan.settings.sigma import SigmaSettings, WeightingSettings, refuse_ddpm_weighting
from lapwan.settings.targets import TargetSettings, lay_over


def _checkpointing(value: Any) -> Any:
    return {True: "block", False: "off", "true": "block", "false": "off"}.get(value, value) if isinstance(
        value, bool | str) else value


class DataSettings(Settings):
    """What to train on."""

    cache: Annotated[Path, Flag("--cache", metavar="DIR")] = Field(description="Folder that `lapwan cache` wrote.")
    labels: Annotated[Path | None, Flag("--labels", metavar="FILE")] = Field(
        None, description="labels.jsonl for caches that carry no labels.")
    split: str | None = Field("train", description="Train on clips of this split and on those without one.")
    balance: float = Field(
        0.0, ge=0, le=2, description="Clips are drawn by 1 / (clips of their family) to this power; 0: each once an "
        "epoch, 1: families evenly.")


class DropoutSettings(Settings):
    """Parts of the update left out at random in training; what is kept is scaled up, so its mean stays."""

    neuron: float = Field(0.0, ge=0, lt=1, description="Of each token's values between A and B.")
    rank: float = Field(0.0, ge=0, lt=1, description="Of whole rows of A, a clip at a time.")
    module: float = Field(0.0, ge=0, lt=1, description="Of whole modules, a clip at a time.")


class PhaseSettings(Settings):
    """A stretch of the run: optimizer steps of each noise expert in it."""

    high: int = Field(0, ge=0)
    low: int = Field(0, ge=0)
    joint: int = Field(0, ge=0, description="Steps shared equally by the noise experts, besides `high` and `low`.")

    @model_validator(mode="after")
    def _some(self) -> PhaseSettings:
        if not self.high + self.low + self.joint:
            raise ValueError("a phase needs steps: high, low or joint")
        return self


class NoiseExpertSettings(Settings):
    """What may differ between the noise experts."""

    steps: int = Field(ge=1)
    start: int = Field(ge=0)
    stop: int | None = Field(ge=1)
    targets: TargetSettings
    alpha: float | None = Field(gt=0)
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    sigma: SigmaSettings
    weighting: WeightingSettings
    dropout: DropoutSettings
    max_norm: float | None = Field(gt=0)
    alpha_schedule: AlphaScheduleSettings

    @model_validator(mode="after")
    def _one_alpha(self) -> NoiseExpertSettings:
        if self.alpha_schedule.phases and self.alpha is not None:
            raise ValueError(f"alpha = {self.alpha:g} and alpha_schedule both say alpha; leave alpha out")
        if self.alpha_schedule.phases and self.optimizer.type not in ("adamw", "automagic"):
            raise ValueError(f"alpha_schedule rescales the optimizer's state at a transition, which it cannot for "
                             f"optimizer.type = '{self.optimizer.type}'; use adamw or automagic")
        return self

    @property
    def first_alpha(self) -> float | None:
        """Alpha at the start of the run; None: each module's rank."""
        return self.alpha_schedule.phases[0].alpha if self.alpha_schedule.phases else self.alpha


_SHARED = tuple(NoiseExpertSettings.model_fields)


class TrainSettings(Settings):
    """Shared by train-lora and train-moe."""

    model: Annotated[str | BaseModelSettings, Flag("--model", metavar="MODEL")] = Field(
        "tiny", description="tiny, or a folder in diffusers layout; in TOML also {model, lora, multiplier}.")
    output: Annotated[Path, Flag("--output", "-o", metavar="DIR")] = Field(description="Run folder.")
    resume: Annotated[bool, Flag("--resume")] = Field(
        False, description="Go on from the newest checkpoint of the run folder, if it has one.")
    name: Annotated[str, Flag("--name")] = Field(
        "lapwan", pattern=r"^[\w.-]+$", description="Stem of the adapter files.")
    noise_experts: tuple[NoiseExpert, ...] = Field(
        (NoiseExpert.HIGH, NoiseExpert.LOW), min_length=1, description="The noise experts to train.")
    data: DataSettings
    steps: Annotated[int | None, Flag("--steps")] = Field(
        None, ge=1, description="Optimiser steps of each noise expert; give this or epochs.")
    epochs: Annotated[float | None, Flag("--epochs")] = Field(
        None, gt=0, description="Instead of steps: passes of each noise expert over the clips.")
    batch_size: Annotated[int, Flag("--batch-size")] = Field(1, ge=1, description="Clips at a time.")
    accumulate: int = Field(1, ge=1, description="Batches an optimizer step.")
    divide: Literal["batches", "tokens"] = Field(
        "batches", description="What several processes share of a step: its batches, or every clip's tokens, for clips "
        "too long for one GPU.")
    turn: int = Field(10, ge=1, description="Steps one noise expert takes before the other's turn.")
    shares: dict[NoiseExpert, float] = Field(
        {}, description="Share of all steps by noise expert, such as {high = 0.7, low = 0.3}; absent: equal.")
    phases: tuple[PhaseSettings, ...] = Field(
        (), description="Instead of steps: stretches one after the other, such as high 1000, low 1500, joint 200.")
    start: int = Field(0, ge=0, description="Step of the run before which a noise expert has no turn ([high], [low]).")
    stop: int | None = Field(None, ge=1, description="Step of the run from which it has none ([high], [low]).")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; absent: each module's rank, a scale of 1.")
    targets: TargetSettings = Field(default_factory=TargetSettings)
    optimizer: OptimizerSettings = Field(default_factory=AdamWSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Running mean of what is trained, which is then what is saved; absent: none.")
    sigma: SigmaSettings = Field(default_factory=SigmaSettings)
    weighting: WeightingSettings = Field(default_factory=WeightingSettings)
    dropout: DropoutSettings = Field(default_factory=DropoutSettings)
    max_norm: float | None = Field(None, gt=0, description="Largest norm of a module's update; absent: any.")
    alpha_schedule: AlphaScheduleSettings = Field(default_factory=AlphaScheduleSettings)
    high: dict[str, Any] = Field({}, description="What differs for the high-noise expert.")
    low: dict[str, Any] = Field({}, description="What differs for the low-noise expert.")
    roi_weight: float = Field(0.0, ge=0, description="Weight of the loss over the clips' regions; 0: off.")
    roi_fallback: Literal["none", "motion"] = Field(
        "none", description="Region of clips without one; motion: where the latents change most.")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="Probability of training on the empty caption.")
    max_grad_norm: float = Field(1.0, gt=0)
    memory: Annotated[MemoryChoice, Flag("--memory", metavar=MEMORY_METAVAR)] = Field(
        "auto", description="Noise experts on the device: both, one with the idle one in host memory, or the frozen "
        "blocks streamed from there too; a number is the GiB to stay below; auto: what fits and is fastest.")
    activation_checkpointing: Annotated[Literal["auto", "off", "op", "block"], BeforeValidator(_checkpointing)] = Field(
        "auto", description="What a backward computes again instead of keeping it: nothing, cheap operations, whole "
        "blocks; auto: as little as memory allows. true is block, false is off.")
    seed: Annotated[int, Flag("--seed")] = Field(42, description="Order, noise, sigma and initial weights.")
    save_every: Annotated[int, Flag("--save-every")] = Field(100, ge=1, description="Steps between checkpoints.")
    keep_last: int | None = Field(None, ge=1, description="Newest checkpoints to keep; absent: all.")
    keep_best: int | None = Field(
        None, ge=1, description="Checkpoints of the lowest validation loss to keep besides the newest.")
    watch: WatchSettings = Field(default_factory=WatchSettings)
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    preview: PreviewSettings = Field(default_factory=PreviewSettings)
    health: HealthSettings = Field(default_factory=HealthSettings)
    allow_changed: Annotated[bool, Flag("--allow-changed")] = Field(
        False, description="With --resume: go on although settings, clips or base have changed.")
    sigma_bins: int = Field(4, ge=1, description="Parts of a noise expert's band whose losses are logged apart.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.jsonl.")
    device: Annotated[str, Flag("--device")] = Field("auto", description="auto, cpu, cuda or cuda:N.")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="Blocks through torch.compile; auto: on a GPU, for runs that save more than it takes.")
    dtype: Annotated[TrainDtype, Flag("--dtype", metavar="auto|fp32|bf16|fp8|int8|nf4")] = Field(
        "auto", description="Of the frozen base; auto: bf16 on a GPU. fp8, int8 and nf4 (4 bits) quantise its blocks.")
    trained_blocks: Literal["auto", "plain", "quantised"] = Field(
        "auto", description="With a quantised dtype, the blocks something is trained in; auto: plain for fp8 where "
        "they are at most half, else quantised.")

    @model_validator(mode="before")
    @classmethod
    def _users_spellings(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        refuse_ddpm_weighting(value)
        return take_flat_keys(spell_out(current_keys(value)))

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if sum((self.steps is not None, self.epochs is not None, bool(self.phases))) != 1:
            raise ValueError("give exactly one of steps, epochs and [[phases]]")
        if len(set(self.noise_experts)) != len(self.noise_experts):
            raise ValueError(f"noise_experts = {[e.value for e in self.noise_experts]}: each noise expert at most once")
        self._check_turns()
        every = self.validation.every
        if self.keep_best is not None and (every is None or self.save_every % every):
            raise ValueError(f"keep_best needs a validation at every checkpoint: save_every = {self.save_every} must "
                             f"be a multiple of validation.every = {every}")
        for noise_expert in NoiseExpert:
            if self._override(noise_expert) and noise_expert not in self.noise_experts:
                raise ValueError(f"[{noise_expert.value}] is set, but noise_experts does not hold '{noise_expert.value}'")
            self.of(noise_expert, 1)
        return self

    def _check_turns(self) -> None:
        if self.shares:
            if set(self.shares) != set(self.noise_experts) or min(self.shares.values()) <= 0:
                raise ValueError(f"shares needs a share above 0 for each of {', '.join(e.value for e in self.noise_experts)}")
            if abs(sum(self.shares.values()) - 1) > 1e-6:
                raise ValueError(f"shares must add up to 1, not {sum(self.shares.values()):g}")
        for noise_expert in NoiseExpert:
            own = self._override(noise_expert)
            if "steps" in own and (self.shares or self.phases):
                other = "shares" if self.shares else "[[phases]]"
                raise ValueError(f"{noise_expert.value}.steps and {other} both say how many steps; leave one out")
            if self.phases and ("start" in own or "stop" in own or self.shares):
                raise ValueError("[[phases]] says which steps are whose; leave out start, stop and shares")
            if noise_expert not in self.noise_experts and any(getattr(phase, noise_expert.value) for phase in self.phases):
                raise ValueError(f"a phase has {noise_expert.value} steps, but noise_experts does not hold '{noise_expert.value}'")

    def _override(self, noise_expert: NoiseExpert) -> dict[str, Any]:
        return self.high if noise_expert is NoiseExpert.HIGH else self.low

    def of(self, noise_expert: NoiseExpert, steps: int) -> NoiseExpertSettings:
        """A noise expert's own settings: the shared ones with `[high]` or `[low]` laid over them.

        Args:
            steps: used where neither says a number of steps (epochs were given).
        """
        shared = {key: getattr(self, key) for key in _SHARED}
        plain = {k: v.model_dump() if isinstance(v, Settings) else v for k, v in shared.items()}
        plain["steps"] = self._steps_of(noise_expert, self.steps or steps)
        own = dict(self._override(noise_expert))
        if "targets" in own:
            plain["targets"] = lay_over(self.targets, own.pop("targets"))
        try:
            return NoiseExpertSettings.model_validate(_overlay(plain, own))
        except ValidationError as error:
            first = error.errors()[0]
            tags = {"adamw", "adamw8bit", "automagic", "prodigy"}
            key = ".".join([noise_expert.value, *(str(part) for part in first["loc"] if part not in tags)])
            if first["type"] == "extra_forbidden":
                known = takes(_known_at(first["loc"]))
                section = key.rpartition(".")[0]
                guess = suggestion(key.rpartition(".")[2], known) or f"; [{section}] takes {', '.join(known)}"
                raise ValueError(f"unknown key '{key}'{guess}") from None
            shown = "" if isinstance(first["input"], dict | Settings) else f" = {first['input']!r}"
            raise ValueError(f"{key}{shown}: {first['msg'].removeprefix('Value error, ')}") from None

    def _steps_of(self, noise_expert: NoiseExpert, each: int) -> int:
        if self.phases:
            place = self.noise_experts.index(noise_expert) if noise_expert in self.noise_experts else 0
            own: int = sum(getattr(phase, noise_expert.value) for phase in self.phases)
            return max(1, own + sum(split_evenly(phase.joint, len(self.noise_experts))[place] for phase in self.phases))
        if self.shares:
            return max(1, round(self.shares.get(noise_expert, 0.0) * each * len(self.noise_experts)))
        return each


def split_evenly(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole numbers that differ by at most one, the larger ones first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _known_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys known in the section where an unknown one was found."""
    if len(location) == 1:
        return list(_SHARED)
    annotation = NoiseExpertSettings.model_fields[str(location[0])].annotation
    one = submodel(annotation)
    return [name for model in ([one] if one else union_members(annotation)) for name in model.model_fields]


def _overlay(tree: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `tree`, section by section; an optimizer of another type starts from its own defaults."""
    merged = dict(tree)
    for key, value in over.items():
        below = merged.get(key)
        if not (isinstance(below, dict) and isinstance(value, Mapping)):
            merged[key] = value
        elif value.get("type", below.get("type")) != below.get("type"):
            merged[key] = dict(value)
        else:
            merged[key] = _overlay(below, value)
    return merged
