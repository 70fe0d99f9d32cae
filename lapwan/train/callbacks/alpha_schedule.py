"""Alpha in phases: when the loss of a noise expert has stopped falling, its LoRA continues with the next alpha.

At a change of phase the up matrices are rescaled, so that ΔW = (α/r)·B·A stays the same.

Whether the loss still falls is read from a straight line through losses made comparable between sigmas. Each loss is
divided by the mean of its sigma bin, and step and loss are centred within their bin, so that a run of low sigmas is not
taken for progress. Least squares of loss on step gives the slope b with its standard error: the relative decrease per
100 steps is −100·b.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lapwan import console
from lapwan.lora.attach import Adapter, set_alpha
from lapwan.names import Band, NoiseExpert
from lapwan.settings.train import AlphaScheduleSettings
from lapwan.train.callbacks.base import Callback, StepResult
from lapwan.train.ema import Ema
from lapwan.train.metrics import bin_of
from lapwan.train.run_state import SavedState, Steps, as_saved

_FEWEST = 20  # observations that a trend needs
_BINS = 8  # of sigma
_ADVISORY_WINDOW = 200  # losses, as other trainers use


@dataclass(frozen=True)
class Observation:
    """The loss of one sample, by step of its noise expert and sigma bin."""

    step: int
    bin: int
    loss: float


@dataclass(frozen=True)
class Trend:
    """Relative decrease of the loss per 100 steps, its upper confidence bound, and R² of the line."""

    decrease: float
    upper: float
    r2: float
    count: int


def trend(observations: Iterable[Observation], confidence: float) -> Trend | None:
    """The trend of the losses; None with too few of them."""
    bins: dict[int, list[Observation]] = {}
    for observation in observations:
        bins.setdefault(observation.bin, []).append(observation)
    times: list[float] = []
    values: list[float] = []
    for in_bin in bins.values():
        mean_loss = math.fsum(o.loss for o in in_bin) / len(in_bin)
        mean_step = math.fsum(o.step for o in in_bin) / len(in_bin)
        if mean_loss > 0:
            times += [o.step - mean_step for o in in_bin]
            values += [o.loss / mean_loss - 1 for o in in_bin]
    degrees_of_freedom = len(values) - len(bins) - 1
    times_squared = math.fsum(t * t for t in times)
    if len(values) < _FEWEST or degrees_of_freedom < 1 or times_squared == 0:
        return None
    slope = math.fsum(t * v for t, v in zip(times, values, strict=True)) / times_squared
    residual = math.fsum((v - slope * t) ** 2 for t, v in zip(times, values, strict=True))
    total = math.fsum(v * v for v in values)
    error = math.sqrt(residual / degrees_of_freedom / times_squared)
    bound = -100 * slope + NormalDist().inv_cdf(confidence) * 100 * error
    return Trend(-100 * slope, bound, 1 - residual / total if total else 0.0, len(values))


def plain_slope(losses: Sequence[float]) -> tuple[float, float]:
    """(slope in loss units per step, R²) of raw losses in order: the figures that other trainers decide by."""
    n = len(losses)
    if n < 2:
        return 0.0, 0.0
    middle, mean = (n - 1) / 2, math.fsum(losses) / n
    steps_squared = math.fsum((i - middle) ** 2 for i in range(n))
    slope = math.fsum((i - middle) * loss for i, loss in enumerate(losses)) / steps_squared
    total = math.fsum((loss - mean) ** 2 for loss in losses)
    return slope, slope * slope * steps_squared / total if total else 0.0


class _AlphaScheduleState(SavedState):
    phase: Steps
    began: Steps
    confirmed: Steps
    seen: list[tuple[Steps, Steps, float]]
    agreements: list[Tensor]
    signs: dict[str, Tensor]


class AlphaSchedule(Callback):
    """The alpha phases of one noise expert."""

    needs_losses = True
    state_type = _AlphaScheduleState

    def __init__(
        self, noise_expert: NoiseExpert, settings: AlphaScheduleSettings, adapter: Adapter, band: Band,
        ups: Mapping[str, nn.Parameter], optimizer: Optimizer, gradient_powers: Mapping[str, int], ema: Ema | None,
    ) -> None:
        self.name = f"alpha.{noise_expert.value}"
        self._noise_expert, self._settings, self._adapter, self._band = noise_expert, settings, adapter, band
        self._ups, self._optimizer, self._powers, self._ema = dict(ups), optimizer, dict(gradient_powers), ema
        self._phase, self._phase_start, self._confirmations = 0, 0, 0
        self._observations: deque[Observation] = deque()
        self._agreements: deque[Tensor] = deque(maxlen=_ADVISORY_WINDOW)
        self._signs: dict[str, Tensor] = {}

    @property
    def alpha(self) -> float:
        """The alpha of the current phase."""
        return self._settings.phases[self._phase].alpha

    def after_update(self, result: StepResult) -> dict[str, Tensor | float]:
        if result.noise_expert is not self._noise_expert:
            return {}
        self._observe(result)
        figures: dict[str, Tensor | float] = {"alpha/phase": float(self._phase)}
        if self._phase + 1 < len(self._settings.phases):
            steps = result.noise_expert_step - self._phase_start
            latest = self._settings.phases[self._phase].max_steps
            if steps % self._settings.check_every == 0 or steps == latest:
                figures |= self._check(result.noise_expert_step, steps)
        return {**figures, "alpha/value": self.alpha}

    def _observe(self, result: StepResult) -> None:
        """Keep the losses of the window, and the share of gradient signs of B that agree with the step before."""
        step = result.noise_expert_step
        for loss, sigma in zip(result.losses, result.sigmas, strict=True):
            self._observations.append(Observation(step, bin_of(sigma, self._band, _BINS), loss))
        while self._observations and self._observations[0].step <= step - self._settings.window:
            self._observations.popleft()
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

    def _check(self, step: int, steps_in_phase: int) -> dict[str, Tensor | float]:
        s, phase = self._settings, self._settings.phases[self._phase]
        current = trend(self._observations, s.confidence)
        flat = current is not None and current.upper < s.decrease_below
        self._confirmations = self._confirmations + 1 if flat else 0
        expired = phase.max_steps is not None and steps_in_phase >= phase.max_steps
        if expired or (self._confirmations >= s.confirmations and steps_in_phase >= phase.min_steps):
            reason = (f"max_steps = {phase.max_steps} reached" if expired else
                      f"flat {self._confirmations} times in a row (bound below {100 * s.decrease_below:g} %)")
            self._next_phase(step, reason, current)
        if current is None:
            return {}
        return {"alpha/decrease_per_100": current.decrease, "alpha/decrease_bound": current.upper}

    def _next_phase(self, step: int, reason: str, current: Trend | None) -> None:
        before, name = self.alpha, self._settings.phases[self._phase].name
        numbers = "too few losses for a trend" if current is None else (
            f"decrease per 100 steps {100 * current.decrease:.2f} %, upper bound {100 * current.upper:.2f} %, R2 "
            f"{current.r2:.3f}, {current.count} losses")
        advisory = self._advisory()
        self._phase += 1
        console.log(f"{self._noise_expert.value} noise: alpha {before:g} -> {self.alpha:g} ({name} -> "
                    f"{self._settings.phases[self._phase].name}) at its step {step}: {reason}; {numbers}{advisory}")
        set_alpha(self._adapter, self.alpha)
        self._rescale(before / self.alpha)
        self._phase_start, self._confirmations = step, 0
        self._observations.clear()
        self._agreements.clear()

    def _advisory(self) -> str:
        """The three figures that other trainers decide by, beside the thresholds in the settings."""
        phase = self._settings.phases[self._phase]
        slope, r2 = plain_slope([o.loss for o in self._observations][-_ADVISORY_WINDOW:])
        stability = float(torch.stack(list(self._agreements)).mean()) if self._agreements else 0.0
        shown = []
        for value, threshold, label in ((-slope, phase.loss_improvement_rate_below, "loss improvement rate"),
                                     (stability, phase.min_gradient_stability, "gradient stability"),
                                     (r2, phase.min_loss_r2, "loss R2")):
            if threshold is not None:
                bound = "below" if label.endswith("rate") else "at least"
                shown.append(f"{label} {value:.3g} (wanted: {bound} {threshold:g})")
        return f"; advisory: {', '.join(shown)}" if shown else ""

    @torch.no_grad()
    def _rescale(self, factor: float) -> None:
        """Multiply B by a factor, and what the optimizer keeps of its gradient by the inverse, to its power."""
        for name, up in self._ups.items():
            up.mul_(factor)
            if self._ema is not None:
                self._ema.means[name].mul_(factor)
            state = self._optimizer.state.get(up, {})
            for key, power in self._powers.items():
                if key in state:
                    state[key].mul_(factor**-power)

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": self._phase, "began": self._phase_start, "confirmed": self._confirmations,
            "seen": [(o.step, o.bin, o.loss) for o in self._observations],
            "agreements": list(self._agreements),
            "signs": {name: sign.cpu() for name, sign in self._signs.items()},
        }

    def load_state_dict(self, state: _AlphaScheduleState) -> None:
        if state.phase >= len(self._settings.phases):
            raise ValueError(f"phase {state.phase} of an alpha schedule of {len(self._settings.phases)}")
        self._phase, self._phase_start, self._confirmations = state.phase, state.began, state.confirmed
        self._observations = deque(Observation(*values) for values in state.seen)
        self._agreements = deque((as_saved("an agreement of signs", share, torch.zeros((), dtype=torch.float64))
                                  for share in state.agreements), maxlen=_ADVISORY_WINDOW)
        self._signs = {name: as_saved(f"the signs of {name}", sign, self._ups[name] > 0)
                       for name, sign in state.signs.items()}
        set_alpha(self._adapter, self.alpha)  # B is rescaled in the checkpoint already
