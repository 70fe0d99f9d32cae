"""How alike two videos are, pixel by pixel. Shapes: T frames, H, W pixels, uint8 RGB [T, H, W, 3]."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
PSNR_CAP = 100.0  # dB, of equal pictures: a mean over videos stays finite


def psnr(a_THWC: np.ndarray, b_THWC: np.ndarray, region_THW: np.ndarray | None = None) -> float:
    """10·log10(255² / MSE) in dB over all frames, at most 100; `region_THW` weighs the pixels."""
    error_THW = np.square(a_THWC.astype(np.float64) - b_THWC.astype(np.float64)).mean(axis=-1)
    mse = float(error_THW.mean() if region_THW is None else (error_THW * region_THW).sum() / region_THW.sum())
    return PSNR_CAP if mse == 0 else min(PSNR_CAP, float(10 * np.log10(255.0**2 / mse)))


def _luma(frames_THWC: np.ndarray) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    return (torch.from_numpy(np.ascontiguousarray(frames_THWC)).double() @ weights).unsqueeze(1)


def _blur(x_T1HW: Tensor) -> Tensor:
    at = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-at.square() / (2 * _SIGMA**2))
    line = (line / line.sum()).view(1, 1, 1, -1)
    pad = _WINDOW // 2
    x_T1HW = F.pad(x_T1HW, (pad, pad, pad, pad), mode="replicate")
    return F.conv2d(F.conv2d(x_T1HW, line), line.transpose(2, 3))


def ssim_map(a_THWC: np.ndarray, b_THWC: np.ndarray) -> np.ndarray:
    """SSIM of the luma at every pixel [T, H, W], Gaussian window of 11 pixels, σ = 1.5, edges repeated.

        (2·μ_a·μ_b + C1)(2·σ_ab + C2) / ((μ_a² + μ_b² + C1)(σ_a² + σ_b² + C2))

    Source: Wang et al., Image quality assessment (IEEE TIP 2004).
    """
    a, b = _luma(a_THWC), _luma(b_THWC)
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a.square(), _blur(b * b) - mean_b.square()
    covariance = _blur(a * b) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    found: np.ndarray = (similar / ((mean_a.square() + mean_b.square() + _C1) * (var_a + var_b + _C2)))[:, 0].numpy()
    return found
