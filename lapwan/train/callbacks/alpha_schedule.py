"""Is a loss still falling? A straight line through losses made comparable between sigmas.

Each loss is divided by the mean of its sigma bin, so that 1 is usual, and time and loss are centred within their bin,
so that a run of low sigmas does not look like progress. Least squares of loss on step then gives the slope b with its
standard error: the relative decrease per 100 steps is −100·b.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lapwan import console
from lapwan.lora.attach import Adapter, set_alpha
from lapwan.names import Band, NoiseExpert
from lapwan.settings.alpha_schedule import AlphaScheduleSettings
from lapwan.train.callbacks.base import StepResult
from lapwan.train.ema import Ema
from lapwan.train.metrics import bin_of

_FEWEST = 20  # observations below which nothing is said


@dataclass(frozen=True)
class Observation:
    """One sample's loss, at the noise expert's own step, in a sigma bin."""

    step: int
    bin: int
    loss: float


@dataclass(frozen=True)
class Trend:
    """Relative decrease per 100 steps, its upper confidence bound, and how much of the scatter the line explains."""

    decrease: float
    upper: float
    r2: float
    count: int


def trend(seen: Sequence[Observation], confidence: float) -> Trend | None:
    """The trend of the losses; None with too few of them."""
    groups: dict[int, list[Observation]] = {}
    for one in seen:
        groups.setdefault(one.bin, []).append(one)
    times: list[float] = []
    values: list[float] = []
    for own in groups.values():
        mean_loss = math.fsum(o.loss for o in own) / len(own)
        mean_step = math.fsum(o.step for o in own) / len(own)
        if mean_loss > 0:
            times += [o.step - mean_step for o in own]
            values += [o.loss / mean_loss - 1 for o in own]
    freedom = len(values) - len(groups) - 1
    spread = math.fsum(t * t for t in times)
    if len(values) < _FEWEST or freedom < 1 or spread == 0:
        return None
    slope = math.fsum(t * v for t, v in zip(times, values, strict=True)) / spread
    residual = math.fsum((v - slope * t) ** 2 for t, v in zip(times, values, strict=True))
    total = math.fsum(v * v for v in values)
    error = math.sqrt(residual / freedom / spread)
    bound = -100 * slope + NormalDist().inv_cdf(confidence) * 100 * error
    return Trend(-100 * slope, bound, 1 - residual / total if total else 0.0, len(values))


def plain_slope(losses: Sequence[float]) -> tuple[float, float]:
    """(slope in loss units per step, R²) of raw losses in order: the figures other trainers decide by."""
    n = len(losses)
    if n < 2:
        return 0.0, 0.0
    middle, mean = (n - 1) / 2, math.fsum(losses) / n
    spread = math.fsum((i - middle) ** 2 for i in range(n))
    slope = math.fsum((i - middle) * loss for i, loss in enumerate(losses)) / spread
    total = math.fsum((loss - mean) ** 2 for loss in losses)
    return slope, slope * slope * spread / total if total else 0.0

_BINS = 8
_ADVISORY_WINDOW = 200  # losses, as other trainers look at
_FIRST_MOMENTS = ("exp_avg",)
_SECOND_MOMENTS = ("exp_avg_sq", "row", "column", "square")


class AlphaSchedule:
    """The phases of one noise expert."""

    needs_losses = True

    def __init__(
        self, noise_expert: NoiseExpert, settings: AlphaScheduleSettings, adapter: Adapter, band: Band,
        ups: Mapping[str, nn.Parameter], optimizer: Optimizer, ema: Ema | None,
    ) -> None:
        self._expert, self._settings, self._adapter, self._band = noise_expert, settings, adapter, band
        self._ups, self._optimizer, self._ema = dict(ups), optimizer, ema
        self._phase, self._began, self._confirmed = 0, 0, 0
        self._seen: deque[Observation] = deque()
        self._agreements: deque[Tensor] = deque(maxlen=_ADVISORY_WINDOW)
        self._signs: dict[str, Tensor] = {}

    @property
    def alpha(self) -> float:
        """The alpha of the phase the noise expert is in."""
        return self._settings.phases[self._phase].alpha

    def after_update(self, seen: StepResult) -> dict[str, Tensor | float]:
        if seen.noise_expert is not self._expert:
            return {}
        self._observe(seen)
        figures: dict[str, Tensor | float] = {"alpha/phase": float(self._phase)}
        if self._phase + 1 < len(self._settings.phases):
            steps = seen.own_step - self._began
            latest = self._settings.phases[self._phase].max_steps
            if steps % self._settings.check_every == 0 or steps == latest:
                figures |= self._check(seen.own_step, steps)
        return {**figures, "alpha/value": self.alpha}

    def _observe(self, seen: StepResult) -> None:
        for loss, sigma in zip(seen.losses, seen.sigmas, strict=True):
            self._seen.append(Observation(seen.own_step, bin_of(sigma, self._band, _BINS), loss))
        while self._seen and self._seen[0].step <= seen.own_step - self._settings.window:
            self._seen.popleft()
        agreed, count = [], 0
        for name, parameter in self._ups.items():
            if parameter.grad is None:
                continue
            sign = parameter.grad > 0
            if name in self._signs:
                agreed.append((sign == self._signs[name]).sum())
                count += sign.numel()
            self._signs[name] = sign
        if agreed:
            self._agreements.append(torch.stack(agreed).sum().double().cpu() / count)

    def _check(self, own_step: int, steps: int) -> dict[str, Tensor | float]:
        s, phase = self._settings, self._settings.phases[self._phase]
        found = trend(self._seen, s.confidence)
        flat = found is not None and found.upper < s.decrease_below
        self._confirmed = self._confirmed + 1 if flat else 0
        late = phase.max_steps is not None and steps >= phase.max_steps
        if late or (self._confirmed >= s.confirmations and steps >= phase.min_steps):
            why = (f"max_steps = {phase.max_steps} reached" if late else
                   f"flat {self._confirmed} times in a row (bound below {100 * s.decrease_below:g} %)")
            self._advance(own_step, why, found)
        if found is None:
            return {}
        return {"alpha/decrease_per_100": found.decrease, "alpha/decrease_bound": found.upper}

    def _advance(self, own_step: int, why: str, found: Trend | None) -> None:
        before, name = self.alpha, self._settings.phases[self._phase].name
        numbers = "too few losses for a trend" if found is None else (
            f"decrease per 100 steps {100 * found.decrease:.2f} %, upper bound {100 * found.upper:.2f} %, R2 "
            f"{found.r2:.3f}, {found.count} losses")
        advisory = self._advisory()
        self._phase += 1
        console.log(f"{self._expert.value} noise: alpha {before:g} -> {self.alpha:g} ({name} -> "
                    f"{self._settings.phases[self._phase].name}) at its step {own_step}: {why}; {numbers}{advisory}")
        set_alpha(self._adapter, self.alpha)
        self._rescale(before / self.alpha)
        self._began, self._confirmed = own_step, 0
        self._seen.clear()
        self._agreements.clear()

    def _advisory(self) -> str:
        """Other trainers' three figures beside the thresholds that were given for them."""
        phase = self._settings.phases[self._phase]
        slope, r2 = plain_slope([one.loss for one in self._seen][-_ADVISORY_WINDOW:])
        stability = float(torch.stack(list(self._agreements)).mean()) if self._agreements else 0.0
        shown = []
        for value, wanted, label in ((-slope, phase.loss_improvement_rate_below, "loss improvement rate"),
                                     (stability, phase.min_gradient_stability, "gradient stability"),
                                     (r2, phase.min_loss_r2, "loss R2")):
            if wanted is not None:
                bound = "below" if label.endswith("rate") else "at least"
                shown.append(f"{label} {value:.3g} ({bound} {wanted:g} was asked for)")
        return f"; advisory: {', '.join(shown)}" if shown else ""

    @torch.no_grad()
    def _rescale(self, factor: float) -> None:
        for name, up in self._ups.items():
            up.mul_(factor)
            if self._ema is not None:
                self._ema.means[name].mul_(factor)
            state = self._optimizer.state.get(up, {})
            for keys, power in ((_FIRST_MOMENTS, -1), (_SECOND_MOMENTS, -2)):
                for key in keys:
                    if key in state:
                        state[key].mul_(factor**power)

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self._phase, "began": self._began, "confirmed": self._confirmed,
            "seen": [(o.step, o.bin, o.loss) for o in self._seen],
            "agreements": list(self._agreements),
            "signs": {name: sign.cpu() for name, sign in self._signs.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phase, self._began, self._confirmed = state["phase"], state["began"], state["confirmed"]
        self._seen = deque(Observation(*one) for one in state["seen"])
        self._agreements = deque(state["agreements"], maxlen=_ADVISORY_WINDOW)
        self._signs = {name: sign.to(self._ups[name].device) for name, sign in state["signs"].items()}
        set_alpha(self._adapter, self.alpha)  # B comes rescaled out of the checkpoint
