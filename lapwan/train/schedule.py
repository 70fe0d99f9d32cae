"""Which noise expert each optimizer step trains: the turns of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lapwan.names import NoiseExpert

TurnWindow = tuple[int, int | None]  # steps of the run [start, stop) in which a noise expert has turns


def interleave(
    steps: Mapping[NoiseExpert, int], turn: int, windows: Mapping[NoiseExpert, TurnWindow] | None = None
) -> list[NoiseExpert]:
    """The noise expert of every optimizer step: turns of `turn` steps, in proportion to the steps that are left.

    With equal counts: `turn` steps high, `turn` steps low, and so on. With 1000 high and 500 low, there are two high
    turns for each low one, so that both end together. A noise expert outside its window waits. If no other one has
    steps left, the one whose window starts first starts at once, so that no step is empty. Steps that do not fit before
    a `stop` are left out.

    Args:
        steps: optimizer steps of each noise expert.
        windows: steps of the run [start, stop) in which a noise expert may have turns; without one: always.
    """
    windows = windows or {}
    order: list[NoiseExpert] = []
    left = {noise_expert: count for noise_expert, count in steps.items() if count > 0}
    while any(left.values()):
        at = len(order)
        candidates = [e for e in left if left[e] and _stop(windows, e, at) > at]
        ready = [e for e in candidates if windows.get(e, (0, None))[0] <= at]
        if not candidates:
            break
        # The noise expert with the largest share of its steps left is next; ties go in the order given (high first).
        if ready:
            noise_expert = max(ready, key=lambda e: left[e] / steps[e])
        else:
            noise_expert = min(candidates, key=lambda e: windows[e][0])
        length = min(turn, left[noise_expert], _stop(windows, noise_expert, at) - at)
        order += [noise_expert] * length
        left[noise_expert] -= length
    return order


def _stop(windows: Mapping[NoiseExpert, TurnWindow], noise_expert: NoiseExpert, at: int) -> int:
    stop = windows.get(noise_expert, (0, None))[1]
    return at + 2**31 if stop is None else stop


def one_after_the_other(phases: Sequence[Mapping[NoiseExpert, int]], turn: int) -> list[NoiseExpert]:
    """The turns of consecutive phases, each interleaved: high 1000, low 1500, then both 100."""
    return [noise_expert for phase in phases for noise_expert in interleave(phase, turn)]
