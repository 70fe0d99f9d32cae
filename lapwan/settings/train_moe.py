"""Settings of `lapwan train-moe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Settings
from lapwan.settings.load import first_problem
from lapwan.settings.targets import TargetSettings, override_targets
from lapwan.settings.train import TrainSettings


class RouterSettings(Settings):
    """The router, which maps a clip's text (or label) to a probability for each expert."""

    kind: Literal["text", "linear", "label", "rule"] = Field(
        "text", description="text: learned, from text features; linear: the same without hidden layers, for few "
        "captions; label: learned, from labels; rule: the labels themselves.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the router's softmax.")
    top_k: int = Field(2, ge=1, description="Experts active on a clip.")
    lr_scale: float = Field(10.0, gt=0, description="Ratio of the router's lr to the experts'.")
    sigma: bool = Field(False, description="Give the router the noise level too.")
    gate_ema: float = Field(
        0.0, ge=0, lt=1, description="With sigma: decay of the EMA of the gates over denoising steps, at generation.")

    @model_validator(mode="after")
    def _sigma(self) -> RouterSettings:
        if self.sigma and self.kind == "rule":
            raise ValueError('sigma = true has no effect on kind = "rule", whose gates are the labels; leave it out')
        if self.gate_ema and not self.sigma:
            raise ValueError(f"gate_ema = {self.gate_ema:g} smooths gates over denoising steps, but they are constant "
                             "unless sigma = true; leave it out, or set sigma")
        return self


class TimestepGateSettings(Settings):
    """The timestep gate w(σ): strength of the experts at each noise level."""

    knots: int = Field(8, ge=2, description="Knots of the piecewise linear curve over a noise expert's band.")
    lr_scale: float = Field(10.0, gt=0, description="Ratio of the gate's lr to the experts'.")


class RoutingLossSettings(Settings):
    """Weights of the routing losses."""

    entropy: float = Field(0.02, ge=0, description="Weight of the entropy term.")
    entropy_floor: float = Field(0.5, ge=0, description="In nats; the entropy term acts below it.")
    balance: float = Field(0.1, ge=0, description="Weight of the load balancing term.")
    usage_decay: float = Field(0.99, ge=0, lt=1, description="Decay per step of the EMA of usage.")
    teacher_kl: float = Field(1.0, ge=0, description="Weight of the KL from the teacher, the softened labels.")
    teacher_kl_end: float | None = Field(
        None, ge=0, description="Weight of the teacher at the end of the run, reached linearly; absent: constant.")
    teacher_temperature: float = Field(0.35, gt=0, description="Temperature of the teacher's softmax.")


class RoutingWatchSettings(Settings):
    """Usage, entropy and agreement with the labels over windows of steps, and thresholds for warnings."""

    every: int = Field(50, ge=1, description="Steps of the run in a window.")
    after: int = Field(100, ge=0, description="Steps before the first warning.")
    entropy: float | None = Field(
        None, ge=0, description="In nats; below: collapsed. Absent: 0.3 for four experts.")
    least_usage: float | None = Field(
        None, ge=0, le=1, description="Smallest usage of an expert; absent: 0.2 / E, 5 % for four experts.")
    most_usage: float | None = Field(
        None, ge=0, le=1, description="Largest usage of an expert; absent: 0.4 / E + 0.6, 70 % for four experts.")
    teacher_kl: float = Field(1.0, gt=0, description="In nats; above: diverged.")


class TrainMoeSettings(TrainSettings):
    """Stage 2: a mixture of LoRA experts, one for each family of the taxonomy, with a learned router."""

    taxonomy: str = Field(
        "surgical4", description="Families, with one expert each: surgical4, cholec6 or a TOML file.")
    base_lora: dict[NoiseExpert, Path] = Field(
        {}, description="A LoRA of stage 1 by noise expert, kept frozen beside the experts with the strength "
        "alpha_base. Older alternative to merging it into the base.")
    alpha_base: float = Field(1.0, description="Strength of base_lora in training.")
    init_lora: dict[NoiseExpert, Path] = Field(
        {}, description="LoRA by noise expert from which every expert is initialised, at the experts' ranks; for a "
        "base into which it is not merged.")
    shared_experts: bool = Field(
        False, description="One set of experts for both noise experts; false: a set for each. The router is shared.")
    expert_targets: dict[str, dict[str, Any]] = Field(
        {}, description="Overrides of [targets] by family, such as {hook = {q = 16}}.")
    expert_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability that an active expert is dropped for a clip; the others take over "
        "its share.")
    roi_weight: float = Field(3.0, ge=0, description="Weight of the loss over the clips' regions; 0: off.")
    router: RouterSettings = Field(default_factory=RouterSettings)
    timestep_gate: TimestepGateSettings = Field(default_factory=TimestepGateSettings)
    routing_loss: RoutingLossSettings = Field(default_factory=RoutingLossSettings)
    routing_watch: RoutingWatchSettings = Field(default_factory=RoutingWatchSettings)

    @model_validator(mode="after")
    def _experts(self) -> TrainMoeSettings:
        for name, loras in (("base_lora", self.base_lora), ("init_lora", self.init_lora)):
            for noise_expert in loras:
                if noise_expert not in self.noise_experts:
                    side = noise_expert.value
                    raise ValueError(f"{name}.{side} is given, but noise_experts does not include '{side}'")
        for family in self.expert_targets:
            self.targets_for(family, self.targets)
        if self.shared_experts:
            self._check_shared()
        return self

    def keys_of_two(self) -> list[str]:
        return [*super().keys_of_two(), *["shared_experts"] * self.shared_experts]

    def _check_shared(self) -> None:
        if len(self.noise_experts) < 2:
            raise ValueError("shared_experts = true needs both noise experts in noise_experts")
        if self.init_lora:
            raise ValueError("init_lora holds a LoRA for each noise expert, shared_experts one set for both; leave one "
                             "of them out")
        if self.alpha_schedule.phases:
            raise ValueError("alpha_schedule is for one noise expert; leave it or shared_experts out")
        shared = ("targets", "alpha", "optimizer", "schedule", "max_norm", "alpha_schedule")
        sides = [self.of(noise_expert, 1) for noise_expert in self.noise_experts]
        for name in shared:
            if getattr(sides[0], name) != getattr(sides[1], name):
                raise ValueError(f"shared_experts = true, but [high] and [low] differ in {name}; leave it out of them")

    def targets_for(self, family: str, shared: TargetSettings) -> TargetSettings:
        """A family's targets: `shared` with its overrides.

        Raises:
            ValueError: an unknown key or an invalid rank.
        """
        try:
            return TargetSettings.model_validate(override_targets(shared, self.expert_targets.get(family, {})))
        except ValidationError as error:
            raise ValueError(first_problem(error, TargetSettings, f"expert_targets.{family}")) from None
