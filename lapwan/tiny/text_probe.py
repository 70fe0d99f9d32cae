"""How much a linear reader of the frozen text features can know of the instrument: the ceiling of any text router.

Ridge regression of one-hot instruments on mean-pooled features, W = (XᵀX + λI)⁻¹ XᵀY, decision by the largest output.
It is fitted on captions with some of the instruments' names and asked about captions with the others, all of which
occurred with pictures in pretraining. Any instrument has any motion and target, so only name and verb tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lapwan.tiny import motion as paths
from lapwan.tiny import surgery
from lapwan.tiny.captions import caption_for
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import SceneSpec

# Captions with one of these names are for asking only.
HELD_OUT_NAMES = ("组织剪刀", "单极电凝钩", "吸引管", "无损伤抓钳", "a hook", "suction tip", "aparoscopic")
_RIDGE = 1e-2


@dataclass(frozen=True)
class ProbeResult:
    """Shares of captions whose instrument is read rightly."""

    fitted: float
    held_out: float
    captions: int


def probe_captions(count: int, seed: int) -> list[tuple[str, int]]:
    """(caption, index into INSTRUMENTS), instruments in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        instrument = index % len(INSTRUMENTS)
        motion = str(rng.choice(list(paths.MOTIONS)))
        spec = SceneSpec(
            INSTRUMENTS[instrument], side=str(rng.choice(list(paths.SIDES))), motion=motion,
            direction=str(rng.choice(paths.MOTIONS[motion])), target=str(rng.choice(surgery.TARGET_NAMES)),
        )
        found.append((caption_for(spec, rng), instrument))
    return found


def _pooled(features: Sequence[Tensor]) -> Tensor:
    return torch.stack([rows.double().mean(dim=0) for rows in features])


@dataclass(frozen=True)
class Probe:
    """W, and the mean and deviation of the features it was fitted on."""

    weights: Tensor
    mean: Tensor
    deviation: Tensor

    def answers(self, features: Sequence[Tensor]) -> np.ndarray:
        """[N] the class with the largest output."""
        found: np.ndarray = (self._inputs(_pooled(features)) @ self.weights).argmax(dim=1).numpy()
        return found

    def _inputs(self, pooled_ND: Tensor) -> Tensor:
        x = (pooled_ND - self.mean) / self.deviation
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def fit_probe(features: Sequence[Tensor], classes_N: Tensor, count: int) -> Probe:
    """Ridge regression of one-hot classes on standardised mean-pooled features with a constant.

    Args:
        features: [n tokens, D] each.
        classes_N: index of each one's class, of `count`.
    """
    pooled = _pooled(features)
    probe = Probe(torch.empty(0), pooled.mean(dim=0), pooled.std(dim=0))
    x, wanted = probe._inputs(pooled), torch.eye(count, dtype=torch.float64)[classes_N]
    ridge = _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return replace(probe, weights=torch.linalg.solve(x.T @ x + ridge, x.T @ wanted))


def probe_text(encode: Callable[[list[str]], Sequence[Tensor]], count: int = 1200, seed: int = 0) -> ProbeResult:
    """Fit and ask.

    Args:
        encode: captions to features [n tokens, D] each, as `lapwan.wan.text.encode_text` gives.
    """
    captions = probe_captions(count, seed)
    apart = np.array([any(name in text for name in HELD_OUT_NAMES) for text, _ in captions])
    named = np.array([instrument for _, instrument in captions])
    features = encode([text for text, _ in captions])
    known = [rows for rows, held_out in zip(features, apart, strict=True) if not held_out]
    probe = fit_probe(known, torch.from_numpy(named[~apart]), len(INSTRUMENTS))
    right = probe.answers(features) == named
    return ProbeResult(float(right[~apart].mean()), float(right[apart].mean()), count)
