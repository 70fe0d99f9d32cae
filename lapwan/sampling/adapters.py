"""The LoRAs and the mixture a generation runs with: which file acts on which noise expert, and how strongly.

Shapes: B samples (1 here), E experts of the mixture, G gate columns: the LoRAs, the mixture's base LoRA, its experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lapwan.console import warn
from lapwan.errors import UserError
from lapwan.lora.assign import Assigned, assign
from lapwan.lora.attach import Group
from lapwan.lora.formats import LoraFile, open_lora
from lapwan.lora.state import LoraState
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
    state: LoraState
    strength: float

    @property
    def fingerprint(self) -> str:
        """Identity of its tensors, whatever the file's layout."""
        return self.state.fingerprint()


@dataclass(frozen=True)
class AdapterSet:
    """Everything low-rank that acts beside the base's weights in a generation; empty by default."""

    loras: Mapping[NoiseExpert, Sequence[LoraUse]] = field(default_factory=dict)
    mixture: Mixture | None = None
    mixture_path: Path | None = None
    mixture_base: Mapping[NoiseExpert, LoraUse] = field(default_factory=dict)

    def groups(self, noise_expert: NoiseExpert) -> list[Group]:
        """What to attach to a noise expert's transformer, in the order of the gates' columns."""
        found = [Group(f"{use.path.name} #{i}", use.state, False) for i, use in enumerate(self.loras.get(noise_expert, ()))]
        if self.mixture is not None and noise_expert in self.mixture.noise_experts:
            base = self.mixture_base.get(noise_expert)
            found += self.mixture.groups(noise_expert, None if base is None else base.state)
        return found

    def mixture_fingerprint(self) -> str | None:
        """sha256 of the mixture's file; None without one."""
        return None if self.mixture_path is None else hashlib.sha256(self.mixture_path.read_bytes()).hexdigest()

    def gates(
        self, noise_expert: NoiseExpert, sigma: float, mix_BE: Tensor | None, alpha_base: float, alpha_expert_E: Tensor | None
    ) -> Tensor:
        """[strengths | α_base | w(σ)·g·α_e] for one noise expert at one sigma: [1, G]."""
        strengths = torch.tensor([[use.strength for use in self.loras.get(noise_expert, ())]], dtype=torch.float32)
        if self.mixture is None or noise_expert not in self.mixture.noise_experts:
            return strengths
        if mix_BE is None:
            raise ValueError("a mixture needs a mix")
        base = self.mixture_base.get(noise_expert)
        own = self.mixture.gates(
            noise_expert, mix_BE, torch.tensor([sigma]), alpha_expert_E,
            None if base is None else alpha_base * base.strength,
        )
        return torch.cat([strengths, own], dim=1)


def read_adapters(
    base: Base, loras: Sequence[LoraArgument], moe: Path | None, fold: bool = False
) -> tuple[Base, AdapterSet]:
    """Read and check every adapter against the model's headers, before its weights are loaded.

    Args:
        fold: LoRAs go into the base's weights when these are loaded, W + Σ strength·ΔW rounded once to their dtype, as
            `lapwan merge` does; else they act beside them, exactly.

    Returns:
        The base, and the adapters on it. Where a mixture was trained on this base with exactly these LoRAs merged in
        memory, they are merged here too (the base returned has them) and are no adapters.

    Raises:
        UserError: not a LoRA (or not a mixture), for the other noise expert, for another model, or a noise expert
            that neither the file nor the user names; a mixture's base LoRA that cannot be found.
    """
    assigned = assign([(lora.noise_expert, lora.path, lora.strength) for lora in loras], base.spec.noise_experts)
    for noise_expert, files in assigned.items():
        shapes = tensor_shapes(weight_files(base.spec.component(noise_expert)))
        for file, _ in files:
            _check_lora(file, base, noise_expert, shapes)
    merged = Base(base.spec, {e: [*base.loras.get(e, ()), *assigned.get(e, ())] for e in base.spec.noise_experts})
    if moe is None:
        return (merged, AdapterSet()) if fold else (base, AdapterSet(_uses(assigned)))
    if fold:
        raise UserError(f"--fold puts LoRAs into the weights once; the gates of the mixture {moe} change from step to "
                        "step and need what they act on beside them; leave --fold out")
    recorded = read_mixture(moe).spec.base
    if assigned and recorded and all(merged.fingerprint(e) == print_ for e, print_ in recorded.items()):
        mixture, uses, base = read_mixture(moe, merged), {}, merged
    else:
        mixture, uses = read_mixture(moe, base), _uses(assigned)
    bases = {noise_expert: _base_lora(mixture, moe, noise_expert, uses.get(noise_expert, ())) for noise_expert in mixture.base_lora}
    left = {noise_expert: [use for use in used if use is not bases.get(noise_expert)] for noise_expert, used in uses.items()}
    return base, AdapterSet(left, mixture, moe, bases)


def _uses(assigned: Assigned) -> dict[NoiseExpert, list[LoraUse]]:
    return {
        noise_expert: [LoraUse(file.path, file.read(), strength) for file, strength in files]
        for noise_expert, files in assigned.items()
    }


def _check_lora(file: LoraFile, base: Base, noise_expert: NoiseExpert, shapes: Mapping[str, tuple[int, ...]]) -> None:
    task = file.metadata.get("lapwan.task")
    if task and task != base.task:
        warn(f"{file.path} was trained for {task}; this model is {base.task}")
    for path, module in file.modules.items():
        have = shapes.get(f"{path}.weight")
        if have is None:
            raise UserError(f"{file.path} has module '{path}', which {base.spec.component(noise_expert)} does not; it was "
                            "made for another model")
        if have != tuple(module.shape):
            raise UserError(f"{file.path}: '{path}' is {module.shape[1]} -> {module.shape[0]} features, the model's is "
                            f"{have[1]} -> {have[0]}; it was made for another model")


def _base_lora(mixture: Mixture, moe: Path, noise_expert: NoiseExpert, given: Sequence[LoraUse]) -> LoraUse:
    """The LoRA the mixture was trained over: a `--lora` of the same fingerprint, else the recorded file."""
    recorded = mixture.base_lora[noise_expert]
    for use in given:
        if use.fingerprint == recorded["fingerprint"]:
            return use
    path = Path(recorded["path"])
    for candidate in dict.fromkeys((moe.parent / path, moe.parent / path.name, path)):
        if not candidate.is_file():
            continue
        files = open_lora(candidate)
        file = files.get(noise_expert) or files.get(None)
        if file is not None and (state := file.read()).fingerprint() == recorded["fingerprint"]:
            return LoraUse(candidate, state, 1.0)
    raise UserError(
        f"{moe} was trained over a base LoRA for the {noise_expert.value} noise expert ({path}, fingerprint "
        f"{recorded['fingerprint'][:12]}), which is not there or has changed; pass it with --lora {noise_expert.value}=FILE"
    )
