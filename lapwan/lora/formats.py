"""LoRA files: one reader for every layout people have, one writer for three, around `LoraState`.

The names of tensors are in `keys`, scales outside tensors in `scales`, the noise expert in `noise_expert`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.lora_keys import (
    COMPONENT_EXPERTS,
    Key,
    Layout,
    key_names,
    looks_like_lora,
    parse_key,
    refuse_keys,
)
from lapwan.checkpoints.tensors import load
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.lora import noise_expert_metadata
from lapwan.lora.scales import ADAPTER_METADATA, AdapterConfig, adapter_config, adapter_metadata
from lapwan.lora.state import LoraEntry, LoraState, entries_fingerprint
from lapwan.names import NoiseExpert

FORMAT_KEY, FORMAT = "lapwan.format", "lora/1"
FINGERPRINT_KEY = "lapwan.fingerprint"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LoraModule:
    """One Linear's update inside a file, shapes only. `alpha` is a tensor's name or a number."""

    file: TensorFile
    path: str
    down: str
    up: str
    alpha: str | float

    @property
    def rank(self) -> int:
        """r."""
        return self.file.tensors[self.down].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the Linear's weight."""
        return self.file.tensors[self.up].shape[0], self.file.tensors[self.down].shape[1]

    def entry(self) -> LoraEntry:
        """The tensors, read now."""
        alpha = self.alpha if isinstance(self.alpha, float) else float(load(self.file, self.alpha).item())
        return LoraEntry(load(self.file, self.down), load(self.file, self.up), alpha)


@dataclass(frozen=True)
class LoraFile:
    """The LoRA of one noise expert in a file, not read yet: modules by diffusers' path, and the metadata.

    `said_by` tells where the noise expert comes from: "metadata", "keys", "name" or "" (not known).
    """

    path: Path
    noise_expert: NoiseExpert | None
    said_by: str
    modules: dict[str, LoraModule]
    metadata: dict[str, str]
    layout: Layout

    def fingerprint(self) -> str:
        """The content's fingerprint, as `LoraState.fingerprint`, one module in memory at a time."""
        return entries_fingerprint((path, self.modules[path].entry()) for path in sorted(self.modules))

    def read(self) -> LoraState:
        """All of it, as a LoraState."""
        return LoraState({path: module.entry() for path, module in self.modules.items()}, dict(self.metadata))


def open_lora(path: Path) -> dict[NoiseExpert | None, LoraFile]:
    """Headers only: what LoRA a file holds, by noise expert (None: the file does not say).

    Raises:
        UserError: no LoRA, a mixture, an unknown or unsupported key (named), A without B, shapes that do not fit.
    """
    file = read_header(path)
    if file.metadata.get(FORMAT_KEY, "").startswith("mixture/"):
        raise UserError(f"{path} is a mixture; pass it with --moe")
    if not any(looks_like_lora(name) for name in file.tensors):
        raise UserError(f"{path} is not a LoRA: none of its {len(file.tensors)} tensors is a LoRA's "
                        "(expected names such as 'blocks.0.self_attn.q.lora_A.weight')")
    understood = {name: parse_key(name) for name in file.tensors}
    parsed: dict[str, Key] = {name: key for name, key in understood.items() if key is not None}
    if len(parsed) < len(understood):
        raise refuse_keys(path, [name for name, key in understood.items() if key is None])
    adapters = {key.adapter for key in parsed.values() if key.part != "alpha"}
    if len(adapters) > 1:
        names = ", ".join(sorted(str(a) for a in adapters))
        raise UserError(f"{path} holds several adapters ({names}); save one adapter per file")
    return _by_expert(file, parsed)


def _by_expert(file: TensorFile, parsed: dict[str, Key]) -> dict[NoiseExpert | None, LoraFile]:
    layout = Counter(key.layout for key in parsed.values()).most_common(1)[0][0]
    peft_file = any(name.startswith("base_model.") for name in parsed)
    config = adapter_config(file.path, file.metadata, peft_file)
    components = {key.component for key in parsed.values()}
    named = {"transformer_1", "transformer_2"} & components
    if named:  # both experts in one file, or a prefix that names one of them
        if None in components:
            bare = next(name for name, key in parsed.items() if key.component is None)
            raise UserError(f"{file.path}: some keys name a transformer ({', '.join(sorted(named))}), "
                            f"others, such as '{bare}', do not; split the file in two")
        found: dict[NoiseExpert | None, LoraFile] = {}
        for noise_expert in NoiseExpert:
            own = {n: k for n, k in parsed.items() if COMPONENT_EXPERTS[str(k.component)] is noise_expert}
            if own:
                metadata = {**noise_expert_metadata.own_metadata(file.metadata, noise_expert), noise_expert_metadata.KEY: noise_expert.value}
                found[noise_expert] = LoraFile(file.path, noise_expert, "keys", _modules(file, own, config), metadata, layout)
        return found
    expert_said = noise_expert_metadata.from_metadata(file.metadata, file.path)
    guess = noise_expert_metadata.from_name(file.path) if expert_said is None else None
    metadata = dict(file.metadata)
    if expert_said is not None:
        metadata[noise_expert_metadata.KEY] = expert_said.value
    said_by = "metadata" if expert_said is not None else "name" if guess is not None else ""
    modules = _modules(file, parsed, config)
    return {expert_said or guess: LoraFile(file.path, expert_said or guess, said_by, modules, metadata, layout)}


def _modules(file: TensorFile, parsed: dict[str, Key], config: AdapterConfig | None) -> dict[str, LoraModule]:
    parts: dict[str, dict[str, str]] = {}
    for name, key in parsed.items():
        own = parts.setdefault(key.path, {})
        if key.part in own:
            raise UserError(f"{file.path}: '{own[key.part]}' and '{name}' are the same tensor of {key.path}")
        own[key.part] = name
    return {path: _module(file, path, own, config) for path, own in parts.items()}


def _module(file: TensorFile, path: str, own: Mapping[str, str], config: AdapterConfig | None) -> LoraModule:
    for part, letter in (("down", "A"), ("up", "B")):
        if part not in own:
            other = next(iter(own.values()))
            raise UserError(f"{file.path}: '{other}' has no {letter} matrix beside it; the file is incomplete")
    down, up = file.tensors[own["down"]], file.tensors[own["up"]]
    for info in (down, up):
        if info.dtype not in _FLOATS:
            raise UserError(f"{file.path}: '{info.name}' is {info.dtype}; a LoRA has {', '.join(_FLOATS)}")
    fits = len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] == up.shape[1] and down.shape[0] > 0
    if not fits:
        raise UserError(f"{file.path}: '{down.name}' {list(down.shape)} and '{up.name}' {list(up.shape)} "
                        "are not A [r, in] and B [out, r]")
    alpha: str | float
    if "alpha" in own:
        alpha = own["alpha"]
        if file.tensors[alpha].shape not in ((), (1,)):
            raise UserError(f"{file.path}: '{alpha}' {list(file.tensors[alpha].shape)} is not one number")
    else:
        alpha = config.alpha(path, down.shape[0]) if config else float(down.shape[0])
    return LoraModule(file, path, down.name, up.name, alpha)


def read_lora(path: Path) -> dict[NoiseExpert | None, LoraState]:
    """The LoRA in a file by noise expert; None as the key: the file does not say which.

    Two noise experts in one file come out as two states. The metadata `lapwan.noise_expert` is filled in where the
    keys or the training range say it, not where only the file's name does.

    Raises:
        UserError: see `open_lora`.
    """
    return {noise_expert: file.read() for noise_expert, file in open_lora(path).items()}


def write_lora(
    path: Path, state: LoraState, layout: Layout = "comfy", dtype: torch.dtype | None = None, fold_alpha: bool = False
) -> None:
    """Write one noise expert's LoRA atomically.

    Alpha stays a tensor (comfy, musubi) or goes into `lora_adapter_metadata` (diffusers, where a tensor raises at
    load). Outside the blocks diffusers' reader of the comfy layout takes no alpha: there it is folded into B.

    Args:
        dtype: of A and B in the file; None keeps each tensor's own.
        fold_alpha: multiply B by alpha / r everywhere and write no alpha, for tools that do not read it; rounds once.

    Raises:
        UserError: a path that is no Linear of Wan, or nothing to write.
    """
    tensors, metadata = _named(path, state, layout, dtype, fold_alpha)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def write_both(
    path: Path, states: Mapping[NoiseExpert, LoraState], dtype: torch.dtype | None = None, fold_alpha: bool = False
) -> None:
    """Write both noise experts' LoRAs into one file, atomically: `diffusion_model.transformer_1.…` is the high-noise
    expert's, `transformer_2` the low-noise one's.

    Only comfy's names have such a form that is in use. Metadata that the two agree on stands once; what differs gets
    the noise expert's name behind its key (`lapwan.base_fingerprint.high`), so that no tool takes one's for both.

    Raises:
        UserError: not two noise experts, or as `write_lora`.
    """
    if set(states) != set(NoiseExpert):
        have = ", ".join(noise_expert.value for noise_expert in states) or "none"
        raise UserError(f"cannot write {path} as one file for both noise experts: there are LoRAs for: {have}")
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[NoiseExpert, dict[str, str]] = {}
    for noise_expert in NoiseExpert:
        component = noise_expert_metadata.WRITTEN_AS[noise_expert]
        own, metadata[noise_expert] = _named(path, states[noise_expert], "comfy", dtype, fold_alpha, component)
        tensors |= own
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=noise_expert_metadata.join_metadata(metadata))


def _named(
    path: Path, state: LoraState, layout: Layout, dtype: torch.dtype | None, fold_alpha: bool,
    component: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by their names in the file, metadata) of one noise expert's LoRA."""
    if not state.entries:
        raise UserError(f"cannot write {path}: the LoRA has no modules")
    written = LoraState({}, state.metadata)
    tensors: dict[str, torch.Tensor] = {}
    for module, entry in state.entries.items():
        names = key_names(module, layout, component)
        fold = fold_alpha or (layout == "comfy" and component is None and not module.startswith("blocks."))
        own = _folded(entry, dtype) if fold and entry.scale != 1.0 else entry
        if not fold and layout != "diffusers":
            exact = torch.tensor(own.alpha, dtype=torch.float32).item() == own.alpha
            tensors[names["alpha"]] = torch.tensor(own.alpha, dtype=torch.float32 if exact else torch.float64)
        written.entries[module] = LoraEntry(_plain(own.down, dtype), _plain(own.up, dtype), own.alpha)
        tensors[names["down"]], tensors[names["up"]] = written.entries[module].down, written.entries[module].up
    return tensors, file_metadata(written, layout)


def _folded(entry: LoraEntry, dtype: torch.dtype | None) -> LoraEntry:
    """The same ΔW at scale 1, B rounded once."""
    up = (entry.up.float() * entry.scale).to(dtype or entry.up.dtype)
    return LoraEntry(entry.down, up, float(entry.rank))


def _plain(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    # clone: safetensors refuses tensors that share storage (views of one stacked parameter).
    return tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)


def file_metadata(state: LoraState, layout: Layout) -> dict[str, str]:
    """The state's own metadata, our format and fingerprint, and the `ss_*`/`modelspec` keys other tools read."""
    metadata = {key: value for key, value in state.metadata.items() if key != ADAPTER_METADATA}
    metadata[FORMAT_KEY] = FORMAT
    metadata[FINGERPRINT_KEY] = state.fingerprint()
    metadata.setdefault("format", "pt")
    metadata.setdefault("modelspec.sai_model_spec", "1.0.0")
    metadata.setdefault("modelspec.architecture", "wan2.2/lora")
    ranks, alphas = state.ranks(), {path: entry.alpha for path, entry in state.entries.items()}
    metadata["lapwan.ranks"], metadata["lapwan.alphas"] = (_counted(values) for values in (ranks, alphas))
    metadata["ss_network_dim"] = str(Counter(ranks.values()).most_common(1)[0][0])
    metadata["ss_network_alpha"] = str(Counter(alphas.values()).most_common(1)[0][0])
    metadata.setdefault("ss_network_module", "networks.lora_wan")
    noise_expert, boundary = metadata.get(noise_expert_metadata.KEY), stated_boundary(metadata)
    if noise_expert and boundary is not None and "modelspec.timestep_range" not in metadata:
        edge = f"{boundary * 1000:g}"
        metadata["modelspec.timestep_range"] = f"{edge},1000" if noise_expert == NoiseExpert.HIGH else f"0,{edge}"
    if layout == "diffusers":
        metadata[ADAPTER_METADATA] = adapter_metadata(ranks, alphas)
    return metadata


def _counted(values: Mapping[str, float]) -> str:
    """How many modules have each value, as `{"8": 16, "4": 51}`; each module's own is in its tensors."""
    return json.dumps({f"{value:g}": count for value, count in Counter(values.values()).most_common()})


def stated_boundary(metadata: Mapping[str, str]) -> float | None:
    """The sigma at which the noise experts hand over, as the file says it; None if it says none."""
    try:
        return float(metadata["lapwan.boundary"])
    except (KeyError, ValueError):
        return None
