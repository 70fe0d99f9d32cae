"""How much a linear reader of the frozen text features can know of the instrument: the ceiling of any text router.

Ridge regression of one-hot instruments on mean-pooled features, W = (XᵀX + λI)⁻¹ XᵀY, decision by the largest output.
It is fitted on captions with some of the instruments' names and asked about captions with the others, all of which
occurred with pictures in pretraining. Any instrument has any motion and target, so only name and verb tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lapwan.tiny import motion as paths
from lapwan.tiny import targets
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
            direction=str(rng.choice(paths.MOTIONS[motion])), target=str(rng.choice(targets.TARGET_NAMES)),
        )
        found.append((caption_for(spec, rng), instrument))
    return found


def _pooled(features: Sequence[Tensor]) -> Tensor:
    mean = torch.stack([rows.double().mean(dim=0) for rows in features])
    return torch.cat([mean, torch.ones(len(mean), 1, dtype=torch.float64)], dim=1)


def probe_text(encode: Callable[[list[str]], Sequence[Tensor]], count: int = 1200, seed: int = 0) -> ProbeResult:
    """Fit and ask.

    Args:
        encode: captions to features [n tokens, D] each, as `lapwan.wan.text.encode_text` gives.
    """
    captions = probe_captions(count, seed)
    held_out = torch.tensor([any(name in text for name in HELD_OUT_NAMES) for text, _ in captions])
    named = torch.tensor([instrument for _, instrument in captions])
    x = _pooled(encode([text for text, _ in captions]))
    x = torch.cat([(x[:, :-1] - x[~held_out, :-1].mean(dim=0)) / x[~held_out, :-1].std(dim=0), x[:, -1:]], dim=1)
    known, wanted = x[~held_out], torch.eye(len(INSTRUMENTS), dtype=torch.float64)[named[~held_out]]
    ridge = _RIDGE * len(known) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(known.T @ known + ridge, known.T @ wanted)
    right = ((x @ weights).argmax(dim=1) == named).double()
    return ProbeResult(float(right[~held_out].mean()), float(right[held_out].mean()), count)
