"""Exponential moving average of the trained parameters: smoother than the last step, and what is saved when it is on.

    m ← d·m + (1 − d)·w after every update of w,   d = min(decay, (1 + n) / (10 + n)) at its n-th update

so that the starting values, which the mean holds at first, fade quickly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lapwan.train.run_state import EmaState, as_saved


class Ema:
    """Means by parameter name, on the parameters' device, in at least fp32: in bf16 small steps would be lost."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.means: dict[str, Tensor] = {
            n: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for n, p in parameters.items()
        }
        self._updates: dict[str, int] = dict.fromkeys(parameters, 0)

    @torch.no_grad()
    def update(self, names: Iterable[str]) -> None:
        """Update the means of the parameters that were just stepped."""
        for name in names:
            count = self._updates[name] = self._updates[name] + 1
            decay = min(self._decay, (1 + count) / (10 + count))
            mean = self.means[name]
            mean.lerp_(self._parameters[name].detach().to(mean.dtype), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A scope in which the parameters hold the means; afterwards they are restored bit for bit."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.means)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, object]:
        """Means and counts."""
        return {"means": {name: mean.cpu() for name, mean in self.means.items()}, "updates": dict(self._updates)}

    def load_state_dict(self, state: EmaState) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: means or counts of other tensors.
        """
        for part in (state.means, state.updates):
            if part.keys() != self.means.keys():
                raise ValueError("the running means and their counts are not those of this run's tensors")
        for name, mean in state.means.items():
            self.means[name].copy_(as_saved(f"the running mean of {name}", mean, self.means[name]))
        self._updates = dict(state.updates)
