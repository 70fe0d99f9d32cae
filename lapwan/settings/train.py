"""Settings shared by `train-lora` and `train-moe`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.aliases import current_keys, expand_short_forms
from lapwan.settings.base import Flag, Settings
from lapwan.settings.callbacks import HealthSettings, PreviewSettings, ValidationSettings, WatchSettings
from lapwan.settings.load import first_problem
from lapwan.settings.lora_argument import AdapterRule, CommonModules, Strict
from lapwan.settings.memory import MEMORY_METAVAR, MemoryChoice, TrainDtype
from lapwan.settings.model import ModelChoice
from lapwan.settings.optimizers import (
    AdamWSettings,
    OptimizerChoice,
    ScheduleSettings,
    kinds_that,
    nest_flat_keys,
)
from lapwan.settings.sigma import SigmaSettings, WeightingSettings, refuse_ddpm_weighting
from lapwan.settings.targets import TargetSettings, override_targets


def _checkpointing(value: Any) -> Any:
    return {True: "block", False: "off", "true": "block", "false": "off"}.get(value, value) if isinstance(
        value, bool | str) else value


# Fields of every training run.
BaseModelChoice = Annotated[
    ModelChoice, Flag("--model", metavar="MODEL"),
    Field(description="tiny, or a folder in diffusers layout; in TOML also {model, lora, multiplier}, or the files "
                      "high, low, vae, text_encoder and tokenizer.")]
RunFolder = Annotated[Path, Flag("--output", "-o", metavar="DIR"), Field(description="Run folder.")]
Resume = Annotated[bool, Flag("--resume"), Field(
    description="Continue from the newest checkpoint of the run folder, if there is one.")]
Alpha = Annotated[float | None, Field(gt=0, description="LoRA alpha; absent: each module's rank, a scale of 1.")]
EmaDecay = Annotated[float | None, Field(
    gt=0, lt=1, description="Keep an EMA of the trained weights, which is then saved; absent: none.")]
KeepLast = Annotated[int | None, Field(ge=1, description="Newest checkpoints to keep; absent: all.")]
TrackerName = Annotated[Literal["wandb", "trackio"] | None, Flag("--tracker", metavar="wandb|trackio")]
TRACKER = "Also send the figures of metrics.jsonl to Weights & Biases or trackio; absent: TensorBoard files alone."
LogEvery = Annotated[int, Field(ge=1, description="Steps between lines of metrics.jsonl.")]
DeviceName = Annotated[str, Flag("--device"), Field(description="auto, cpu, cuda or cuda:N.")]
CompileChoice = Annotated[Literal["auto", "on", "off"], Field(
    description="Run the blocks through torch.compile; auto: on a GPU, if the run saves more time than compiling "
                "takes.")]


class DataSettings(Settings):
    """What to train on."""

    cache: Annotated[Path, Flag("--cache", metavar="DIR")] = Field(description="Folder written by `lapwan cache`.")
    labels: Annotated[Path | None, Flag("--labels", metavar="FILE")] = Field(
        None, description="labels.jsonl for caches that carry no labels.")
    split: str | None = Field("train", description="Train on clips of this split and on those without one.")
    balance: float = Field(
        0.0, ge=0, le=2, description="Clips are drawn with weight 1 / (clips of their family) to this power; 0: each "
        "once per epoch, 1: all families equally often.")
    on_bad_clip: Literal["keep", "skip"] = Field(
        "keep", description="A clip that has spoiled two steps (non-finite loss or gradient): keep training on it, or "
        "skip it, so that the next clip of its size takes its turns.")


class DropoutSettings(Settings):
    """Dropout probabilities of a LoRA in training; what is kept is scaled up, so that the mean stays the same."""

    neuron: float = Field(0.0, ge=0, lt=1, description="Drops single activations between A and B, for each token.")
    rank: float = Field(0.0, ge=0, lt=1, description="Drops rows of A, for a whole clip.")
    module: float = Field(0.0, ge=0, lt=1, description="Drops modules, for a whole clip.")


class AlphaPhaseSettings(Settings):
    """One phase of alpha. The last three are other trainers' criteria: shown at a decision, without effect on it."""

    name: str = Field(min_length=1)
    alpha: float = Field(gt=0)
    min_steps: int = Field(0, ge=0, description="Steps of the noise expert before the phase may end.")
    max_steps: int | None = Field(None, ge=1, description="Largest number of steps of the phase; absent: any.")
    loss_improvement_rate_below: float | None = Field(None, gt=0, description="Advisory.")
    min_gradient_stability: float | None = Field(None, ge=0, le=1, description="Advisory.")
    min_loss_r2: float | None = Field(None, ge=0, le=1, description="Advisory.")

    @model_validator(mode="after")
    def _order(self) -> AlphaPhaseSettings:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(f"max_steps = {self.max_steps} is below min_steps = {self.min_steps}")
        return self


class AlphaScheduleSettings(Settings):
    """Alpha in phases, for each noise expert separately; a phase ends when its loss has stopped falling.

    Stopped: the upper confidence bound of the relative decrease per 100 steps is below `decrease_below`, at
    `confirmations` consecutive checks. With batches of one the bound itself is about 165·cv / √(window³ / 12), cv being
    the scatter of losses at equal sigma: 0.9 % at cv 0.5 and 1000 steps; 10 % at 200 steps, which could never decide.
    """

    phases: tuple[AlphaPhaseSettings, ...] = ()
    decrease_below: float = Field(0.01, gt=0, description="Relative decrease of the loss per 100 steps.")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    confirmations: int = Field(3, ge=1)
    window: int = Field(1000, ge=20, description="Latest steps of the noise expert, within the phase, that are fitted.")
    check_every: int = Field(50, ge=1, description="Steps of the noise expert between two checks.")


class PhaseSettings(Settings):
    """A stretch of the run, in optimizer steps of each noise expert."""

    high: int = Field(0, ge=0)
    low: int = Field(0, ge=0)
    joint: int = Field(0, ge=0, description="Steps shared equally by the noise experts, besides `high` and `low`.")

    @model_validator(mode="after")
    def _some(self) -> PhaseSettings:
        if not self.high + self.low + self.joint:
            raise ValueError("a phase needs steps: high, low or joint")
        return self


class NoiseExpertSettings(Settings):
    """The settings that may differ between the noise experts."""

    steps: int = Field(ge=1)
    start: int = Field(ge=0)
    stop: int | None = Field(ge=1)
    targets: TargetSettings
    alpha: float | None = Field(gt=0)
    optimizer: OptimizerChoice
    schedule: ScheduleSettings
    sigma: SigmaSettings
    weighting: WeightingSettings
    dropout: DropoutSettings
    max_norm: float | None = Field(gt=0)
    alpha_schedule: AlphaScheduleSettings

    @model_validator(mode="after")
    def _one_alpha(self) -> NoiseExpertSettings:
        if self.alpha_schedule.phases and self.alpha is not None:
            raise ValueError(f"alpha = {self.alpha:g} and alpha_schedule both set alpha; leave alpha out")
        if self.alpha_schedule.phases and self.optimizer.gradient_powers is None:
            raise ValueError(f"alpha_schedule rescales the optimizer's state at a transition, which is not possible "
                             f"with optimizer.type = '{self.optimizer.kind}'; use "
                             f"{' or '.join(kinds_that('gradient_powers'))}")
        return self

    @property
    def first_alpha(self) -> float | None:
        """Alpha at the start of the run; None: each module's rank."""
        return self.alpha_schedule.phases[0].alpha if self.alpha_schedule.phases else self.alpha


_SHARED = tuple(NoiseExpertSettings.model_fields)


class TrainSettings(AdapterRule):
    """Shared by train-lora and train-moe; `of` gives the settings of one noise expert."""

    model: BaseModelChoice = "tiny"
    output: RunFolder
    resume: Resume = False
    name: Annotated[str, Flag("--name")] = Field(
        "lapwan", pattern=r"^[\w.-]+$", description="Stem of the adapter files.")
    noise_experts: tuple[NoiseExpert, ...] = Field(
        tuple(NoiseExpert), min_length=1, description="The noise experts to train; both: all that the model has.")
    data: DataSettings
    steps: Annotated[int | None, Flag("--steps")] = Field(
        None, ge=1, description="Optimizer steps of each noise expert; give this or epochs.")
    epochs: Annotated[float | None, Flag("--epochs")] = Field(
        None, gt=0, le=1_000_000, description="Instead of steps: passes of each noise expert over the clips.")
    batch_size: Annotated[int, Flag("--batch-size")] = Field(1, ge=1, description="Clips per batch.")
    accumulate: int = Field(1, ge=1, description="Batches per optimizer step.")
    divide: Literal["batches", "tokens"] = Field(
        "batches", description="How several processes divide a step: by batches (data parallel), or by the tokens of "
        "each clip (context parallel), for clips too long for one GPU.")
    turn: int = Field(10, ge=1, description="Consecutive steps of one noise expert before the other's turn.")
    shares: dict[NoiseExpert, float] = Field(
        {}, description="Share of all steps by noise expert, such as {high = 0.7, low = 0.3}; absent: equal.")
    phases: tuple[PhaseSettings, ...] = Field(
        (), description="Instead of steps: consecutive stretches, such as high 1000, low 1500, joint 200.")
    start: int = Field(0, ge=0, description="Step of the run at which a noise expert's first turn may come; for [high] "
                                            "and [low].")
    stop: int | None = Field(None, ge=1, description="Step of the run from which on it has no turn; for [high] and "
                                                     "[low].")
    alpha: Alpha = None
    targets: TargetSettings = Field(default_factory=TargetSettings)
    optimizer: OptimizerChoice = Field(default_factory=AdamWSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    ema_decay: EmaDecay = None
    sigma: SigmaSettings = Field(default_factory=SigmaSettings)
    weighting: WeightingSettings = Field(default_factory=WeightingSettings)
    dropout: DropoutSettings = Field(default_factory=DropoutSettings)
    max_norm: float | None = Field(None, gt=0, description="Largest norm of a module's update; absent: any.")
    alpha_schedule: AlphaScheduleSettings = Field(default_factory=AlphaScheduleSettings)
    high: dict[str, Any] = Field({}, description="Overrides for the high noise expert.")
    low: dict[str, Any] = Field({}, description="Overrides for the low noise expert.")
    roi_weight: float = Field(0.0, ge=0, description="Weight of the loss over the clips' regions; 0: off.")
    roi_fallback: Literal["none", "motion"] = Field(
        "none", description="Region of clips that have none; motion: where the latents change most.")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="Probability of training on the empty caption.")
    first_frame: float | None = Field(
        None, ge=0, le=1, description="TI2V-5B: share of the draws that have the clean first frame of their clip "
        "(image-to-video), the others have none; absent: 0.5.")
    max_grad_norm: float = Field(1.0, gt=0)
    memory: Annotated[MemoryChoice, Flag("--memory", metavar=MEMORY_METAVAR)] = Field(
        "auto", description="Keep both noise experts on the device, one with the other in host memory (one), or also "
        "stream the frozen blocks from host memory (stream); a number is a limit in GiB; auto: the fastest that fits.")
    activation_checkpointing: Annotated[Literal["auto", "off", "op", "block"], BeforeValidator(_checkpointing)] = Field(
        "auto", description="Activations that a backward recomputes: none (off), those of cheap operations (op), whole "
        "blocks (block); auto: as few as memory allows. true is block, false is off.")
    seed: Annotated[int, Flag("--seed")] = Field(42, description="Seed of order, noise, sigma and initial weights.")
    save_every: Annotated[int, Flag("--save-every")] = Field(100, ge=1, description="Steps between checkpoints.")
    keep_last: KeepLast = None
    keep_best: int | None = Field(
        None, ge=1, description="Checkpoints of the lowest validation loss to keep besides the newest.")
    watch: WatchSettings = Field(default_factory=WatchSettings)
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    preview: PreviewSettings = Field(default_factory=PreviewSettings)
    health: HealthSettings = Field(default_factory=HealthSettings)
    allow_changed: Annotated[bool, Flag("--allow-changed")] = Field(
        False, description="With --resume: continue although settings, clips or base have changed.")
    sigma_bins: int = Field(4, ge=1, description="Bins of a noise expert's band whose losses are logged separately.")
    log_every: LogEvery = 1
    tracker: TrackerName = Field(None, description=TRACKER)
    device: DeviceName = "auto"
    compile: CompileChoice = "auto"
    dtype: Annotated[TrainDtype, Flag("--dtype", metavar="auto|fp32|bf16|fp8|int8|nf4")] = Field(
        "auto", description="Dtype of the frozen base; auto: bf16 on a GPU. fp8, int8 and nf4 (4 bits) quantise its "
        "blocks.")
    trained_blocks: Literal["auto", "plain", "quantised"] = Field(
        "auto", description="With a quantised dtype: form of the blocks that hold trained modules; auto: plain with "
        "fp8 if they are at most half of all, else quantised.")
    strict: Strict = False
    common_modules: CommonModules = False

    @model_validator(mode="before")
    @classmethod
    def _other_forms(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        refuse_ddpm_weighting(value)
        return nest_flat_keys(expand_short_forms(current_keys(value)))

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
            side = noise_expert.value
            if self._override(noise_expert) and noise_expert not in self.noise_experts:
                raise ValueError(f"[{side}] is set, but noise_experts does not include '{side}'")
            self.of(noise_expert, 1)
        return self

    def _check_turns(self) -> None:
        if self.shares:
            if set(self.shares) != set(self.noise_experts) or min(self.shares.values()) <= 0:
                trained = ", ".join(noise_expert.value for noise_expert in self.noise_experts)
                raise ValueError(f"shares needs a share above 0 for each of {trained}")
            if abs(sum(self.shares.values()) - 1) > 1e-6:
                raise ValueError(f"shares must add up to 1, not {sum(self.shares.values()):g}")
        for noise_expert in NoiseExpert:
            side, override = noise_expert.value, self._override(noise_expert)
            if "steps" in override and (self.shares or self.phases):
                other = "shares" if self.shares else "[[phases]]"
                raise ValueError(f"{side}.steps and {other} both set the number of steps; leave one out")
            if self.phases and ("start" in override or "stop" in override or self.shares):
                raise ValueError("[[phases]] assigns the steps; leave out start, stop and shares")
            if noise_expert not in self.noise_experts and any(getattr(phase, side) for phase in self.phases):
                raise ValueError(f"a phase has {side} steps, but noise_experts does not include '{side}'")

    def keys_of_two(self) -> list[str]:
        """The keys that are set and mean nothing for a model of one transformer."""
        keys = {"[low]": self.low, "shares": self.shares, "low steps in [[phases]]": any(p.low for p in self.phases)}
        return [key for key, value in keys.items() if value]

    def _override(self, noise_expert: NoiseExpert) -> dict[str, Any]:
        override: dict[str, Any] = getattr(self, noise_expert.value)
        return override

    def of(self, noise_expert: NoiseExpert, steps: int) -> NoiseExpertSettings:
        """The settings of a noise expert: the shared ones, overridden by `[high]` or `[low]`.

        Args:
            steps: used if neither holds a number of steps, because epochs were given.
        """
        shared = {key: getattr(self, key) for key in _SHARED}
        plain = {k: v.model_dump() if isinstance(v, Settings) else v for k, v in shared.items()}
        plain["steps"] = self._steps_of(noise_expert, self.steps or steps)
        override = dict(self._override(noise_expert))
        if "targets" in override:
            plain["targets"] = override_targets(self.targets, override.pop("targets"))
        try:
            return NoiseExpertSettings.model_validate(_merge_sections(plain, override))
        except ValidationError as error:
            raise ValueError(first_problem(error, NoiseExpertSettings, noise_expert.value)) from None

    def _steps_of(self, noise_expert: NoiseExpert, each: int) -> int:
        if self.phases:
            index = self.noise_experts.index(noise_expert) if noise_expert in self.noise_experts else 0
            alone: int = sum(getattr(phase, noise_expert.value) for phase in self.phases)
            joint = sum(split_evenly(phase.joint, len(self.noise_experts))[index] for phase in self.phases)
            return max(1, alone + joint)
        if self.shares:
            return max(1, round(self.shares.get(noise_expert, 0.0) * each * len(self.noise_experts)))
        return each


def split_evenly(count: int, parts: int) -> list[int]:
    """Split `count` into `parts` whole numbers that differ by at most one, the larger ones first."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def _merge_sections(tree: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` overridden by `over`, section by section; an optimizer of another type starts from its own defaults."""
    merged = dict(tree)
    for key, value in over.items():
        below = merged.get(key)
        if not (isinstance(below, dict) and isinstance(value, Mapping)):
            merged[key] = value
        elif value.get("type", below.get("type")) != below.get("type"):
            merged[key] = dict(value)
        else:
            merged[key] = _merge_sections(below, value)
    return merged
