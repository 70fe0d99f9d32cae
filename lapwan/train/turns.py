"""Which noise expert takes which optimiser step: a deterministic schedule, no state but the step number.

Steps are grouped into turns so that the idle expert can rest; a step never mixes noise experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lapwan.names import NoiseExpert

Window = tuple[int, int | None]  # steps of the run [start, stop) in which a noise expert has turns


def interleave(
    steps: Mapping[NoiseExpert, int], turn: int, windows: Mapping[NoiseExpert, Window] | None = None
) -> list[NoiseExpert]:
    """The noise expert of every optimiser step: blocks of `turn` steps, in proportion to what is left.

    With equal counts: `turn` steps high, `turn` steps low, and so on. With 1000 high and 500 low, two high turns come
    for each low one, so that both end together. A noise expert outside its window waits; if nobody else has steps
    left, the one that would start first starts at once, since a step of nobody makes no sense. Steps that do not fit
    before a `stop` are left out.
    """
    windows = windows or {}
    order: list[NoiseExpert] = []
    left = {expert: count for expert, count in steps.items() if count > 0}
    while any(left.values()):
        at = len(order)
        waiting = [e for e in left if left[e] and _stop(windows, e, at) > at]
        ready = [e for e in waiting if windows.get(e, (0, None))[0] <= at]
        if not waiting:
            break
        # The expert that is furthest from done goes next; ties go in the order given (high first).
        expert = max(ready, key=lambda e: left[e] / steps[e]) if ready else min(waiting, key=lambda e: windows[e][0])
        length = min(turn, left[expert], _stop(windows, expert, at) - at)
        order += [expert] * length
        left[expert] -= length
    return order


def _stop(windows: Mapping[NoiseExpert, Window], expert: NoiseExpert, at: int) -> int:
    stop = windows.get(expert, (0, None))[1]
    return at + 2**31 if stop is None else stop


def one_after_the_other(phases: Sequence[Mapping[NoiseExpert, int]], turn: int) -> list[NoiseExpert]:
    """Each phase's steps interleaved, one phase after the other: high 1000, low 1500, then both 100."""
    return [expert for phase in phases for expert in interleave(phase, turn)]
