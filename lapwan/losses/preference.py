"""Preference alignment of a flow model: Direct-Align's one-step recovery and the relative preference of rewards.

The clean x0 and the noise ε of its path are known, so one prediction v̂ at σ_e gives an estimate of x0 whose error is
the error of v̂ times a small gain: rewards can be differentiated at any noise level. Two branches: *denoise* predicts at
σ_e > σ* and steps down to σ*, *inversion* predicts at σ_e < σ* and steps up to it. The gain has opposite signs in the
two, and so has the preference (see `relative_preference`): both push v̂ in the same direction.

Shapes: B samples, D dimensions of an embedding, C latent channels, T latent frames, H, W latent height and width. sigma
in [0, 1], 1 = pure noise. Latents are fp32 or fp64; half precision is refused, since bf16 alone changes x̂0 by 0.08.
Source: Semantic Relative Preference Optimization (arXiv 2509.06942), restated; rectified flow as in `losses.flow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lapwan.losses.flow import per_sample

MARGIN = 0.7  # of the hinge, on cosines


def _exact_per_sample(value_B: Tensor, like_BCTHW: Tensor) -> Tensor:
    if like_BCTHW.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents in {like_BCTHW.dtype}; the recovery needs fp32 or fp64")
    return per_sample(value_B.to(like_BCTHW.device), like_BCTHW)


def draw_sigmas(
    u_B2: Tensor, denoise_B: Tensor, low: float, high: float, reach: float
) -> tuple[Tensor, Tensor]:
    """(σ_e, σ*), both in [low, high] and |σ_e − σ*| in (0, reach]: [B] each, in the dtype of the draws.

    d = reach·(1 − u_1); the lower of the two is low + u_0·(high − low − d). σ_e is the upper one in the denoise branch,
    the lower one in inversion.

    Args:
        u_B2: uniform in [0, 1).
        denoise_B: bool, True for the denoise branch.
        low: lower end of the trained interval.
        high: upper end, below 1.
        reach: largest distance of the two sigmas.

    Raises:
        ValueError: not 0 <= low < high < 1, or reach not in (0, high − low].
    """
    if not 0 <= low < high < 1:
        raise ValueError(f"the interval [{low:g}, {high:g}] must satisfy 0 <= low < high < 1")
    if not 0 < reach <= high - low:
        raise ValueError(f"reach = {reach:g} must lie in (0, {high - low:g}], the interval's length")
    distance_B = reach * (1 - u_B2[:, 1])
    lower_B = low + u_B2[:, 0] * (high - low - distance_B)
    upper_B = (lower_B + distance_B).clamp(max=high)  # rounding must not leave the band
    return torch.where(denoise_B, upper_B, lower_B), torch.where(denoise_B, lower_B, upper_B)


def euler_step(x_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma_from_B: Tensor, sigma_to_B: Tensor) -> Tensor:
    """x* = x + (σ* − σ_e)·v̂: one Euler step, in x's dtype.

    Args:
        x_BCTHW: latents at σ_e, fp32 or fp64.
        velocity_BCTHW: v̂ = model(x, σ_e), in any dtype.
        sigma_from_B, sigma_to_B: σ_e and σ*.

    Raises:
        ValueError: latents in half precision.
    """
    step = _exact_per_sample(sigma_to_B - sigma_from_B, x_BCTHW)
    return x_BCTHW + step * velocity_BCTHW.to(x_BCTHW.dtype)


def x0_from_noise(x_star_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_star_B: Tensor) -> Tensor:
    """x̂0 = (x* − σ*·ε) / (1 − σ*): exact on the path between x0 and ε; σ* < 1.

    Args:
        x_star_BCTHW: latents at σ*, fp32 or fp64.
        noise_BCTHW: ε of the sample's path.
        sigma_star_B: σ* in [0, 1).

    Raises:
        ValueError: latents in half precision.
    """
    sigma = _exact_per_sample(sigma_star_B, x_star_BCTHW)
    return (x_star_BCTHW - sigma * noise_BCTHW) / (1 - sigma)


def predict_x0(
    x_BCTHW: Tensor, noise_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma_e_B: Tensor, sigma_star_B: Tensor
) -> Tensor:
    """x̂0 from x = σ_e·ε + (1 − σ_e)·x0 and v̂ = model(x, σ_e), through x*; differentiable in v̂.

    An error of v̂ is multiplied by g: x̂0 = x0 + g·(v̂ − (ε − x0)), g = (σ* − σ_e) / (1 − σ*), below 0 in the denoise
    branch and above 0 in inversion.

    Args:
        x_BCTHW: latents at σ_e, fp32 or fp64.
        noise_BCTHW: ε of the sample's path.
        velocity_BCTHW: v̂ = model(x, σ_e), with gradient.
        sigma_e_B, sigma_star_B: see `draw_sigmas`.

    Raises:
        ValueError: latents in half precision.
    """
    return x0_from_noise(euler_step(x_BCTHW, velocity_BCTHW, sigma_e_B, sigma_star_B), noise_BCTHW, sigma_star_B)


def discount(sigma_star_B: Tensor, low: float, high: float, at_low: float, at_high: float) -> Tensor:
    """k(σ*) = at_low + (at_high − at_low)·(σ* − low)/(high − low): [B]; either end may be negative.

    Args:
        sigma_star_B: the target noise level of each sample.
        low, high: the trained interval of sigma.
        at_low, at_high: the discount at its ends.
    """
    return at_low + (at_high - at_low) * (sigma_star_B - low) / (high - low)


@dataclass(frozen=True)
class Preference:
    """One reward of a batch, [B] each: cosines with the positive and the negative text, and R of the loss."""

    positive_B: Tensor
    negative_B: Tensor
    relative_B: Tensor

    @property
    def margin_B(self) -> Tensor:
        """⟨e, e_P⟩ − ⟨e, e_N⟩, without discount or branch: the figure to monitor."""
        return self.positive_B - self.negative_B


def relative_preference(
    image_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, discount_B: Tensor, denoise_B: Tensor
) -> Preference:
    """R = ⟨e, (1 + k)·e_P − e_N⟩ in the denoise branch; P and N swapped in inversion.

    With x̂0 = x0 ∓ c·(v̂ − v) the gradient of R in v̂ is −c·J^T((1 + k)·e_P − e_N) and +c·J^T((1 + k)·e_N − e_P): equal at
    k = 0, and so of the same sign for small k. R is linear in e: a video's embedding is the mean over its frames,
    without normalising it again.

    Args:
        image_BD: unit-norm embeddings (or means of them) with gradient.
        positive_BD, negative_BD: unit-norm embeddings of "word. caption", one per sample.
        discount_B: k of each sample's branch.
        denoise_B: bool, True for the denoise branch.
    """
    positive_B = (image_BD * positive_BD.to(image_BD)).sum(dim=-1)
    negative_B = (image_BD * negative_BD.to(image_BD)).sum(dim=-1)
    preferred_B = torch.where(denoise_B, positive_B, negative_B)
    other_B = torch.where(denoise_B, negative_B, positive_B)
    return Preference(positive_B, negative_B, (1 + discount_B.to(image_BD)) * preferred_B - other_B)


def hinge(relative_B: Tensor, margin: float = MARGIN) -> Tensor:
    """relu(margin − R): [B]. R is of cosines: with a logit scale in R the hinge would be 0 from the start.

    Args:
        relative_B: R, see `relative_preference`.
        margin: the R above which a sample has no gradient.
    """
    return (margin - relative_B).relu()


def preference_loss(
    preferences: Mapping[str, Preference], weights: Mapping[str, float], margin: float = MARGIN
) -> Tensor:
    """Σ_r w_r·relu(margin − R_r) / Σ_r w_r over rewards r: [B].

    Each reward has its own hinge, so that a satisfied one does not offset another.

    Args:
        preferences: by reward.
        weights: w_r by reward, under the same names; their sum is above 0.
        margin: see `hinge`.

    Raises:
        ValueError: see `weighted_mean`.
    """
    return weighted_mean({name: hinge(item.relative_B, margin) for name, item in preferences.items()}, weights)


def weighted_mean(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_r w_r·value_r / Σ_r w_r over rewards r.

    Args:
        values: one tensor per reward, all of one shape.
        weights: w_r by reward.

    Raises:
        ValueError: the two do not name the same rewards, or the weights do not sum to more than 0.
    """
    total = sum(weights.values())
    if values.keys() != weights.keys() or not total > 0:
        raise ValueError(f"weights {dict(weights)} for rewards {', '.join(values)}: give one weight per reward, with a "
                         "sum above 0")
    return torch.stack([value * (weights[name] / total) for name, value in values.items()]).sum(dim=0)
