"""Settings of `lapwan train-moe`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from lapwan.names import NoiseExpert
from lapwan.settings.base import Settings
from lapwan.settings.targets import TargetSettings, lay_over
from lapwan.settings.train import TrainSettings


class RouterSettings(Settings):
    """From a clip's text (or label) to a probability for each expert."""

    kind: Literal["text", "linear", "label", "rule"] = Field(
        "text", description="text: learns from text features; linear: the same without hidden layers, for few "
        "captions; label: learns from labels; rule: labels themselves.")
    temperature: float = Field(1.0, gt=0, description="Of the router's softmax.")
    top_k: int = Field(2, ge=1, description="Experts that act on a clip.")
    lr_scale: float = Field(10.0, gt=0, description="The router's lr over the experts'.")
    sigma: bool = Field(False, description="The router sees the noise level too.")
    gate_ema: float = Field(
        0.0, ge=0, lt=1, description="With sigma: how much of the last denoising step's gates stays, at generation.")

    @model_validator(mode="after")
    def _sigma(self) -> RouterSettings:
        if self.sigma and self.kind == "rule":
            raise ValueError('sigma = true has no effect on kind = "rule", whose gates are the labels; leave it out')
        if self.gate_ema and not self.sigma:
            raise ValueError(f"gate_ema = {self.gate_ema:g} smooths gates over denoising steps, which are constant "
                             "unless sigma = true; leave it out, or set sigma")
        return self


class TimestepGateSettings(Settings):
    """w(σ): how strongly the experts act at each noise level."""

    knots: int = Field(8, ge=2, description="Of the piecewise linear curve, over the noise expert's band.")
    lr_scale: float = Field(10.0, gt=0, description="The gate's lr over the experts'.")


class RoutingLossSettings(Settings):
    """Weights of the routing terms."""

    entropy: float = Field(0.02, ge=0)
    entropy_floor: float = Field(0.5, ge=0, description="nats; the entropy term acts below it.")
    balance: float = Field(0.1, ge=0)
    usage_decay: float = Field(0.99, ge=0, lt=1, description="Of the running mean of usage, per step.")
    teacher_kl: float = Field(1.0, ge=0)
    teacher_kl_end: float | None = Field(
        None, ge=0, description="Weight of the teacher at the end of the run, reached in a straight line; absent: "
        "constant.")
    teacher_temperature: float = Field(0.35, gt=0)


class RoutingWatchSettings(Settings):
    """Usage, entropy and agreement with the labels over windows of steps, and warnings about them."""

    every: int = Field(50, ge=1, description="Steps of the run in a window.")
    after: int = Field(100, ge=0, description="Steps before a window is judged.")
    entropy: float | None = Field(None, ge=0, description="nats; below: collapsed. Absent: 0.3 for four experts.")
    least_usage: float | None = Field(None, ge=0, le=1, description="Absent: 0.2 / E, 5 % for four experts.")
    most_usage: float | None = Field(
        None, ge=0, le=1, description="Absent: 0.4 / E + 0.6, 70 % for four experts.")
    teacher_kl: float = Field(1.0, gt=0, description="nats; above: diverged.")


class TrainMoeSettings(TrainSettings):
    """Stage 2: a mixture of LoRA experts, one a family of the taxonomy, with a learned router."""

    taxonomy: str = Field("surgical4", description="surgical4, cholec6 or a TOML file: the families, one expert each.")
    base_lora: dict[NoiseExpert, Path] = Field(
        {}, description="Older road: a stage-1 LoRA by noise expert, kept frozen beside the experts (alpha_base).")
    alpha_base: float = Field(1.0, description="Strength of base_lora in training.")
    init_lora: dict[NoiseExpert, Path] = Field(
        {}, description="LoRA by noise expert that every expert starts as, at the experts' own ranks; for a base that "
        "does not have it merged.")
    shared_experts: bool = Field(
        False, description="One set of experts for both noise experts; absent: a set for each. The router is shared.")
    expert_targets: dict[str, dict[str, Any]] = Field(
        {}, description="What differs from [targets] by family, such as {hook = {q = 16}}.")
    expert_dropout: float = Field(
        0.0, ge=0, lt=1, description="Probability that an acting expert sits a clip out; the others take its share.")
    roi_weight: float = Field(3.0, ge=0, description="Weight of the loss over the clips' regions; 0: off.")
    router: RouterSettings = Field(default_factory=RouterSettings)
    timestep_gate: TimestepGateSettings = Field(default_factory=TimestepGateSettings)
    routing_loss: RoutingLossSettings = Field(default_factory=RoutingLossSettings)
    routing_watch: RoutingWatchSettings = Field(default_factory=RoutingWatchSettings)

    @model_validator(mode="after")
    def _experts(self) -> TrainMoeSettings:
        for name, given in (("base_lora", self.base_lora), ("init_lora", self.init_lora)):
            for noise_expert in given:
                if noise_expert not in self.noise_experts:
                    raise ValueError(f"{name}.{noise_expert.value} is given, but experts does not hold '{noise_expert.value}'")
        for family in self.expert_targets:
            self.targets_for(family, self.targets)
        if self.shared_experts:
            self._check_shared()
        return self

    def _check_shared(self) -> None:
        if len(self.noise_experts) < 2:
            raise ValueError("shared_experts = true needs both noise experts in experts")
        if self.init_lora:
            raise ValueError("init_lora holds a LoRA for each noise expert, shared_experts one set for both; leave one "
                             "of them out")
        if self.alpha_schedule.phases:
            raise ValueError("alpha_schedule is of one noise expert; leave it or shared_experts out")
        shared = ("targets", "alpha", "optimizer", "schedule", "max_norm", "alpha_schedule")
        sides = [self.of(noise_expert, 1) for noise_expert in self.noise_experts]
        for name in shared:
            if getattr(sides[0], name) != getattr(sides[1], name):
                raise ValueError(f"shared_experts = true, but [high] and [low] differ in {name}; leave it out of them")

    def targets_for(self, family: str, shared: TargetSettings) -> TargetSettings:
        """A family's targets: `shared` with its own laid over them.

        Raises:
            ValueError: an unknown key or a wrong rank.
        """
        try:
            return TargetSettings.model_validate(lay_over(shared, self.expert_targets.get(family, {})))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(["expert_targets", family, *map(str, first["loc"])])
            raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None
