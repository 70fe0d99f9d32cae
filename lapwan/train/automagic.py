"""Automagic: Adafactor's second moment without momentum, and a learning rate of its own for every element.

For a matrix G of gradients, row means R and column means C of G² as running means with β2 (no bias correction):

    v̂ = R Cᵀ / mean(R);   u = G / √v̂;   u ← u / max(1, rms(u) / clip_threshold)
    lr ← clamp(lr + bump · (+1 where u has the sign of this tensor's own previous u, else −1), min_lr, max_lr)
    W ← W − lr ∘ (weight_decay · W + u)

Vectors keep the whole second moment. At the first step there is no previous update: lr stays where it starts. The sign
of an element is "above 0 or not". The lr is fp32 whatever the weights are: in fewer bits a bump would be rounded away.
Source: Shazeer & Stern, Adafactor (arXiv 1804.04235) for v̂ and the clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lapwan.settings.optimisers import AutomagicSettings


class Automagic(Optimizer):
    """`groups` may carry `scale`, which multiplies start, bump and bounds of the lr."""

    def __init__(self, groups: Iterable[dict[str, Any]], settings: AutomagicSettings) -> None:
        s = settings
        defaults = {
            "lr": s.start_lr, "bump": s.lr_bump, "min_lr": s.min_lr, "max_lr": s.max_lr, "beta2": s.beta2, "eps": s.eps,
            "weight_decay": s.weight_decay, "clip_threshold": s.clip_threshold, "scale": 1.0,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        state = self.state[parameter]
        first = not state
        if first:
            self._start(state, grad, group)
        update = self._scaled(grad, state, group)
        positive = update > 0
        if not first:
            bump, scale = group["bump"] * group["scale"], group["scale"]
            agrees = (positive == state["positive"]).to(state["lr"].dtype)
            state["lr"].add_(2 * agrees - 1, alpha=bump)
            state["lr"].clamp_(group["min_lr"] * scale, group["max_lr"] * scale)
        state["positive"] = positive
        if group["weight_decay"]:
            update = update + group["weight_decay"] * parameter
        parameter.sub_((state["lr"] * update).to(parameter.dtype))

    def _start(self, state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> None:
        state["lr"] = torch.full_like(grad, group["lr"] * group["scale"])
        if grad.dim() >= 2:
            state["row"] = grad.new_zeros(grad.shape[:-1])
            state["column"] = grad.new_zeros(*grad.shape[:-2], grad.shape[-1])
        else:
            state["square"] = torch.zeros_like(grad)

    def _scaled(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        square, keep = grad.square() + group["eps"], group["beta2"]
        if grad.dim() >= 2:
            state["row"].lerp_(square.mean(dim=-1), 1 - keep)
            state["column"].lerp_(square.mean(dim=-2), 1 - keep)
            rows = (state["row"] / state["row"].mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
            update = grad * rows * state["column"].rsqrt().unsqueeze(-2)
        else:
            state["square"].lerp_(square, 1 - keep)
            update = grad * state["square"].rsqrt()
        size = update.square().mean().sqrt() / group["clip_threshold"]
        clipped: Tensor = update / size.clamp_min(1.0)
        return clipped

    def mean_lr(self) -> Tensor:
        """Mean of the elements' learning rates."""
        rates = [self.state[p]["lr"] for group in self.param_groups for p in group["params"] if self.state.get(p)]
        if not rates:
            return torch.tensor(float(self.param_groups[0]["lr"] * self.param_groups[0]["scale"]))
        mean: Tensor = torch.stack([rate.sum() for rate in rates]).sum() / sum(rate.numel() for rate in rates)
        return mean

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # the base class casts every tensor to the parameter's dtype
            if "positive" in state:
                state["positive"] = state["positive"].bool()


def expected_lr(settings: AutomagicSettings, agreement: float) -> float:
    """The mean lr an element settles at when its updates agree in sign with probability p, step by step independently.

    A walk on min, min + bump, ..., max that goes up with probability p, and stays where a bound holds it: the share of
    its time at the k-th rung is proportional to (p / (1 − p))^k. At p = 0.5 this is (min + max) / 2 whatever the bump.
    """
    low, high = settings.min_lr, settings.max_lr
    rungs = max(1, round((high - low) / settings.lr_bump))
    odds = agreement / (1 - agreement)
    weights = [odds ** (k - rungs if odds > 1 else k) for k in range(rungs + 1)]  # no overflow either way
    return low + (high - low) * sum(k * w for k, w in enumerate(weights)) / (rungs * sum(weights))
