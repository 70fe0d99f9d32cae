"""The distribution of sigma in training, and the weight of the loss by sigma."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Settings


class SigmaSettings(Settings):
    """A distribution over [0, 1], restricted to the noise expert's band."""

    sampler: Literal["uniform", "logit_normal", "sigmoid"] = Field(
        "uniform", description="uniform; logit_normal: sigmoid(mean + std·z); sigmoid: sigmoid(scale·z).")
    mean: float = Field(0.0, description="For logit_normal: mean of the logit.")
    std: float = Field(1.0, gt=0, description="For logit_normal: standard deviation of the logit.")
    scale: float = Field(1.0, gt=0, description="For sigmoid: factor of z.")
    shift: float | Literal["resolution"] = Field(
        1.0, description='s of s·σ/(1+(s−1)·σ), applied to the draw; 1: none; "resolution": by the frame size.')
    band: Literal["truncate", "squeeze"] = Field(
        "truncate", description="truncate: the distribution conditioned on the noise expert's band; squeeze: the "
        "whole distribution mapped onto the band.")
    strata: int = Field(1, ge=1, description="Stratified draws: K consecutive draws fall into K equal parts of the "
                                             "distribution; 1: off.")

    @model_validator(mode="after")
    def _used(self) -> SigmaSettings:
        owners = {"mean": "logit_normal", "std": "logit_normal", "scale": "sigmoid"}
        for name, owner in owners.items():
            if self.sampler != owner and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name):g} is for sampler = \"{owner}\", but sampler = "
                                 f"\"{self.sampler}\"; change one of them")
        if not isinstance(self.shift, str) and not self.shift > 0:
            raise ValueError(f"shift = {self.shift:g} must be above 0, or \"resolution\"")
        return self


class WeightingSettings(Settings):
    """Weight of the flow loss by sigma; its mean over the noise expert's sigma distribution is 1."""

    kind: Literal["none", "x0", "min_snr", "cosmap"] = Field(
        "none", description="none; x0: σ², the loss of the clean latents; min_snr: σ²·min(SNR, γ), SNR = ((1−σ)/σ)²; "
        "cosmap.")
    gamma: float = Field(5.0, gt=0, description="For min_snr: γ.")


def refuse_ddpm_weighting(tree: Any, prefix: str = "") -> None:
    """Refuse the key `min_snr_gamma` at any depth; `prefix` is the dotted key of `tree`.

    Raises:
        ValueError: the key is given; the message says why, and what to use instead.
    """
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == "min_snr_gamma":
            raise ValueError(
                f"{prefix}min_snr_gamma is a weight for DDPM noise schedules (it reads alphas_cumprod, which flow "
                "matching does not have); leave it out, or weight the flow loss: weighting = {kind = \"min_snr\", "
                "gamma = 5.0} with SNR = ((1-sigma)/sigma)^2, \"x0\", \"cosmap\" or \"none\"")
        refuse_ddpm_weighting(value, f"{prefix}{key}.")
