"""HDR to SDR: PQ or HLG with BT.2020 primaries to gamma-coded BT.709, by the tone curve of ITU-R BT.2390.

Light is computed in cd/m². Sources: ITU-R BT.2100-2 (PQ, HLG), BT.2390-11 (EETF), BT.2087-0 (primaries), BT.2408-7
(reference white of 203 cd/m²), BT.1886 (display gamma 2.4).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SOURCE_PEAK = 1000.0  # cd/m² of the mastering display: nominal for HLG, usual for PQ
WHITE = 203.0  # cd/m² shown as SDR white
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_LUMA_2020 = (0.2627, 0.6780, 0.0593)
_TO_709 = ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187))
_SPLIT = 2**21  # values computed at a time, which bounds the memory of a large frame


def pq_to_light(signal: Tensor) -> Tensor:
    """10000 · (max(s^(1/m2) − c1, 0) / (c2 − c3·s^(1/m2)))^(1/m1), in cd/m²; s in [0, 1]."""
    power = signal.clamp(0, 1) ** (1 / _M2)
    return 10000 * ((power - _C1).clamp_min(0) / (_C2 - _C3 * power)) ** (1 / _M1)


def light_to_pq(light: Tensor) -> Tensor:
    """The inverse of `pq_to_light`."""
    power = (light.clamp_min(0) / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


def hlg_to_light(signal_N3: Tensor) -> Tensor:
    """Scene light e = s²/3 up to s = 1/2, (exp((s − c)/a) + b)/12 above; shown 1000 · Y^0.2 · e, in cd/m²."""
    signal_N3 = signal_N3.clamp(0, 1)
    scene = torch.where(signal_N3 <= 0.5, signal_N3**2 / 3, (torch.exp((signal_N3 - _C) / _A) + _B) / 12)
    luma = (scene * scene.new_tensor(_LUMA_2020)).sum(-1, keepdim=True)
    return SOURCE_PEAK * luma**0.2 * scene


def eetf(light: Tensor) -> Tensor:
    """BT.2390's curve from 0..1000 to 0..203 cd/m²: unchanged below a knee, a Hermite spline in PQ above it."""
    peak = light_to_pq(light.new_tensor(SOURCE_PEAK))
    target = light_to_pq(light.new_tensor(WHITE)) / peak
    signal = (light_to_pq(light) / peak).clamp_max(1)
    knee = 1.5 * target - 0.5
    t = ((signal - knee) / (1 - knee)).clamp_min(0)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * target
    return pq_to_light(torch.where(signal < knee, signal, spline) * peak)


def tone_mapped(pixels_HW3: np.ndarray, transfer: str) -> np.ndarray:
    """uint8 [H, W, 3] BT.709 of uint16 R'G'B' with BT.2020 primaries.

    The curve is applied to the largest of R, G, B and scales all three, which keeps hue; colours outside BT.709 are
    clipped after the matrix.

    Args:
        transfer: PQ or HLG.
    """
    flat = torch.from_numpy(np.ascontiguousarray(pixels_HW3).astype(np.float32) / 65535).reshape(-1, 3)
    mapped = torch.cat([_mapped(part, transfer) for part in torch.split(flat, _SPLIT)])
    out: np.ndarray = (mapped * 255).round().to(torch.uint8).reshape(pixels_HW3.shape).numpy()
    return out


def _mapped(signal_N3: Tensor, transfer: str) -> Tensor:
    light = pq_to_light(signal_N3) if transfer == "PQ" else hlg_to_light(signal_N3)
    largest = light.amax(-1, keepdim=True).clamp_min(1e-6)
    linear = light * (eetf(largest) / largest) / WHITE
    sdr: Tensor = (linear @ linear.new_tensor(_TO_709).T).clamp(0, 1) ** (1 / 2.4)
    return sdr
