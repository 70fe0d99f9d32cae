"""AdamW over fp32 master weights, or over bf16 weights without a copy, rounded stochastically.

    m ← β1·m + (1−β1)·g,   v ← β2·v + (1−β2)·g²,   w ← w·(1 − lr·λ) − lr·m̂ / (√v̂ + ε)

`fp32`: w, m and v are fp32; a model in bf16 gets w rounded once after each step. Bytes a number: 2 + 2 (gradient) + 12.
`bf16`: w is the model's own bf16 tensor, m and v are bf16 too; each result is computed in fp32 and rounded
stochastically, up with the probability of the part cut off, so that its mean is the exact result and steps far below
bf16's spacing move the weights as they should. Bytes a number: 8 in all. The few tensors that the model itself keeps in
fp32 (norms, modulation) stay fp32.
With `on_cpu`, the fp32 copy, m and v are in host memory and the step is computed there.
Source: Loshchilov & Hutter (arXiv 1711.05101); stochastic rounding: Gupta et al. (arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lapwan import rng
from lapwan.settings.optimizers import AdamWSettings
from lapwan.train.parallel import as_dtensor, local_tensor, shard_like

Master = Literal["fp32", "bf16"]


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down with the probabilities that make the mean x: E[rounded(x)] = x."""
    # The lower 16 bits of an fp32 are what bf16 lacks: adding 16 random bits carries with exactly that probability.
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)


class MasterAdamW(Optimizer):
    """AdamW with master weights in `master`; a sharded parameter is stepped shard by shard."""

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], settings: AdamWSettings, master: Master, on_cpu: bool, seed: int
    ) -> None:
        plain = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
        super().__init__([dict(group) for group in groups], plain)
        self.master, self._on_cpu, self._seed = master, on_cpu, seed
        if master == "bf16" and all(p.dtype != torch.bfloat16 for g in self.param_groups for p in g["params"]):
            raise ValueError("bf16 masters are the model's own tensors, but none of them is bf16")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        index = -1
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._step_one(index, group, parameter)

    def _exact(self, weight: Tensor) -> bool:
        return self.master == "fp32" or weight.dtype != torch.bfloat16

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        model_weight = local_tensor(parameter.detach())
        device = torch.device("cpu") if self._on_cpu else model_weight.device
        exact = self._exact(model_weight)
        dtype = torch.float32 if exact else torch.bfloat16
        state: dict[str, Any] = {"step": 0}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(model_weight.shape, dtype=dtype, device=device)
        if exact and (model_weight.dtype != torch.float32 or model_weight.device != device):
            state["master"] = model_weight.to(device, torch.float32, copy=True)
        return state

    def _step_one(self, index: int, group: Mapping[str, Any], parameter: Tensor) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self._start(parameter)
        state, model_weight = self.state[parameter], local_tensor(parameter.detach())
        state["step"] += 1
        count, (beta1, beta2) = state["step"], group["betas"]
        device = state["exp_avg"].device
        assert parameter.grad is not None
        gradient = local_tensor(parameter.grad.detach()).to(device, torch.float32)
        exact = self._exact(model_weight)
        mean = state["exp_avg"] if exact else state["exp_avg"].float()
        square = state["exp_avg_sq"] if exact else state["exp_avg_sq"].float()
        weight = state.get("master", model_weight) if exact else model_weight.to(device, torch.float32)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**count))
        if exact:
            if weight is not model_weight:
                model_weight.copy_(weight)
            return
        generator = torch.Generator(device).manual_seed(rng.seed_of(self._seed, "rounding", index, count))
        model_weight.copy_(rounded(weight, generator))
        state["exp_avg"].copy_(rounded(mean, generator))
        state["exp_avg_sq"].copy_(rounded(square, generator))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; states of a sharded parameter are DTensors, to be gathered before they are saved."""
        state: dict[str, Any] = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        state["state"] = {
            index: {name: as_dtensor(value, parameters[index]) if isinstance(value, Tensor) else value
                    for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved, with its dtypes: torch's own would cast the fp32 copy to the parameter's bf16."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            device = torch.device("cpu") if self._on_cpu else local_tensor(parameter).device
            self.state[parameter] = {
                name: shard_like(value, parameter).to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }
