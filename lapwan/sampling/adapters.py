"""The LoRAs and the mixture a generation runs with: which file acts on which noise expert, and how strongly.

Shapes: B samples (1 here), E experts of the mixture, G gate columns: the LoRAs, the mixture's base LoRA, its experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lapwan.console import warn
from lapwan.errors import UserError
from lapwan.lora.attach import Group
from lapwan.lora.formats import LoraFile, open_lora, read_lora
from lapwan.lora.state import LoraState
from lapwan.lora.tensorfile import read_header
from lapwan.moe.file import read_mixture
from lapwan.moe.mixture import Mixture
from lapwan.names import NoiseExpert
from lapwan.settings.lora_argument import LoraArgument
from lapwan.wan.folder import ModelSpec, weight_files


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
    """Everything low-rank that acts in a generation; empty by default."""

    loras: Mapping[NoiseExpert, Sequence[LoraUse]] = field(default_factory=dict)
    mixture: Mixture | None = None
    mixture_path: Path | None = None
    mixture_base: Mapping[NoiseExpert, LoraUse] = field(default_factory=dict)

    def groups(self, expert: NoiseExpert) -> list[Group]:
        """What to attach to a noise expert's transformer, in the order of the gates' columns."""
        found = [Group(f"{use.path.name} #{i}", use.state, False) for i, use in enumerate(self.loras.get(expert, ()))]
        if self.mixture is not None and expert in self.mixture.experts:
            base = self.mixture_base.get(expert)
            found += self.mixture.groups(expert, None if base is None else base.state)
        return found

    def gates(
        self, expert: NoiseExpert, sigma: float, mix_BE: Tensor | None, alpha_base: float, alpha_expert_E: Tensor | None
    ) -> Tensor:
        """[strengths | α_base | w(σ)·g·α_e] for one noise expert at one sigma: [1, G]."""
        strengths = torch.tensor([[use.strength for use in self.loras.get(expert, ())]], dtype=torch.float32)
        if self.mixture is None or expert not in self.mixture.experts:
            return strengths
        if mix_BE is None:
            raise ValueError("a mixture needs a mix")
        base = self.mixture_base.get(expert)
        own = self.mixture.gates(
            expert, mix_BE, torch.tensor([sigma]), alpha_expert_E,
            None if base is None else alpha_base * base.strength,
        )
        return torch.cat([strengths, own], dim=1)


def read_adapters(spec: ModelSpec, loras: Sequence[LoraArgument], moe: Path | None) -> AdapterSet:
    """Read and check every adapter against the model's headers, before its weights are loaded.

    Raises:
        UserError: not a LoRA (or not a mixture), for the other noise expert, for another model, or a noise expert
            that neither the file nor the user names; a mixture's base LoRA that cannot be found.
    """
    uses: dict[NoiseExpert, list[LoraUse]] = {expert: [] for expert in spec.experts}
    for argument in loras:
        files = open_lora(argument.path)
        _check_task(argument.path, files, spec)
        for expert, file in _assign(argument, files, spec).items():
            _check_modules(file, spec, expert)
            uses[expert].append(LoraUse(argument.path, file.read(), argument.strength))
    if moe is None:
        return AdapterSet(uses)
    mixture = read_mixture(moe, spec)
    bases = {expert: _base_lora(mixture, moe, expert, uses[expert]) for expert in mixture.base_lora}
    left = {expert: [u for u in used if u is not bases.get(expert)] for expert, used in uses.items()}
    return AdapterSet(left, mixture, moe, bases)


def _assign(
    argument: LoraArgument, files: Mapping[NoiseExpert | None, LoraFile], spec: ModelSpec
) -> dict[NoiseExpert, LoraFile]:
    """Noise expert -> the part of the file that acts on it: what the user says, else metadata, else the file's name."""
    path = argument.path
    wanted = list(spec.experts) if argument.expert in (None, "both") else [NoiseExpert(argument.expert)]
    for expert in wanted:
        if expert not in spec.experts:
            raise UserError(f"{path} is given for the {expert.value} noise expert, which {spec.path} does not have")
    if None in files:
        if argument.expert is None and len(spec.experts) > 1:
            raise UserError(f"{path} does not say which noise expert it is for; write high={path}, low={path} "
                            f"or both={path}")
        return dict.fromkeys(wanted, files[None])
    said = {expert: file for expert, file in files.items() if expert is not None}
    if argument.expert is not None and len(said) == 1:
        own, file = next(iter(said.items()))
        if file.said_by == "name":  # a name is only a guess; the user's word is not
            return dict.fromkeys(wanted, file)
        if wanted != [own]:
            raise UserError(f"{path} is for the {own.value} noise expert (its {file.said_by} says so), not for "
                            f"{argument.expert}; write {own.value}={path}, or choose the other file")
    found = {expert: said[expert] for expert in wanted if expert in said}
    if not found:
        have = ", ".join(expert.value for expert in said)
        raise UserError(f"{path} is for the noise expert {have}, which {spec.path} does not have")
    return found


def _check_task(path: Path, files: Mapping[NoiseExpert | None, LoraFile], spec: ModelSpec) -> None:
    tasks = {task for file in files.values() if (task := file.metadata.get("lapwan.task"))}
    if tasks and spec.task not in tasks:
        warn(f"{path} was trained for {', '.join(sorted(tasks))}; this model is {spec.task}")


def _check_modules(file: LoraFile, spec: ModelSpec, expert: NoiseExpert) -> None:
    shapes = {
        name: tuple(info.shape) for shard in weight_files(spec.component(expert))
        for name, info in read_header(shard).tensors.items()
    }
    for path, module in file.modules.items():
        have = shapes.get(f"{path}.weight")
        if have is None:
            raise UserError(f"{file.path} has module '{path}', which {spec.component(expert)} does not; it was made "
                            "for another model")
        if have != tuple(module.shape):
            raise UserError(f"{file.path}: '{path}' is {module.shape[1]} -> {module.shape[0]} features, the model's is "
                            f"{have[1]} -> {have[0]}; it was made for another model")


def _base_lora(mixture: Mixture, moe: Path, expert: NoiseExpert, given: Sequence[LoraUse]) -> LoraUse:
    """The LoRA the mixture was trained over: a `--lora` of the same fingerprint, else the recorded file."""
    recorded = mixture.base_lora[expert]
    for use in given:
        if use.fingerprint == recorded["fingerprint"]:
            return use
    path = Path(recorded["path"])
    tried = [moe.parent / path.name, moe.parent / path, path]
    for candidate in tried:
        if candidate.is_file():
            states = read_lora(candidate)
            state = states.get(expert) or states.get(None)
            if state is not None and state.fingerprint() == recorded["fingerprint"]:
                return LoraUse(candidate, state, 1.0)
    raise UserError(
        f"{moe} was trained over a base LoRA for the {expert.value} noise expert ({path}, fingerprint "
        f"{recorded['fingerprint'][:12]}), which is not there or has changed; pass it with --lora {expert.value}=FILE"
    )
