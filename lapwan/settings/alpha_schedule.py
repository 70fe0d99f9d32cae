"""Alpha in phases, for each noise expert by itself."""

from __future__ import annotations

from pydantic import Field, model_validator

from lapwan.settings.base import Settings


class AlphaPhaseSettings(Settings):
    """One phase. The last three are other trainers' criteria: they are shown at a decision and decide nothing."""

    name: str = Field(min_length=1)
    alpha: float = Field(gt=0)
    min_steps: int = Field(0, ge=0, description="Of the noise expert's own, before the phase may end.")
    max_steps: int | None = Field(None, ge=1, description="The phase ends here at the latest; absent: never by count.")
    loss_improvement_rate_below: float | None = Field(None, gt=0, description="Advisory.")
    min_gradient_stability: float | None = Field(None, ge=0, le=1, description="Advisory.")
    min_loss_r2: float | None = Field(None, ge=0, le=1, description="Advisory.")

    @model_validator(mode="after")
    def _order(self) -> AlphaPhaseSettings:
        if self.max_steps is not None and self.max_steps < self.min_steps:
            raise ValueError(f"max_steps = {self.max_steps} is below min_steps = {self.min_steps}")
        return self


class AlphaScheduleSettings(Settings):
    """Phases in order; a phase ends when its loss has stopped falling.

    Stopped: the upper confidence bound of the relative decrease per 100 steps lies below `decrease_below`,
    `confirmations` checks in a row. With batches of one the bound itself is about 165·cv / √(window³ / 12), cv the
    scatter of losses at equal sigma: 0.9 % at cv 0.5 and 1000 steps, 10 % at 200 steps, which could never decide.
    """

    phases: tuple[AlphaPhaseSettings, ...] = ()
    decrease_below: float = Field(0.01, gt=0, description="Relative decrease of the loss per 100 steps.")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    confirmations: int = Field(3, ge=1)
    window: int = Field(1000, ge=20, description="Steps of the noise expert that are looked at, within the phase.")
    check_every: int = Field(50, ge=1, description="Steps of the noise expert between two checks.")
