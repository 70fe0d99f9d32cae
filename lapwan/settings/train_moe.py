"""Settings of `lapwan train-moe`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from lapwan.names import NoiseExpert
from lapwan.settings.base import Settings
from lapwan.settings.train import TrainSettings


class RouterSettings(Settings):
    """From a clip's text (or label) to a probability for each expert."""

    kind: Literal["text", "label", "rule"] = Field(
        "text", description="text: learns from text features; label: learns from labels; rule: labels themselves.")
    temperature: float = Field(1.0, gt=0, description="Of the router's softmax.")
    top_k: int = Field(2, ge=1, description="Experts that act on a clip.")
    lr_scale: float = Field(10.0, gt=0, description="The router's lr over the experts'.")


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
    teacher_temperature: float = Field(0.35, gt=0)


class TrainMoeSettings(TrainSettings):
    """Stage 2: a mixture of LoRA experts, one a family of the taxonomy, with a learned router."""

    taxonomy: str = Field("surgical4", description="surgical4, cholec6 or a TOML file: the families, one expert each.")
    base_lora: dict[NoiseExpert, Path] = Field(
        {}, description="Older road: a stage-1 LoRA by noise expert, kept frozen beside the experts (alpha_base).")
    alpha_base: float = Field(1.0, description="Strength of base_lora in training.")
    roi_weight: float = Field(3.0, ge=0, description="Weight of the loss over the clips' regions; 0: off.")
    router: RouterSettings = RouterSettings()
    timestep_gate: TimestepGateSettings = TimestepGateSettings()
    routing_loss: RoutingLossSettings = RoutingLossSettings()
