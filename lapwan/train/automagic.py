"""Automagic: Adafactor's second moment without momentum, and a learning rate for each element.

For a gradient matrix G, with running means R and C (β2, no bias correction) of the row and column means of G²:

    v̂ = R Cᵀ / mean(R);   u = G / √v̂;   u ← u / max(1, rms(u) / clip_threshold)
    lr ← clamp(lr + bump · (+1 where u has the sign of the previous u, else −1), min_lr, max_lr)
    W ← W − lr ∘ (weight_decay · W + u)

Vectors keep the whole second moment. At the first step there is no previous update, and lr stays at its start. The sign
of an element is "above 0 or not". The lr is fp32 whatever the weights are: in fewer bits a bump would be rounded away.
Source: Shazeer & Stern, Adafactor (arXiv 1804.04235) for v̂ and the clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lapwan.settings.optimizers import AutomagicSettings


class Automagic(Optimizer):
    """Groups may have a `scale`, which multiplies the start, bump and bounds of the lr."""

    def __init__(self, groups: Iterable[dict[str, Any]], settings: AutomagicSettings) -> None:
        s = settings
        defaults = {
            "lr": s.start_lr, "bump": s.lr_bump, "min_lr": s.min_lr, "max_lr": s.max_lr, "beta2": s.beta2, "eps": s.eps,
            "weight_decay": s.weight_decay, "clip_threshold": s.clip_threshold, "scale": 1.0,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; tensors of one shape are stacked: a LoRA has hundreds, and a kernel for each would be slower."""
        for group in self.param_groups:
            stacks: dict[tuple[object, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    key = parameter.shape, parameter.dtype, parameter.device, not self.state[parameter]
                    stacks.setdefault(key, []).append(parameter)
            for (*_, first), parameters in stacks.items():
                self._step_stack(parameters, group, bool(first))

    def _step_stack(self, parameters: list[Tensor], group: dict[str, Any], first: bool) -> None:
        """Shapes: n tensors stacked in front of their own dimensions."""
        states = [self.state[p] for p in parameters]
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
        if first:
            for state, gradient in zip(states, gradients, strict=True):
                self._start(state, gradient, group)
        updates = self._scaled(gradients, states, group)
        positive = updates > 0
        rates = torch.stack([state["lr"] for state in states])
        if not first:
            before = torch.stack([state["positive"] for state in states])
            agrees = (positive == before).to(rates.dtype)
            rates.add_(2 * agrees - 1, alpha=group["bump"] * group["scale"])
            rates.clamp_(group["min_lr"] * group["scale"], group["max_lr"] * group["scale"])
            _put(states, "lr", rates)
        _put(states, "positive", positive)
        if group["weight_decay"]:
            updates = updates + group["weight_decay"] * torch.stack(parameters)
        moves = (rates * updates).to(parameters[0].dtype)
        torch._foreach_sub_(parameters, list(moves.unbind()))

    def _start(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
        state["lr"] = torch.full_like(gradient, group["lr"] * group["scale"])
        state["positive"] = torch.zeros_like(gradient, dtype=torch.bool)
        if gradient.dim() >= 2:
            state["row"] = gradient.new_zeros(gradient.shape[:-1])
            state["column"] = gradient.new_zeros(*gradient.shape[:-2], gradient.shape[-1])
        else:
            state["square"] = torch.zeros_like(gradient)

    def _scaled(self, gradients: Tensor, states: list[dict[str, Any]], group: dict[str, Any]) -> Tensor:
        squares, new = gradients.square() + group["eps"], 1 - group["beta2"]
        if gradients.dim() >= 3:
            rows = torch.stack([state["row"] for state in states]).lerp_(squares.mean(dim=-1), new)
            columns = torch.stack([state["column"] for state in states]).lerp_(squares.mean(dim=-2), new)
            _put(states, "row", rows)
            _put(states, "column", columns)
            scale = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
            updates = gradients * scale * columns.rsqrt().unsqueeze(-2)
        else:
            means = torch.stack([state["square"] for state in states]).lerp_(squares, new)
            _put(states, "square", means)
            updates = gradients * means.rsqrt()
        dims = tuple(range(1, updates.dim()))  # of one tensor
        rms = updates.square().mean(dim=dims, keepdim=True).sqrt()
        clipped: Tensor = updates / (rms / group["clip_threshold"]).clamp_min(1.0)
        return clipped

    def mean_lr(self) -> Tensor:
        """The mean learning rate over all elements."""
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


def _put(states: list[dict[str, Any]], key: str, stacked: Tensor) -> None:
    """Copy each slice of a stack back into its state."""
    torch._foreach_copy_([state[key] for state in states], list(stacked.unbind()))
