"""Max-norm: no module's update grows beyond a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lapwan.lora.attach import Adapter
from lapwan.lora.norms import limit_norms
from lapwan.names import NoiseExpert
from lapwan.train.watch import StepSeen


class NormLimit:
    """A rule: after every step of a noise expert, its modules are scaled back to the bound."""

    needs_losses = False

    def __init__(self, adapters: Mapping[NoiseExpert, Adapter], limits: Mapping[NoiseExpert, float]) -> None:
        self._adapters, self._limits = adapters, limits

    def after_update(self, seen: StepSeen) -> dict[str, Tensor | float]:
        if (limit := self._limits.get(seen.expert)) is None:
            return {}
        scaled, largest = limit_norms(self._adapters[seen.expert], limit)
        return {"max_norm/scaled_modules": scaled, "max_norm/largest": largest}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is none: what it did is in the weights."""
