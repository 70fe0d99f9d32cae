"""The flow-matching loss on rectified paths, with which Wan2.2 is trained.

Shapes: B samples, C latent channels, T latent frames, H, W latent height and width. sigma in [0, 1], 1 = pure noise.
Source: Lipman et al., Flow Matching (arXiv 2210.02747); Liu et al., Rectified Flow (arXiv 2209.03003).
"""

from __future__ import annotations

from torch import Tensor


def per_sample(sigma_B: Tensor, like_BCTHW: Tensor) -> Tensor:
    """Values by sample, in the dtype of latents and to be multiplied with them: [B, 1, 1, 1, 1]."""
    return sigma_B.to(like_BCTHW.dtype).view(-1, *[1] * (like_BCTHW.dim() - 1))


def add_noise(x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_σ = σ·ε + (1 − σ)·x0, per sample."""
    sigma = per_sample(sigma_B, x0_BCTHW)
    return sigma * noise_BCTHW + (1 - sigma) * x0_BCTHW


def velocity_target(x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """v = ε − x0, the derivative of x_σ in σ."""
    return noise_BCTHW - x0_BCTHW


def squared_error(velocity_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
    """Mean over channels of (v̂ − v)²: [B, T, H, W]; the prediction is cast to the target's dtype first."""
    return (velocity_BCTHW.to(target_BCTHW.dtype) - target_BCTHW).square().mean(dim=1)


def flow_loss(error_BTHW: Tensor) -> Tensor:
    """Mean squared velocity error of each sample: [B]."""
    return error_BTHW.flatten(1).mean(dim=1)


def roi_loss(error_BTHW: Tensor, roi_BTHW: Tensor) -> tuple[Tensor, Tensor]:
    """L_roi = Σ m·e / Σ m over a region m in [0, 1] of each sample.

    Divided by the size of the region, so that a small instrument counts as much as a large one.

    Returns:
        ([B] losses, 0 for a sample with an empty region; [B] bool, False for an empty region).
    """
    mass = roi_BTHW.flatten(1).sum(dim=1)
    present = mass > 0
    weighted = (error_BTHW * roi_BTHW.to(error_BTHW.dtype)).flatten(1).sum(dim=1)
    return weighted / mass.clamp_min(1e-12) * present, present
