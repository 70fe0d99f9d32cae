"""Steps that keep what the last one computed: only the first block runs, and its change says how far off that is.

A step's blocks add  R = x_end − x_first  to what the first block gives. Between neighbouring steps R changes little,
and how little is foreseen by the first block's own change
    c = ‖r − r'‖ / ‖r'‖,  r = x_first − x_in  now,  r' at the last step that was computed.
At every computed step the error that keeping R' would have made in the velocity is known,
    e = ‖v − v(x_first + R')‖ / ‖v‖,
and with it the ratio e / c of this transformer at these steps of this video. The next step, with its change c₁, is kept
where (e / c)·c₁ is at most the tolerance. Approximate, and off unless asked for.

Source of the idea: first-block cache (ParaAttention; diffusers' FirstBlockCache), whose threshold is on c and is found
by trial for each model; here the tolerance is on the error, and the steps find the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lapwan.wan.transformer.context_parallel import TokenShards


@dataclass
class _Kept:
    """The last computed step of a sequence of evaluations, and what it taught."""

    first: Tensor | None = None
    rest: Tensor | None = None
    change: float = 0.0
    ratio: float | None = None


@dataclass
class FirstBlockCache:
    """A noise expert's steps of one video: `errors` as they were at computed steps, `foreseen` those of kept ones."""

    tolerance: float
    errors: list[float] = field(default_factory=list)
    foreseen: list[float] = field(default_factory=list)
    _sides: dict[str, _Kept] = field(default_factory=dict)

    def side(self, name: str) -> Side:
        """One side of guidance, or both as a batch: each follows its own steps."""
        return Side(self, self._sides.setdefault(name, _Kept()))

    def __str__(self) -> str:
        told = [f"{len(self.foreseen)} evaluations of the blocks spared"]
        if self.foreseen:
            told.append(f"their velocity's relative error foreseen at {max(self.foreseen):.3f} or less")
        if self.errors:
            told.append(f"at the computed steps keeping would have made it {sum(self.errors) / len(self.errors):.3f}")
        return "; ".join(told)


@dataclass(frozen=True)
class Side:
    """What the forward asks and tells."""

    reuse: FirstBlockCache
    kept: _Kept

    def end(self, x_in: Tensor, x_first: Tensor, split: TokenShards | None = None) -> Tensor | None:
        """x_end if R may be kept, else None, alike in all processes that share the tokens; waits for the device."""
        kept, first = self.kept, x_first - x_in
        if kept.first is None or kept.rest is None or kept.first.shape != first.shape:
            kept.first, kept.rest, kept.ratio = first, None, None
            return None
        kept.change = _relative(first - kept.first, kept.first, split)
        foreseen = None if kept.ratio is None else kept.ratio * kept.change
        if foreseen is not None and foreseen <= self.reuse.tolerance:
            self.reuse.foreseen.append(foreseen)
            return x_first + kept.rest
        kept.first = first
        return None

    def computed(
        self, x_first: Tensor, x_end: Tensor, head: Callable[[Tensor], Tensor], split: TokenShards | None = None
    ) -> None:
        """A step went through all blocks; `head` makes a velocity of their end."""
        kept = self.kept
        if kept.rest is not None:
            v = head(x_end)
            error = _relative(v - head(x_first + kept.rest), v, split)
            self.reuse.errors.append(error)
            kept.ratio = error / max(kept.change, 1e-12)
        kept.rest = x_end - x_first


def _relative(x: Tensor, whole: Tensor, split: TokenShards | None) -> float:
    norms = torch.stack([torch.linalg.vector_norm(each.float()) for each in (x, whole)])
    if split is not None:  # also of what every process has whole, so that all take the same number
        norms = split.sum(norms.square()).sqrt()
    return float(norms[0] / norms[1].clamp_min(1e-30))
