"""The LoRAs and the mixture of a generation: which file acts on which noise expert, and with what strength.

Shapes: B samples (1 here), E experts of the mixture, G gate columns: the LoRAs, the mixture's base LoRA, its experts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lapwan.console import log
from lapwan.errors import UserError
from lapwan.lora.adapter_file import AdapterFile, AdapterModule
from lapwan.lora.assign import Assigned, LoraRequest, assign, report, warn_mismatch
from lapwan.lora.attach import Group
from lapwan.lora.formats import KeyRule, open_for_use
from lapwan.lora.merge import is_linear, plan_terms
from lapwan.lora.state import AdapterState
from lapwan.models.base import Base
from lapwan.models.spec import tensor_shapes, weight_files
from lapwan.moe.mixture import Mixture
from lapwan.moe.mixture_file import read_mixture
from lapwan.names import NoiseExpert
from lapwan.settings.lora_argument import LoraArgument


@dataclass(frozen=True)
class LoraUse:
    """One LoRA on one noise expert; ΔW is multiplied by `strength`."""

    path: Path
    state: AdapterState
    strength: float

    @property
    def fingerprint(self) -> str:
        """Hash of its tensors, independent of the file's layout."""
        return self.state.fingerprint()


@dataclass(frozen=True)
class AdapterSet:
    """All adapters applied on top of the base's weights; empty by default."""

    loras: Mapping[NoiseExpert, Sequence[LoraUse]] = field(default_factory=dict)
    mixture: Mixture | None = None
    mixture_path: Path | None = None
    mixture_base: Mapping[NoiseExpert, LoraUse] = field(default_factory=dict)

    def groups(self, noise_expert: NoiseExpert) -> list[Group]:
        """The groups to attach to a noise expert's transformer, in the order of the gates' columns."""
        groups = [Group(f"{use.path.name} #{i}", use.state, False)
                  for i, use in enumerate(self.loras.get(noise_expert, ()))]
        if self.mixture is not None and noise_expert in self.mixture.noise_experts:
            base = self.mixture_base.get(noise_expert)
            groups += self.mixture.groups(noise_expert, None if base is None else base.state)
        return groups

    def mixture_fingerprint(self) -> str | None:
        """sha256 of the mixture's file; None without one."""
        return None if self.mixture_path is None else hashlib.sha256(self.mixture_path.read_bytes()).hexdigest()

    def gates(
        self, noise_expert: NoiseExpert, sigma: float, mix_BE: Tensor | None, alpha_base: float,
        alpha_expert_E: Tensor | None,
    ) -> Tensor:
        """[strengths | α_base | w(σ)·g·α_e] for one noise expert at one sigma: [1, G]."""
        strengths = torch.tensor([[use.strength for use in self.loras.get(noise_expert, ())]], dtype=torch.float32)
        if self.mixture is None or noise_expert not in self.mixture.noise_experts:
            return strengths
        if mix_BE is None:
            raise ValueError("a mixture needs a mix")
        base = self.mixture_base.get(noise_expert)
        mixture_gates = self.mixture.gates(
            noise_expert, mix_BE, torch.tensor([sigma]), alpha_expert_E,
            None if base is None else alpha_base * base.strength,
        )
        return torch.cat([strengths, mixture_gates], dim=1)


def read_adapters(
    base: Base, loras: Sequence[LoraArgument], moe: Path | None, fold: bool = False,
    rule: KeyRule = "default", reported: set[str] | None = None,
) -> tuple[Base, AdapterSet]:
    """Read and check every adapter against the model's headers, before its weights are loaded.

    Args:
        fold: merge the LoRAs into the base's weights while loading, W + Σ strength·ΔW rounded once to their dtype, as
            `lapwan merge` does. Else low-rank pairs stay separate, without rounding, and other updates (full deltas,
            LoKr, LoHa, GLoRA, DoRA) are merged.
        rule: what of a file may be dropped.
        reported: lines about files that are not printed again.

    Returns:
        The base and its adapters. If a mixture was trained on this base with exactly these LoRAs merged in memory, they
        are merged into the returned base here too, instead of being adapters.

    Raises:
        UserError: a file that is not a LoRA (or not a mixture), or is for the other noise expert or another model; a
            LoRA whose noise expert is unknown; a mixture's base LoRA that cannot be found.
    """
    requests = [LoraRequest(lora.noise_expert, lora.path, lora.strength, lora.only or ()) for lora in loras]
    assigned = assign(requests, base.spec.noise_experts, rule, base.spec.one_transformer)
    result = _apply(base, assigned, moe, fold)
    report((file for files in assigned.values() for file, _ in files), reported)
    return result


def _apply(base: Base, assigned: Assigned, moe: Path | None, fold: bool) -> tuple[Base, AdapterSet]:
    """`read_adapters` of files that are assigned."""
    for noise_expert, files in assigned.items():
        shapes = tensor_shapes(weight_files(base.spec.component(noise_expert)))
        for file, _ in files:
            _check_lora(file, base, noise_expert, shapes)
            plan_terms(weight_files(base.spec.component(noise_expert)), [(file, 1.0)])
            file.check_finite()
    merged = Base(base.spec, {e: [*base.loras.get(e, ()), *assigned.get(e, ())] for e in base.spec.noise_experts})
    if moe is None:
        if fold:
            return merged, AdapterSet()
        base, uses = _beside(base, assigned)
        return base, AdapterSet(uses)
    if fold:
        raise UserError(f"--fold merges LoRAs into the weights, but the gates of the mixture {moe} change from step to "
                        "step; leave --fold out")
    recorded = read_mixture(moe).spec.base
    if assigned and recorded and all(merged.fingerprint(e) == fingerprint for e, fingerprint in recorded.items()):
        mixture, uses, base = read_mixture(moe, merged), {}, merged
    else:
        mixture = read_mixture(moe, base)
        base, uses = _beside(base, assigned)
    bases = {e: _base_lora(mixture, moe, e, uses.get(e, ())) for e in mixture.base_lora}
    others = {e: [use for use in used if use is not bases.get(e)] for e, used in uses.items()}
    return base, AdapterSet(others, mixture, moe, bases)


def _beside(base: Base, assigned: Assigned) -> tuple[Base, dict[NoiseExpert, list[LoraUse]]]:
    """The low-rank pairs, which act beside the weights, and the base that merges all other updates when it is loaded.
    """
    uses: dict[NoiseExpert, list[LoraUse]] = {}
    merged: dict[NoiseExpert, list[tuple[AdapterFile, float]]] = {}
    for noise_expert, files in assigned.items():
        uses[noise_expert] = []
        for file, strength in files:
            pairs = {path: module for path, module in file.modules.items() if _acts_beside(path, module)}
            others = {path: module for path, module in file.modules.items() if path not in pairs}
            if pairs:
                uses[noise_expert].append(LoraUse(file.path, replace(file, modules=pairs).read(), strength))
            if others:
                merged.setdefault(noise_expert, []).append((replace(file, modules=others), strength))
                kinds = Counter(module.kind for module in others.values())
                counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
                title = base.spec.title_of(noise_expert)
                log(f"{file.path.name}: {counts} merged into the {title}'s weights at load")
    if merged:
        base = Base(base.spec, {e: [*base.loras.get(e, ()), *merged.get(e, ())] for e in base.spec.noise_experts})
    return base, uses


def _acts_beside(path: str, module: AdapterModule) -> bool:
    """A low-rank pair of a Linear; one of the patch embedding has the kernel in its columns."""
    return module.stackable and is_linear(path)


def _check_lora(
    file: AdapterFile, base: Base, noise_expert: NoiseExpert, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    warn_mismatch(file, base.task)
    for path, module in file.modules.items():
        if not _acts_beside(path, module):
            continue  # checked by the plan of its merge
        shape = shapes.get(f"{path}.weight")
        if shape is None:
            raise UserError(f"{file.path} has module '{path}', which {base.spec.component(noise_expert)} lacks; "
                            f"{file.other_model()}")
        if shape != tuple(module.shape):
            raise UserError(f"{file.path}: '{path}' is {module.shape[1]} -> {module.shape[0]} features, but the "
                            f"model's is {shape[1]} -> {shape[0]}; {file.other_model()}")


def _base_lora(mixture: Mixture, moe: Path, noise_expert: NoiseExpert, given: Sequence[LoraUse]) -> LoraUse:
    """The LoRA the mixture was trained on: a `--lora` with the same fingerprint, else the recorded file."""
    recorded = mixture.base_lora[noise_expert]
    for use in given:
        if use.fingerprint == recorded["fingerprint"]:
            return use
    path = Path(recorded["path"])
    for candidate in dict.fromkeys((moe.parent / path, moe.parent / path.name, path)):
        if not candidate.is_file():
            continue
        files = open_for_use(candidate)
        file = files.get(noise_expert) or files.get(None)
        if file is not None and (state := file.read()).fingerprint() == recorded["fingerprint"]:
            return LoraUse(candidate, state, 1.0)
    raise UserError(
        f"{moe} was trained over a base LoRA for the {noise_expert.value} noise expert ({path}, fingerprint "
        f"{recorded['fingerprint'][:12]}), which is missing or has changed; pass it with "
        f"--lora {noise_expert.value}=FILE"
    )
