"""Captions that name no instrument: how it moves and what it does to what, in words of the scenes' captions.

Every word occurred with pictures in pretraining (they are `lapwan.tiny.captions`' own), none is a keyword of the
taxonomy: the name is left out, and verbs that are keywords too. What is left (verb, motion, target) still tells.
"""

from __future__ import annotations

import numpy as np

from lapwan.data.labels import CaptionLabeller
from lapwan.data.taxonomy import load_taxonomy
from lapwan.tiny.captions import describe_action
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import sample_spec

_TRIES = 200


def paraphrases(count: int, seed: int) -> list[tuple[str, str]]:
    """(caption, instrument), instruments in turn; every caption is checked to hold no keyword.

    Raises:
        ValueError: an instrument without such captions.
    """
    resolver, rng = CaptionLabeller(load_taxonomy("surgical4")), np.random.default_rng([seed, 77])
    captions: list[tuple[str, str]] = []
    while len(captions) < count:
        instrument = INSTRUMENTS[len(captions) % len(INSTRUMENTS)]
        for _ in range(_TRIES):
            text = describe_action(sample_spec(rng, instrument), rng)
            if all(mention.action for mention in resolver.label(text).mentions):
                captions.append((text, instrument))
                break
        else:
            raise ValueError(f"no caption without a keyword for '{instrument}'")
    return captions
