"""AdamW that is exact about what it updates: an fp32 copy of the weights, or bf16 weights with no other copy.

    m ← β1·m + (1−β1)·g,   v ← β2·v + (1−β2)·g²,   w ← w·(1 − lr·λ) − lr·m̂ / (√v̂ + ε)

`fp32`: w, m and v are fp32; a model in bf16 gets w rounded once after each step. Bytes a number: 2 + 2 (gradient) + 12.
`bf16`: w is the model's own bf16 tensor, m and v are bf16 too; each result is computed in fp32 and rounded
stochastically, up with the probability of the part cut off, so that its mean is the exact result and steps far below
bf16's spacing still move the weights as they should. Bytes a number: 8 in all. The few tensors that the model itself
keeps in fp32 (norms, modulation) stay what they are.
With `on_cpu`, what is kept (the fp32 copy, m and v) lies in host memory and the step is computed there.
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
from lapwan.train.parallel import as_part, local, part_like

Master = Literal["fp32", "bf16"]


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down with the probabilities that make the mean x: E[rounded(x)] = x."""
    # The lower 16 bits of an fp32 are what bf16 lacks: adding 16 random bits carries with just that probability.
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits = (x.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)


class MasterAdamW(Optimizer):
    """AdamW over masters in `master`; a sharded parameter is stepped shard by shard."""

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

    def _exact(self, own: Tensor) -> bool:
        return self.master == "fp32" or own.dtype != torch.bfloat16

    def _start(self, parameter: Tensor) -> dict[str, Any]:
        own = local(parameter.detach())
        home = torch.device("cpu") if self._on_cpu else own.device
        exact = self._exact(own)
        dtype = torch.float32 if exact else torch.bfloat16
        state: dict[str, Any] = {"step": 0}
        state |= {name: torch.zeros(own.shape, dtype=dtype, device=home) for name in ("exp_avg", "exp_avg_sq")}
        if exact and (own.dtype != torch.float32 or own.device != home):
            state["master"] = own.to(home, torch.float32, copy=True)
        return state

    def _step_one(self, index: int, group: Mapping[str, Any], parameter: Tensor) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self._start(parameter)
        state, own = self.state[parameter], local(parameter.detach())
        state["step"] += 1
        count, (beta1, beta2) = state["step"], group["betas"]
        home = state["exp_avg"].device
        assert parameter.grad is not None
        gradient = local(parameter.grad.detach()).to(home, torch.float32)
        exact = self._exact(own)
        mean = state["exp_avg"] if exact else state["exp_avg"].float()
        square = state["exp_avg_sq"] if exact else state["exp_avg_sq"].float()
        weight = state.get("master", own) if exact else own.to(home, torch.float32)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**count))
        if exact:
            if weight is not own:
                own.copy_(weight)
            return
        generator = torch.Generator(home).manual_seed(rng.seed_of(self._seed, "rounding", index, count))
        own.copy_(rounded(weight, generator))
        state["exp_avg"].copy_(rounded(mean, generator))
        state["exp_avg_sq"].copy_(rounded(square, generator))

    def state_dict(self) -> dict[str, Any]:
        """As torch's; states of a sharded parameter are sharded tensors, to be put together before they are saved."""
        found: dict[str, Any] = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        found["state"] = {
            index: {name: as_part(value, parameters[index]) if isinstance(value, Tensor) else value
                    for name, value in own.items()}
            for index, own in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved, dtype and all: torch's own would cast the fp32 copy to the parameter's bf16."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            home = torch.device("cpu") if self._on_cpu else local(parameter).device
            self.state[parameter] = {
                name: part_like(value, parameter).to(home, copy=True) if isinstance(value, Tensor) else value
                for name, value in saved.items()
            }
