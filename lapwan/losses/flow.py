"""The flow-matching loss on rectified paths, with which Wan2.2 is trained.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width. sigma in [0, 1], 1 = pure noise.
Source: Lipman et al., Flow Matching (arXiv 2210.02747); Liu et al., Rectified Flow (arXiv 2209.03003).
"""

from __future__ import annotations

from torch import Tensor


def per_sample(sigma_B: Tensor, like_BCTHW: Tensor) -> Tensor:
    """Values by sample, in the dtype of latents and to be multiplied with them: [B, 1, 1, 1, 1].

    Args:
        sigma_B: one value per sample, such as its sigma.
        like_BCTHW: latents, whose dtype and number of dimensions the result takes.
    """
    return sigma_B.to(like_BCTHW.dtype).view(-1, *[1] * (like_BCTHW.dim() - 1))


def add_noise(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_σ = σ·ε + (1 − σ)·x0, per sample.

    Args:
        x0_BCTHW: clean, normalised latents.
        noise_BCTHW: ε ~ N(0, I), of the same shape.
        sigma_B: noise level of each sample.

    Returns:
        [B, C, T, H, W] in the latents' dtype.
    """
    sigma = per_sample(sigma_B, x0_BCTHW)
    return sigma * noise_BCTHW + (1 - sigma) * x0_BCTHW


def velocity_target(x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """v = ε − x0, the derivative of x_σ in σ.

    Args:
        x0_BCTHW: clean, normalised latents.
        noise_BCTHW: the ε that they were mixed with.
    """
    return noise_BCTHW - x0_BCTHW


def squared_error(velocity_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Mean over channels of (v̂ − v)²: [B, T, H, W]; the prediction is cast to the target's dtype first.

    Args:
        velocity_BCTHW: v̂, the prediction.
        target_BCTHW: v, see `velocity_target`.
    """
    return (velocity_BCTHW.to(target_BCTHW.dtype) - target_BCTHW).square().mean(dim=1)


def flow_loss(error_BTHW: Tensor, counted_BT: Tensor | None = None) -> Tensor:
    """Mean squared velocity error of each sample: [B].

    Args:
        error_BTHW: see `squared_error`.
        counted_BT: 1 for the latent frames that count, 0 for those that are given clean; None: all count.
    """
    if counted_BT is None:
        return error_BTHW.flatten(1).mean(dim=1)
    counted = counted_BT.to(error_BTHW.dtype)
    return (error_BTHW.flatten(2).mean(dim=2) * counted).sum(dim=1) / counted.sum(dim=1)


def roi_loss(error_BTHW: Tensor, roi_BTHW: Tensor) -> Tensor:
    """L_roi = Σ m·e / Σ m over a region m in [0, 1] of each sample: [B], 0 for a sample with an empty region.

    Divided by the size of the region, so that a small instrument counts as much as a large one.

    Args:
        error_BTHW: see `squared_error`.
        roi_BTHW: m, the weight of each latent cell; 0 outside the region.
    """
    mass = roi_BTHW.flatten(1).sum(dim=1)
    weighted = (error_BTHW * roi_BTHW.to(error_BTHW.dtype)).flatten(1).sum(dim=1)
    return weighted / mass.clamp_min(1e-12)
