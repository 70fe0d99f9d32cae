"""Many small fine-tunings at once: each arm has LoRAs of its own, and all of them are columns of one batch's gates.

Arms differ in rank, lr, batch, clips and weights of the loss. A row of the stacked layers belongs to one arm, so that
clipping and AdamW's step are taken arm by arm, and every arm trains as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.pretrain.diffusion import Models
from examples.pretrain.headroom import BOUNDARY, FineTuningClips
from examples.pretrain.settings import SEED
from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.lora.attach import Group, attach, initial_state
from lapwan.lora.targets import TargetRule, resolve_targets
from lapwan.losses.flow import add_noise, roi_loss, velocity_target
from lapwan.losses.sigmas import Shifted, Uniform, draw_in_band
from lapwan.names import NoiseExpert, bands
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.wan.backbone import WanBackbone


@dataclass(frozen=True)
class Arm:
    """One fine-tuning. `chosen`: one LoRA an instrument, picked by the name; else one for all."""

    rank: int
    lr: float
    batch: int = 4
    clips: int = 160
    chosen: bool = True
    region: float = 0.0  # λ of the loss L + λ·L_roi, L_roi the mean over the cells of the head
    decay: bool = False  # of lr: a cosine to zero at the last step, after 20 steps of warm-up

    @property
    def groups(self) -> int:
        """How many LoRAs."""
        return len(INSTRUMENTS) if self.chosen else 1

    def __str__(self) -> str:
        parts = ["chosen" if self.chosen else "plain", f"rank {self.rank}", f"lr {self.lr:g}", f"batch {self.batch}",
                 f"{self.clips} clips"]
        parts += [f"region {self.region:g}"] * (self.region > 0) + ["cosine"] * self.decay
        return ", ".join(parts)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        if not self.decay:
            return self.lr
        return self.lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))


class RowAdam:
    """AdamW without decay over stacked layers, with an lr and a clipping norm for each arm's rows.

    Args:
        parameters: `down` [R, I] and `up` [O, R] in turn, of every module, all with the same rows.
        arm_of_row: [R].
    """

    def __init__(self, parameters: list[Tensor], arm_of_row: Tensor, arms: int) -> None:
        self._parameters, self._arm_of_row, self._arms, self._step = parameters, arm_of_row, arms, 0
        self._mean = [torch.zeros_like(p) for p in parameters]
        self._square = [torch.zeros_like(p) for p in parameters]

    def _by_row(self, values_R: Tensor) -> list[Tensor]:
        """`values_R` shaped for each parameter."""
        return [values_R[:, None], values_R[None]] * (len(self._parameters) // 2)

    @torch.no_grad()
    def step(self, lr_A: Tensor) -> None:
        """Clip each arm's gradient to norm 1, take its step with its lr, forget the gradients."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        squares = torch._foreach_mul(gradients, gradients)
        summed = torch.stack([square.sum(dim=1 - index % 2) for index, square in enumerate(squares)]).sum(dim=0)
        norm_A = torch.zeros(self._arms, device=summed.device).index_add_(0, self._arm_of_row, summed).sqrt()
        clip_R = (1 / norm_A.clamp_min(1.0))[self._arm_of_row]
        gradients = list(torch._foreach_mul(gradients, self._by_row(clip_R)))
        self._step += 1
        torch._foreach_lerp_(self._mean, gradients, 1 - 0.9)
        torch._foreach_mul_(self._square, 0.999)
        torch._foreach_addcmul_(self._square, gradients, gradients, 1 - 0.999)
        change = torch._foreach_div(self._square, 1 - 0.999**self._step)
        torch._foreach_sqrt_(change)
        torch._foreach_add_(change, 1e-8)
        change = torch._foreach_div(self._mean, change)
        rate_R = lr_A[self._arm_of_row] / (1 - 0.9**self._step)
        torch._foreach_sub_(self._parameters, list(torch._foreach_mul(change, self._by_row(rate_R))))
        for parameter in self._parameters:
            parameter.grad = None


class Arms:
    """The arms over a copy of the models, and their training.

    Args:
        models: stay unchanged.
        clips: as many as the largest arm's.
        steps: the last step of training, for decaying learning rates.
    """

    def __init__(self, models: Models, clips: FineTuningClips, arms: list[Arm], steps: int) -> None:
        self.arms, self._clips, self._steps, self.done = arms, clips, steps, 0
        self._device = clips.x0.device
        copied = {e: WanBackbone(deepcopy(b.transformer)) for e, b in models.noise_experts.items()}
        self.models = Models(models.recipe, copied, models.text)
        self._first = np.cumsum([0, *(arm.groups for arm in arms)]).tolist()
        self._adapters = {}
        for noise_expert, backbone in copied.items():
            groups = []
            for index, arm in enumerate(arms):
                ranks = resolve_targets([TargetRule(None, dict.fromkeys(PROJECTIONS, arm.rank))],
                                        len(backbone.transformer.blocks))
                for group in range(arm.groups):
                    state = initial_state(backbone.transformer, ranks, None, SEED, noise_expert.value, group)
                    groups.append(Group(f"{index}.{group}", state, True))
            self._adapters[noise_expert] = attach(backbone.transformer, groups, gates_required=True)
            backbone.transformer.to(self._device)
        rows = [arm.rank * arm.groups for arm in arms]
        arm_of_row = torch.arange(len(arms)).repeat_interleave(torch.tensor(rows)).to(self._device)
        parameters: list[Tensor] = [p for a in self._adapters.values() for p in a.parameters().values()]
        self._optimizer = RowAdam(parameters, arm_of_row, len(arms))
        self._arm_of_sample = torch.arange(len(arms)).repeat_interleave(torch.tensor([a.batch for a in arms]))
        self._generator = torch.Generator(self._device).manual_seed(SEED)
        self._rng = np.random.default_rng(SEED)

    def _gates(self, arm_of_sample: Tensor, named: Tensor) -> Tensor:
        """[B, groups of all arms]: 1 at the sample's LoRA."""
        first = torch.tensor(self._first[:-1])[arm_of_sample].to(self._device)
        chosen = torch.tensor([arm.chosen for arm in self.arms])[arm_of_sample].to(self._device)
        return torch.nn.functional.one_hot(first + chosen * named, self._first[-1]).float()

    @contextmanager
    def only(self, arm: Arm, named: Tensor, acting: tuple[NoiseExpert, ...] = tuple(NoiseExpert)) -> Iterator[Models]:
        """The models with one arm's LoRAs of the instruments in `named` [B], on the noise experts in `acting`."""
        gates = self._gates(torch.full((len(named),), self.arms.index(arm)), named)
        with ExitStack() as scopes:
            for noise_expert, adapter in self._adapters.items():
                scopes.enter_context(adapter.holder.scope(gates * float(noise_expert in acting)))
            yield self.models

    def train(self, until: int) -> None:
        """Go on until `until` steps are done."""
        arm_of_sample = self._arm_of_sample.to(self._device)
        region = torch.tensor([arm.region for arm in self.arms], device=self._device)[arm_of_sample]
        share = torch.tensor([1 / arm.batch for arm in self.arms], device=self._device)[arm_of_sample]
        batch = len(arm_of_sample)
        sigma_bands = bands(BOUNDARY if len(self.models.noise_experts) > 1 else None)
        for step in range(self.done, until):
            chosen = torch.from_numpy(np.concatenate([self._rng.integers(arm.clips, size=arm.batch)
                                                      for arm in self.arms])).to(self._device)
            x0, text = self._clips.x0[chosen], self._clips.text.take(chosen)
            head = self._clips.head[chosen]
            gates = self._gates(self._arm_of_sample, self._clips.named[chosen])
            for noise_expert in self.models.noise_experts:
                u = torch.rand(batch, device=self._device, generator=self._generator)
                band = sigma_bands[noise_expert]
                sampler = Shifted(Uniform(), self.models.recipe.diffusion.shifts[noise_expert.value])
                sigma = draw_in_band(sampler, u, band.low, band.high).float()
                noise = torch.randn(x0.shape, device=self._device, generator=self._generator)
                with self._adapters[noise_expert].holder.scope(gates):
                    v = self.models.velocity(noise_expert, add_noise(x0, noise, sigma), sigma, text, None)
                    error = (v - velocity_target(x0, noise)).square().mean(dim=1)
                    loss_B = error.flatten(1).mean(dim=1) + region * roi_loss(error, head)
                    torch.autograd.backward((share * loss_B).sum())
            lr = [arm.lr_at(step, self._steps) for arm in self.arms]
            self._optimizer.step(torch.tensor(lr, device=self._device))
        self.done = until
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # for those who time it
