"""A mixture of LoRA experts: router, timestep gates and the experts of each noise expert.

    y = W x + α_base·ΔW_base x + w(σ)·Σ_e g_e·α_e·ΔW_e x

Shapes: B samples, D text features, E experts (one per family), G gate columns: E, or 1 + E with a frozen base LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lapwan.lora.attach import Adapter, Group
from lapwan.lora.state import AdapterState
from lapwan.moe.router import RouterShape, router_class, select_top_k
from lapwan.moe.timestep_gate import TimestepGate
from lapwan.names import NoiseExpert

BASE_GROUP = "base"


@dataclass(frozen=True)
class MixtureSpec:
    """A mixture without its tensors; stored in the file's metadata.

    `taxonomy` is the whole taxonomy as a dict, so that hints and prompts mean the same at generation as labels in
    training. `bands` are the noise experts' sigma bands as [low, high]; `base` their base fingerprints; `base_lora`
    path and fingerprint of a frozen base LoRA by noise expert, empty without one. `flow_shift` and `steps` are the
    base model's, which give the sigmas of its sampling grid. `router_sigma`: the router also gets sigma; `gate_ema`
    smooths its output over a video's denoising steps. `shared_experts`: both noise experts have the same LoRA experts.
    """

    families: tuple[str, ...]
    taxonomy: Mapping[str, Any]
    task: str
    bands: Mapping[NoiseExpert, tuple[float, float]]
    text_dim: int
    router: str = "text"
    router_temperature: float = 1.0
    top_k: int = 2
    knots: int = 8
    base: Mapping[NoiseExpert, str] = field(default_factory=dict)
    base_lora: Mapping[NoiseExpert, Mapping[str, str]] = field(default_factory=dict)
    flow_shift: float = 5.0
    steps: int = 40
    router_sigma: bool = False
    gate_ema: float = 0.0
    shared_experts: bool = False


class Mixture(nn.Module):
    """Router and timestep gates as modules, and each noise expert's LoRA experts as states by family.

    During training the experts are in the transformers' adapters; `collect` copies them back for saving.

    Args:
        spec: what the mixture's file says of it; sizes and kinds of its modules.
        states: LoRA experts by noise expert and family.
    """

    def __init__(self, spec: MixtureSpec, states: Mapping[NoiseExpert, Mapping[str, AdapterState]]) -> None:
        super().__init__()
        self.spec = spec
        self.states: dict[NoiseExpert, dict[str, AdapterState]] = {e: dict(s) for e, s in states.items()}
        shape = RouterShape(spec.text_dim, len(spec.families), spec.router_temperature, spec.router_sigma)
        self.router = router_class(spec.router).make(shape)
        self.timestep_gates = nn.ModuleDict(
            {noise_expert.value: TimestepGate(*band, knots=spec.knots) for noise_expert, band in spec.bands.items()}
        )

    @property
    def families(self) -> tuple[str, ...]:
        """Keys of the families, in the taxonomy's order, which is that of the experts."""
        return self.spec.families

    @property
    def taxonomy(self) -> Mapping[str, Any]:
        """The taxonomy the mixture was trained with, as a dict."""
        return self.spec.taxonomy

    @property
    def noise_experts(self) -> tuple[NoiseExpert, ...]:
        """The noise experts that have LoRA experts."""
        return tuple(self.states)

    @property
    def one_transformer(self) -> bool:
        """Whether it is for a model of one transformer: its band is all of sigma."""
        return list(self.spec.bands.values()) == [(0.0, 1.0)]

    @property
    def base_lora(self) -> Mapping[NoiseExpert, Mapping[str, str]]:
        """Path and fingerprint of the frozen base LoRA the mixture was trained over, by noise expert."""
        return self.spec.base_lora

    def groups(self, noise_expert: NoiseExpert, base_lora: AdapterState | None, trainable: bool = False) -> list[Group]:
        """Groups to attach to a noise expert's transformer: the frozen base LoRA, if any, then one per family.

        Args:
            noise_expert: whose experts.
            base_lora: the frozen base LoRA; None without one.
            trainable: whether the experts are trained.
        """
        base = [Group(BASE_GROUP, base_lora, trainable=False)] if base_lora is not None else []
        return base + [Group(family, self.states[noise_expert][family], trainable) for family in self.families]

    def timestep_gate(self, noise_expert: NoiseExpert) -> TimestepGate:
        """w(σ) of a noise expert."""
        return cast(TimestepGate, self.timestep_gates[noise_expert.value])

    def route(
        self, text: Sequence[Tensor], labels_BE: Tensor | None = None, sigma_B: Tensor | None = None
    ) -> Tensor:
        """The router's probabilities before top-k: [B, E].

        Args:
            text: one unpadded [n, D] tensor per sample.
            labels_BE: label weights, for routers that read them.
            sigma_B: for a router with sigma (`spec.router_sigma`); else ignored.
        """
        probabilities: Tensor = self.router(text, labels_BE, sigma_B)
        return probabilities

    def route_over_sigmas(
        self, text: Sequence[Tensor], labels_1E: Tensor | None, sigmas: Sequence[float]
    ) -> list[Tensor]:
        """ḡ_i = β·ḡ_{i−1} + (1 − β)·g_i with ḡ_0 = g_0: one video's mixes [1, E] over its denoising steps.

        g_i is the selected mix at the i-th sigma and β is `spec.gate_ema`, so that the experts change gradually.

        Args:
            text: the prompt's features, one unpadded [n, D] tensor.
            labels_1E: label weights, for routers that read them.
            sigmas: of the denoising steps, in their order.
        """
        mixes: list[Tensor] = []
        for sigma in sigmas:
            mix_1E = self.select(self.route(text, labels_1E, torch.tensor([sigma])))
            mixes.append(torch.lerp(mix_1E, mixes[-1], self.spec.gate_ema) if mixes else mix_1E)
        return mixes

    def select(self, probabilities_BE: Tensor) -> Tensor:
        """The mix g: top-k of a learned router's probabilities, or the rule router's label weights.

        Args:
            probabilities_BE: see `route`.
        """
        return select_top_k(probabilities_BE, self.spec.top_k) if self.router.learned else probabilities_BE

    def gates(
        self,
        noise_expert: NoiseExpert,
        mix_BE: Tensor,
        sigma_B: Tensor,
        alpha_expert_E: Tensor | None = None,
        alpha_base: float | None = None,
    ) -> Tensor:
        """[α_base | w(σ)·g·α_e] per sample: [B, G], with gradient to router and timestep gate.

        Args:
            noise_expert: whose timestep gate.
            mix_BE: g, weights of the experts.
            sigma_B: noise level of each sample.
            alpha_expert_E: α_e by family; None: 1.
            alpha_base: gate of the base group; None when there is none.
        """
        gates: Tensor = self.timestep_gate(noise_expert)(sigma_B)[:, None] * mix_BE
        if alpha_expert_E is not None:
            gates = gates * alpha_expert_E.to(gates)
        if alpha_base is None:
            return gates
        return torch.cat([gates.new_full((gates.shape[0], 1), alpha_base), gates], dim=1)

    def collect(self, adapters: Mapping[NoiseExpert, Adapter]) -> None:
        """Copy the experts' tensors out of the adapters, for saving."""
        for noise_expert, adapter in adapters.items():
            self.states[noise_expert] = {family: adapter.state(family) for family in self.families}
