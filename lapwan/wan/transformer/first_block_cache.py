"""First-block cache: where the first block's output changes little, the other blocks keep an earlier step's residual.

A step's blocks add the residual  R = x_end − x_first  to the first block's output. Between neighbouring steps R changes
little, and how little is predicted by the change of the first block's own residual:
    c = ‖r − r'‖ / ‖r'‖,  r = x_first − x_in  now,  r' at the last computed step.
At every computed step the error that keeping R' would have made in the velocity is known,
    e = ‖v − v(x_first + R')‖ / ‖v‖,
and with it the ratio e / c of this transformer at these steps of this video. The next step, with its change c₁, keeps
R' where (e / c)·c₁ is at most the tolerance. Approximate, and off by default.

Source of the idea: first-block cache (ParaAttention; diffusers' FirstBlockCache). Its threshold is on c and is found by
trial for each model. Here the tolerance is on the error, and the computed steps calibrate the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lapwan.wan.transformer.context_parallel import TokenShards


@dataclass
class _Residuals:
    """The residuals of the last computed step, and the ratio e / c measured at it."""

    first: Tensor | None = None
    rest: Tensor | None = None
    change: float = 0.0
    ratio: float | None = None


@dataclass
class FirstBlockCache:
    """A noise expert's steps of one video.

    `errors` are those measured at computed steps, `predicted` those predicted for the skipped ones.
    """

    tolerance: float
    errors: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    _branches: dict[str, _Residuals] = field(default_factory=dict)

    def branch(self, name: str) -> CacheBranch:
        """One branch of guidance (text, negative prompt), or both as a batch: each has its own residuals."""
        return CacheBranch(self, self._branches.setdefault(name, _Residuals()))

    def __str__(self) -> str:
        parts = [f"{len(self.predicted)} evaluations skipped all blocks but the first"]
        if self.predicted:
            parts.append(f"predicted relative error of their velocity at most {max(self.predicted):.3f}")
        if self.errors:
            parts.append(f"at the computed steps skipping would have made it {sum(self.errors) / len(self.errors):.3f}")
        return "; ".join(parts)


@dataclass(frozen=True)
class CacheBranch:
    """What the forward calls between the first block and the others, and after the last."""

    cache: FirstBlockCache
    residuals: _Residuals

    def end(self, x_in: Tensor, x_first: Tensor, shards: TokenShards | None = None) -> Tensor | None:
        """x_end if R may be kept, else None; the same in all processes that share the tokens. Syncs with the device."""
        last, first = self.residuals, x_first - x_in
        if last.first is None or last.rest is None or last.first.shape != first.shape:
            last.first, last.rest, last.ratio = first, None, None
            return None
        last.change = _relative_norm(first - last.first, last.first, shards)
        predicted = None if last.ratio is None else last.ratio * last.change
        if predicted is not None and predicted <= self.cache.tolerance:
            self.cache.predicted.append(predicted)
            return x_first + last.rest
        last.first = first
        return None

    def computed(
        self, x_first: Tensor, x_end: Tensor, head: Callable[[Tensor], Tensor], shards: TokenShards | None = None
    ) -> None:
        """Record a step that went through all blocks; `head` maps x_end to a velocity."""
        last = self.residuals
        if last.rest is not None:
            v = head(x_end)
            error = _relative_norm(v - head(x_first + last.rest), v, shards)
            self.cache.errors.append(error)
            last.ratio = error / max(last.change, 1e-12)
        last.rest = x_end - x_first


def _relative_norm(x: Tensor, reference: Tensor, shards: TokenShards | None) -> float:
    norms = torch.stack([torch.linalg.vector_norm(tensor.float()) for tensor in (x, reference)])
    if shards is not None:  # summed for replicated tensors too, so that all processes get the same number
        norms = shards.sum(norms.square()).sqrt()
    return float(norms[0] / norms[1].clamp_min(1e-30))
