"""Captions of scenes for the linear probe of text features, `lapwan.evaluation.routing.ProbeSet`.

It is fitted on captions with some of the instruments' names and asked about captions with the others, all of which
occurred with pictures in pretraining. Any instrument has any motion and target, so only name and verb tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from lapwan.evaluation.routing import ProbeCaption, ProbeResult, ProbeSet, measure_probe
from lapwan.tiny import motion as paths
from lapwan.tiny import surgery
from lapwan.tiny.captions import caption_for
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import SceneSpec

# Captions with one of these names are for asking only.
HELD_OUT_NAMES = ("组织剪刀", "单极电凝钩", "吸引管", "无损伤抓钳", "a hook", "suction tip", "aparoscopic")


def probe_captions(count: int = 1200, seed: int = 0) -> ProbeSet:
    """Captions of scenes, instruments in turn, under the name "synthetic"."""
    rng = np.random.default_rng(seed)
    captions = []
    for index in range(count):
        instrument = INSTRUMENTS[index % len(INSTRUMENTS)]
        motion = str(rng.choice(list(paths.MOTIONS)))
        spec = SceneSpec(
            instrument, side=str(rng.choice(list(paths.SIDES))), motion=motion,
            direction=str(rng.choice(paths.MOTIONS[motion])), target=str(rng.choice(surgery.TARGET_NAMES)),
        )
        text = caption_for(spec, rng)
        captions.append(ProbeCaption(text, instrument, any(name in text for name in HELD_OUT_NAMES)))
    return ProbeSet("synthetic", tuple(captions))


def probe_text(encode: Callable[[list[str]], Sequence[Tensor]], count: int = 1200, seed: int = 0) -> ProbeResult:
    """Fit and ask.

    Args:
        encode: captions to features [n tokens, D] each, as `lapwan.wan.text.encode_text` gives.
    """
    captions = probe_captions(count, seed).captions
    return measure_probe(captions, encode([caption.text for caption in captions]))
