"""Stage 2: a mixture of LoRA experts on both noise experts, with a learned router and timestep gates.

    L = L_flow + λ_roi·L_roi + λ_ent·L_entropy + λ_bal·L_balance + λ_kl·L_teacher_kl

Shapes: B samples, E experts, G gate columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwan import rng
from lapwan.caching.collate import Batch
from lapwan.diagnostics.router_health import RoutingTotals
from lapwan.errors import UserError
from lapwan.lora.attach import Adapter
from lapwan.lora.dropout import Dropout, DropoutRates
from lapwan.losses import routing
from lapwan.moe.mixture import BASE_GROUP, Mixture
from lapwan.moe.mixture_file import write_mixture
from lapwan.names import NoiseExpert
from lapwan.rng import RandomKey
from lapwan.train.clip_store import LABEL_FIRST
from lapwan.train.objective import AllReduce, Draws, Loss, Objective, ParameterGroup, flow_terms, local_sum
from lapwan.train.run_state import SavedState, Steps, as_saved
from lapwan.wan.backbone import WanBackbone

ROUTER, SHARED = "router", "experts"


@dataclass(frozen=True)
class MixtureWeights:
    """Weights of the loss terms and the numbers they need."""

    roi: float = 3.0
    entropy: float = 0.02
    balance: float = 0.1
    teacher_kl: float = 1.0
    teacher_kl_end: float | None = None
    steps: int = 1  # of the run, over which the weight of the teacher goes to `teacher_kl_end`
    teacher_temperature: float = 0.35
    entropy_floor: float = 0.5  # nats
    usage_decay: float = 0.99
    alpha_base: float = 1.0
    router_lr_scale: float = 1.0
    gate_lr_scale: float = 1.0
    expert_dropout: float = 0.0

    def teacher_at(self, step: int) -> float:
        """λ_kl at a step of the run, linear from `teacher_kl` to `teacher_kl_end`."""
        if self.teacher_kl_end is None:
            return self.teacher_kl
        return self.teacher_kl + (self.teacher_kl_end - self.teacher_kl) * min(1.0, step / max(1, self.steps - 1))


@dataclass
class _StepStatistics:
    """Over all samples of one optimizer step."""

    mean_entropy: float
    labelled_share: float
    teacher_kl: float


class _MixtureObjectiveState(SavedState):
    usage_E: Tensor
    totals: Tensor
    steps: Steps


class MixtureObjective(Objective):
    """Routes each sample, sets its gates, and holds them until the backward is done."""

    state_type = _MixtureObjectiveState

    def __init__(
        self,
        mixture: Mixture,
        backbones: Mapping[NoiseExpert, WanBackbone],
        adapters: Mapping[NoiseExpert, Adapter],
        weights: MixtureWeights,
        name: str,
        metadata: Mapping[str, str],
        empty_text: Tensor | None = None,
        dropout: Mapping[NoiseExpert, DropoutRates] | None = None,
    ) -> None:
        self.mixture, self.weights = mixture, weights
        self.backbones, self.adapters = dict(backbones), dict(adapters)
        self._name, self._metadata, self._empty_text = name, metadata, empty_text
        self._device = next((p.device for p in mixture.parameters()), torch.device("cpu"))
        experts = len(mixture.families)
        self.usage_E = torch.full((experts,), 1 / experts, dtype=torch.float64, device=self._device)
        self.totals = RoutingTotals.zeros(experts)  # since the start of the run, over all processes
        self._steps = 0
        self._step = _StepStatistics(0.0, 1.0, weights.teacher_at(0))
        self._dropout = {e: Dropout((dropout or {}).get(e, DropoutRates()), a.layers) for e, a in adapters.items()}
        self.parameter_groups = self._parameter_groups()

    def _parameter_groups(self) -> dict[str, list[ParameterGroup]]:
        by_optimizer: dict[str, list[ParameterGroup]] = {}
        if self.mixture.spec.shared_experts:
            first = next(iter(self.adapters.values()))
            by_optimizer[SHARED] = [ParameterGroup({f"{SHARED}.{n}": p for n, p in first.parameters().items()})]
        for noise_expert, adapter in self.adapters.items():
            prefix, shared = noise_expert.value, SHARED in by_optimizer
            experts = {} if shared else {f"{prefix}.{n}": p for n, p in adapter.parameters().items()}
            gate = {f"{prefix}.timestep_gate.values_K": self.mixture.timestep_gate(noise_expert).values_K}
            groups = [ParameterGroup(experts), ParameterGroup(gate, self.weights.gate_lr_scale)]
            by_optimizer[noise_expert.value] = [group for group in groups if group.parameters]
        router = {f"{ROUTER}.{n}": p for n, p in self.mixture.router.named_parameters()}
        if router:  # the rule router has nothing to learn
            by_optimizer[ROUTER] = [ParameterGroup(router, self.weights.router_lr_scale)]
        return by_optimizer

    def optimizers_for(self, noise_expert: NoiseExpert) -> tuple[str, ...]:
        return tuple(name for name in self.parameter_groups if name in (SHARED, noise_expert.value, ROUTER))

    def _route(self, batch: Batch, draws: Draws | None) -> Tensor:
        return self.mixture.route(batch.text, _labels(batch), None if draws is None else draws.sigma_B)

    def prepare(
        self, noise_expert: NoiseExpert, batches: Sequence[Batch], all_reduce: AllReduce = local_sum,
        draws: Sequence[Draws] = (),
    ) -> Sequence[Batch]:
        """Mean entropy and usage over the step, so that its loss does not depend on how it is cut into batches."""
        w = self.weights
        draws_or_none: Sequence[Draws | None] = draws or [None] * len(batches)
        with torch.no_grad():
            student_BE = torch.cat([self._route(b, d) for b, d in zip(batches, draws_or_none, strict=True)]).double()
            label_BE = torch.cat([_labels(b) for b in batches]).double()
            labelled_B = torch.cat([~b.fallback_B for b in batches]).double()
            kl_B = routing.teacher_kl(student_BE, routing.teacher(label_BE, w.teacher_temperature))
            local = RoutingTotals.of(
                student_BE, self.mixture.select(student_BE), label_BE, labelled_B, routing.entropy(student_BE), kl_B)
            step = RoutingTotals(all_reduce(local.flat).cpu(), local.experts)
        self.usage_E = routing.update_usage(self.usage_E, step.usage_E.to(self._device), w.usage_decay)
        self.totals = self.totals + step
        self._step = _StepStatistics(step.entropy, step.labelled / step.clips, w.teacher_at(self._steps))
        self._steps += 1
        return batches

    @contextmanager
    def loss(self, noise_expert: NoiseExpert, batch: Batch, draws: Draws) -> Iterator[Loss]:
        """Route, then forward and (in the caller's block) backward under the same gates."""
        adapter, w = self.adapters[noise_expert], self.weights
        families, labelled = _labels(batch).argmax(dim=1).tolist(), (~batch.fallback_B).tolist()
        student_BE = self._route(batch, draws)
        mix_BE = self.drop_experts(self.mixture.select(student_BE), draws.keys)
        alpha_base = w.alpha_base if BASE_GROUP in adapter.group_names else None
        gates_BG = self.mixture.gates(noise_expert, mix_BE, draws.sigma_B, alpha_base=alpha_base)
        with adapter.holder.scope(gates_BG), self._dropout[noise_expert].scope(adapter.holder, draws.keys):
            loss = flow_terms(self.backbones[noise_expert], batch, draws, w.roi, self._empty_text)
            self._add_routing(loss, student_BE, mix_BE, batch)
            self._add_figures(loss, student_BE, mix_BE, families, labelled)
            yield loss

    def drop_experts(self, mix_BE: Tensor, keys: Sequence[RandomKey]) -> Tensor:
        """Expert dropout: each expert of a clip is dropped with probability p, the others are scaled to the same sum.

        A mix that would lose all its experts is left unchanged. Keyed by visit; without keys nothing is dropped.
        """
        rate = self.weights.expert_dropout
        if not (rate and keys):
            return mix_BE
        uniform = [torch.rand(mix_BE.shape[1], generator=rng.generator(*key, "expert dropout")) for key in keys]
        kept_BE = mix_BE * (torch.stack(uniform) >= rate).to(mix_BE)
        sum_B1 = kept_BE.sum(dim=1, keepdim=True)
        scaled_BE = kept_BE * (mix_BE.sum(dim=1, keepdim=True) / sum_B1.clamp_min(1e-12))
        return torch.where(sum_B1 > 0, scaled_BE, mix_BE)

    def _add_routing(self, loss: Loss, student_BE: Tensor, mix_BE: Tensor, batch: Batch) -> None:
        w = self.weights
        dtype = loss.terms["loss/diffusion"].dtype
        hinge_B = routing.entropy_hinge(student_BE, self._step.mean_entropy, w.entropy_floor)
        balance_B = routing.balance(self.usage_E, student_BE)
        kl_B = routing.teacher_kl(student_BE, routing.teacher(_labels(batch), w.teacher_temperature))
        if ROUTER in self.parameter_groups:
            # The mean over the labelled samples of the step, written as a mean over all samples.
            kl_term_B = kl_B * ~batch.fallback_B / max(self._step.labelled_share, 1e-12)
            loss.terms["loss/routing_entropy"] = (w.entropy * hinge_B).to(dtype)
            loss.terms["loss/routing_load_balance"] = (w.balance * balance_B).to(dtype)
            loss.terms["loss/teacher_kl"] = (self._step.teacher_kl * kl_term_B).to(dtype)
            if w.teacher_kl_end is not None:
                loss.figures["metrics/teacher_kl_weight"] = torch.full_like(balance_B.detach(), self._step.teacher_kl)
        loss.figures["loss/routing_load_balance"] = balance_B.detach()
        loss.figures["loss/teacher_kl"] = kl_B.detach()

    def _add_figures(
        self, loss: Loss, student_BE: Tensor, mix_BE: Tensor, families: Sequence[int], labelled: Sequence[bool]
    ) -> None:
        """Routing figures, and the flow loss by family."""
        student_BE, mix_BE = student_BE.detach(), mix_BE.detach()
        with_label = [i for i, has_label in enumerate(labelled) if has_label]
        loss.figures["loss/routing_entropy"] = routing.entropy(student_BE)
        loss.figures["loss/teacher_kl"] = _select(loss.figures["loss/teacher_kl"], with_label)
        chosen_B = student_BE.argmax(dim=1)
        right_B = torch.stack([chosen_B[i] == family for i, family in enumerate(families)]).float()
        loss.figures["metrics/routing_accuracy"] = _select(right_B, with_label)
        for index, family in enumerate(self.mixture.families):
            loss.figures[f"metrics/expert_usage_{family}"] = mix_BE[:, index]
            of_family = [i for i, f in enumerate(families) if f == index]
            loss.figures[f"loss_by_family/{family}"] = _select(loss.figures["loss/diffusion"], of_family)

    def state_dict(self) -> dict[str, Any]:
        return {"usage_E": self.usage_E.cpu(), "totals": self.totals.flat, "steps": self._steps}

    def load_state_dict(self, state: _MixtureObjectiveState) -> None:
        self.usage_E = as_saved("the experts' usage", state.usage_E, self.usage_E)
        self.totals = RoutingTotals(as_saved("routing", state.totals, self.totals.flat), self.totals.experts)
        self._steps = state.steps

    def save(self, folder: Path, step: int) -> list[Path]:
        self.mixture.collect(self.adapters)
        path = folder / f"{self._name}.safetensors"
        write_mixture(path, self.mixture, {**self._metadata, "lapwan.step": str(step)})
        return [path]


def _select(values_B: Tensor, indices: Sequence[int]) -> Tensor:
    """The values at indices known on the host; a mask would wait for the device."""
    return torch.stack([values_B[i] for i in indices]) if indices else values_B[:0]


def _labels(batch: Batch) -> Tensor:
    if batch.label_weights_BE is None:
        raise UserError(f"clips without labels in the cache (such as {batch.ids[0]}): {LABEL_FIRST}")
    return batch.label_weights_BE
