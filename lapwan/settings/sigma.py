"""How sigma is drawn, and how the loss is weighted by it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lapwan.settings.base import Settings


class SigmaSettings(Settings):
    """A distribution over [0, 1], restricted to the noise expert's band."""

    sampler: Literal["uniform", "logit_normal", "sigmoid"] = Field(
        "uniform", description="uniform; logit_normal: sigmoid(mean + std·z); sigmoid: sigmoid(scale·z).")
    mean: float = Field(0.0, description="Of the logit, for logit_normal.")
    std: float = Field(1.0, gt=0, description="Of the logit, for logit_normal.")
    scale: float = Field(1.0, gt=0, description="Of z, for sigmoid.")
    shift: float | Literal["resolution"] = Field(
        1.0, description='s of s·σ/(1+(s−1)·σ), applied to the draw; 1: none; "resolution": by the size of the frame.')
    band: Literal["truncate", "squeeze"] = Field(
        "truncate", description="truncate: the distribution conditioned on the noise expert's band; squeeze: the "
        "whole distribution mapped onto the band.")
    strata: int = Field(1, ge=1, description="K visits in a row fall into K equal parts of the distribution; 1: off.")

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
    """Weight of the flow loss by sigma; its mean over the noise expert's own draws is 1."""

    kind: Literal["none", "x0", "min_snr", "cosmap"] = Field(
        "none", description="none; x0: σ², the clean latents' loss; min_snr: σ²·min(SNR, γ), SNR = ((1−σ)/σ)²; cosmap.")
    gamma: float = Field(5.0, gt=0, description="γ of min_snr.")


def refuse_ddpm_weighting(tree: Any, place: str = "") -> None:
    """Refuse `min_snr_gamma` wherever it stands.

    Raises:
        ValueError: it is there; with the reason, and what there is instead.
    """
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == "min_snr_gamma":
            raise ValueError(
                f"{place}min_snr_gamma is a weight for DDPM noise schedules (it reads alphas_cumprod, which flow "
                "matching does not have); leave it out, or weight the flow loss: weighting = {kind = \"min_snr\", "
                "gamma = 5.0} with SNR = ((1-sigma)/sigma)^2, \"x0\", \"cosmap\" or \"none\"")
        refuse_ddpm_weighting(value, f"{place}{key}.")
