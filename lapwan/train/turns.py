"""Which noise expert takes which optimiser step: a deterministic schedule, no state but the step number.

Steps are grouped into turns so that the idle expert can rest; a step never mixes noise experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from lapwan.names import NoiseExpert


def interleave(steps: Mapping[NoiseExpert, int], turn: int) -> list[NoiseExpert]:
    """The noise expert of every optimiser step: blocks of `turn` steps, in proportion to what is left.

    With equal counts: `turn` steps high, `turn` steps low, and so on. With 1000 high and 500 low, two high turns come
    for each low one, so that both end together.
    """
    order: list[NoiseExpert] = []
    left = {expert: count for expert, count in steps.items() if count > 0}
    while any(left.values()):
        # The expert that is furthest from done goes next; ties go in the order given (high first).
        expert = max(left, key=lambda e: left[e] / steps[e])
        length = min(turn, left[expert])
        order += [expert] * length
        left[expert] -= length
    return order
