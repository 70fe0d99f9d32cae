"""Stage 2: a mixture of LoRA experts on both noise experts, a learned router, timestep gates.

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

from lapwan.data.batch import Batch
from lapwan.errors import UserError
from lapwan.lora.attach import Adapter
from lapwan.lora.dropout import Dropout, DropoutRates
from lapwan.losses import routing
from lapwan.moe.file import write_mixture
from lapwan.moe.mixture import BASE_GROUP, Mixture
from lapwan.names import NoiseExpert
from lapwan.train.objective import Draws, Loss, ParameterGroup, Total, alone, flow_terms

ROUTER = "router"


@dataclass(frozen=True)
class MixtureWeights:
    """Weights of the loss's terms and what they need; the defaults are the users' recipe."""

    roi: float = 3.0
    entropy: float = 0.02
    balance: float = 0.1
    teacher_kl: float = 1.0
    teacher_temperature: float = 0.35
    entropy_floor: float = 0.5  # nats
    usage_decay: float = 0.99
    alpha_base: float = 1.0
    router_lr_scale: float = 1.0
    gate_lr_scale: float = 1.0


@dataclass
class _StepStatistics:
    """Over all samples of one optimiser step."""

    mean_entropy: float
    labelled_share: float


class MixtureObjective:
    """Routes each sample, sets the gates, and holds them until backward is done."""

    def __init__(
        self,
        mixture: Mixture,
        adapters: Mapping[NoiseExpert, Adapter],
        weights: MixtureWeights,
        name: str,
        metadata: Mapping[str, str],
        empty_text: Tensor | None = None,
        dropout: Mapping[NoiseExpert, DropoutRates] | None = None,
    ) -> None:
        self.mixture, self.adapters, self.weights = mixture, dict(adapters), weights
        self._name, self._metadata, self._empty_text = name, metadata, empty_text
        device = next(mixture.parameters()).device
        self.usage_E = torch.full((len(mixture.families),), 1 / len(mixture.families), device=device)
        self._step = _StepStatistics(0.0, 1.0)
        self._dropout = {e: Dropout((dropout or {}).get(e, DropoutRates()), a.layers) for e, a in adapters.items()}
        self.optimised = self._parameter_groups()

    def _parameter_groups(self) -> dict[str, list[ParameterGroup]]:
        found = {}
        for expert, adapter in self.adapters.items():
            gate = {f"{expert.value}.timestep_gate.values_K": self.mixture.timestep_gate(expert).values_K}
            found[expert.value] = [
                ParameterGroup({f"{expert.value}.{n}": p for n, p in adapter.parameters().items()}),
                ParameterGroup(gate, self.weights.gate_lr_scale),
            ]
        router = {f"{ROUTER}.{n}": p for n, p in self.mixture.router.named_parameters()}
        if router:  # the rule router has nothing to learn
            found[ROUTER] = [ParameterGroup(router, self.weights.router_lr_scale)]
        return found

    def stepped_by(self, expert: NoiseExpert) -> tuple[str, ...]:
        return tuple(name for name in self.optimised if name in (expert.value, ROUTER))

    def prepare(self, expert: NoiseExpert, batches: Sequence[Batch], total: Total = alone) -> None:
        """Mean entropy and usage of the whole step, so that its loss does not depend on how it is cut into batches."""
        with torch.no_grad():
            student_BE = torch.cat([self.mixture.route(b.text, _labels(b)) for b in batches])
            labelled_B = torch.cat([~b.fallback_B for b in batches]).to(student_BE)
            sums = [self.mixture.select(student_BE).sum(dim=0), routing.entropy(student_BE).sum().view(1),
                    labelled_B.sum().view(1), labelled_B.new_tensor([len(labelled_B)])]
            summed = total(torch.cat(sums))
            means = summed[:-1] / summed[-1]
            self.usage_E = routing.update_usage(self.usage_E, means[:-2], self.weights.usage_decay)
            self._step = _StepStatistics(float(means[-2]), float(means[-1]))

    @contextmanager
    def loss(self, expert: NoiseExpert, batch: Batch, draws: Draws) -> Iterator[Loss]:
        """Gates first, then the forward, then (in the caller's block) the backward, all under the same gates."""
        adapter, w = self.adapters[expert], self.weights
        student_BE = self.mixture.route(batch.text, _labels(batch))
        mix_BE = self.mixture.select(student_BE)
        alpha_base = w.alpha_base if BASE_GROUP in adapter.group_names else None
        gates_BG = self.mixture.gates(expert, mix_BE, draws.sigma_B, alpha_base=alpha_base)
        with adapter.holder.scope(gates_BG), self._dropout[expert].scope(adapter.holder, draws.keys):
            loss = flow_terms(adapter.transformer, batch, draws, w.roi, self._empty_text)
            self._add_routing(loss, student_BE, mix_BE, batch)
            yield loss

    def _add_routing(self, loss: Loss, student_BE: Tensor, mix_BE: Tensor, batch: Batch) -> None:
        w = self.weights
        dtype = loss.terms["loss/diffusion"].dtype
        hinge_B = routing.entropy_hinge(student_BE, self._step.mean_entropy, w.entropy_floor)
        balance_B = routing.balance(self.usage_E, student_BE)
        teacher_BE = routing.teacher(_labels(batch), w.teacher_temperature)
        labelled_B = ~batch.fallback_B
        kl_B = routing.teacher_kl(student_BE, teacher_BE)
        if ROUTER in self.optimised:
            # A mean over the labelled samples of the step, written as a mean over all of them.
            kl_term_B = kl_B * labelled_B / max(self._step.labelled_share, 1e-12)
            loss.terms["loss/routing_entropy"] = (w.entropy * hinge_B).to(dtype)
            loss.terms["loss/routing_load_balance"] = (w.balance * balance_B).to(dtype)
            loss.terms["loss/teacher_kl"] = (w.teacher_kl * kl_term_B).to(dtype)
        loss.figures["loss/routing_entropy"] = routing.entropy(student_BE).detach()
        loss.figures["loss/routing_load_balance"] = balance_B.detach()
        loss.figures["loss/teacher_kl"] = kl_B.detach()[labelled_B]
        for index, family in enumerate(self.mixture.families):
            loss.figures[f"metrics/expert_usage_{family}"] = mix_BE.detach()[:, index]
        right_B = (student_BE.argmax(dim=1) == _labels(batch).argmax(dim=1)).float()
        loss.figures["metrics/routing_accuracy"] = right_B[labelled_B]

    def state_dict(self) -> dict[str, Any]:
        return {"usage_E": self.usage_E.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.usage_E = state["usage_E"].to(self.usage_E.device)

    def save(self, folder: Path, step: int) -> list[Path]:
        self.mixture.collect(self.adapters)
        path = folder / f"{self._name}.safetensors"
        write_mixture(path, self.mixture, {**self._metadata, "lapwan.step": str(step)})
        return [path]


def _labels(batch: Batch) -> Tensor:
    if batch.label_weights_BE is None:
        raise UserError(f"clips without labels in the cache (such as {batch.ids[0]}): run `lapwan label` before "
                        "`lapwan cache`, or give labels = \"labels.jsonl\" in [data]")
    return batch.label_weights_BE
