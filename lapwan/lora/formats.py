"""LoRA files: one reader for every layout in use, one writer for three, around `LoraState`.

Tensor names are in `lapwan.checkpoints.lora_keys`; the noise expert, and alpha outside tensors, in
`lapwan.lora.metadata`.

Which kind of file a .safetensors is: `open_lora` takes a LoRA and refuses all else; `lora_keys.is_adapter_key` and
`unsupported_kind` tell other adapters from model weights; `moe.mixture_file.is_mixture` a mixture;
`models.original_layout.has_original_names` the layout of a transformer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.lora_keys import (
    COMPONENT_NOISE_EXPERTS,
    Key,
    Layout,
    is_adapter_key,
    key_names,
    parse_key,
    unknown_keys_error,
)
from lapwan.checkpoints.tensors import load_tensor
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.lora.metadata import FORMAT_KEY, AdapterConfig, adapter_config, file_metadata
from lapwan.lora.noise_expert import (
    NOISE_EXPERT_KEY,
    join_metadata,
    metadata_for,
    noise_expert_from_file_name,
    noise_expert_from_metadata,
)
from lapwan.lora.state import LoraEntry, LoraState, entries_fingerprint
from lapwan.names import NoiseExpert

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LoraModule:
    """One Linear's update in a file, by its tensors' names; nothing is read yet. `alpha` is a name or a number."""

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
        """Read the tensors."""
        alpha = self.alpha if isinstance(self.alpha, float) else float(load_tensor(self.file, self.alpha).item())
        return LoraEntry(load_tensor(self.file, self.down), load_tensor(self.file, self.up), alpha)


@dataclass(frozen=True)
class LoraFile:
    """The LoRA of one noise expert in a file, not read yet: modules by diffusers' path, and the metadata.

    `noise_expert_source` is what the noise expert was read from: "metadata", "keys", "name" or "" (not known).
    """

    path: Path
    noise_expert: NoiseExpert | None
    noise_expert_source: str
    modules: dict[str, LoraModule]
    metadata: dict[str, str]
    layout: Layout

    def fingerprint(self) -> str:
        """As `LoraState.fingerprint`, with one module in memory at a time."""
        return entries_fingerprint((path, self.modules[path].entry()) for path in sorted(self.modules))

    def read(self) -> LoraState:
        """Read every module into a LoraState."""
        return LoraState({path: module.entry() for path, module in self.modules.items()}, dict(self.metadata))


def open_lora(path: Path) -> dict[NoiseExpert | None, LoraFile]:
    """The LoRAs of a file by noise expert, from its header (key None: the noise expert is not known).

    Raises:
        UserError: not a LoRA, a mixture, an unknown or unsupported key (named), A without B, shapes that do not fit.
    """
    file = read_header(path)
    if file.metadata.get(FORMAT_KEY, "").startswith("mixture/"):
        raise UserError(f"{path} is a mixture; pass it with --moe")
    if not any(is_adapter_key(name) for name in file.tensors):
        raise UserError(f"{path} is not a LoRA: none of its {len(file.tensors)} tensors is a LoRA's "
                        "(expected names such as 'blocks.0.self_attn.q.lora_A.weight')")
    keys = {name: parse_key(name) for name in file.tensors}
    parsed: dict[str, Key] = {name: key for name, key in keys.items() if key is not None}
    if len(parsed) < len(keys):
        raise unknown_keys_error(path, [name for name, key in keys.items() if key is None])
    adapters = {key.adapter for key in parsed.values() if key.part != "alpha"}
    if len(adapters) > 1:
        names = ", ".join(sorted(str(a) for a in adapters))
        raise UserError(f"{path} holds several adapters ({names}); save one adapter per file")
    return _by_noise_expert(file, parsed)


def _by_noise_expert(file: TensorFile, parsed: dict[str, Key]) -> dict[NoiseExpert | None, LoraFile]:
    layout = Counter(key.layout for key in parsed.values()).most_common(1)[0][0]
    peft_file = any(name.startswith("base_model.") for name in parsed)
    config = adapter_config(file.path, file.metadata, peft_file)
    components = {key.component for key in parsed.values()}
    named = {"transformer_1", "transformer_2"} & components
    if named:  # both noise experts in one file, or a prefix that names one of them
        if None in components:
            bare = next(name for name, key in parsed.items() if key.component is None)
            raise UserError(f"{file.path}: some keys name a transformer ({', '.join(sorted(named))}), "
                            f"others, such as '{bare}', do not; split the file in two")
        files: dict[NoiseExpert | None, LoraFile] = {}
        for noise_expert in NoiseExpert:
            keys = {n: k for n, k in parsed.items() if COMPONENT_NOISE_EXPERTS[str(k.component)] is noise_expert}
            if keys:
                modules = _modules(file, keys, config)
                metadata = {**metadata_for(file.metadata, noise_expert), NOISE_EXPERT_KEY: noise_expert.value}
                files[noise_expert] = LoraFile(file.path, noise_expert, "keys", modules, metadata, layout)
        return files
    recorded = noise_expert_from_metadata(file.metadata, file.path)
    from_name = noise_expert_from_file_name(file.path) if recorded is None else None
    metadata = dict(file.metadata)
    if recorded is not None:
        metadata[NOISE_EXPERT_KEY] = recorded.value
    source = "metadata" if recorded is not None else "name" if from_name is not None else ""
    modules = _modules(file, parsed, config)
    return {recorded or from_name: LoraFile(file.path, recorded or from_name, source, modules, metadata, layout)}


def _modules(file: TensorFile, parsed: dict[str, Key], config: AdapterConfig | None) -> dict[str, LoraModule]:
    by_path: dict[str, dict[str, str]] = {}
    for name, key in parsed.items():
        names = by_path.setdefault(key.path, {})
        if key.part in names:
            raise UserError(f"{file.path}: '{names[key.part]}' and '{name}' are the same tensor of {key.path}")
        names[key.part] = name
    return {path: _module(file, path, names, config) for path, names in by_path.items()}


def _module(file: TensorFile, path: str, names: Mapping[str, str], config: AdapterConfig | None) -> LoraModule:
    """The module at `path`; `names` are its tensors' names by part (down, up, alpha)."""
    for part, letter in (("down", "A"), ("up", "B")):
        if part not in names:
            other = next(iter(names.values()))
            raise UserError(f"{file.path}: '{other}' has no {letter} matrix beside it; the file is incomplete")
    down, up = file.tensors[names["down"]], file.tensors[names["up"]]
    for info in (down, up):
        if info.dtype not in _FLOATS:
            raise UserError(f"{file.path}: '{info.name}' is {info.dtype}; a LoRA has {', '.join(_FLOATS)}")
    fits = len(down.shape) == 2 and len(up.shape) == 2 and down.shape[0] == up.shape[1] and down.shape[0] > 0
    if not fits:
        raise UserError(f"{file.path}: '{down.name}' {list(down.shape)} and '{up.name}' {list(up.shape)} "
                        "are not A [r, in] and B [out, r]")
    alpha: str | float
    if "alpha" in names:
        alpha = names["alpha"]
        if file.tensors[alpha].shape not in ((), (1,)):
            raise UserError(f"{file.path}: '{alpha}' {list(file.tensors[alpha].shape)} is not one number")
    else:
        alpha = config.alpha(path, down.shape[0]) if config else float(down.shape[0])
    return LoraModule(file, path, down.name, up.name, alpha)


def read_lora(path: Path) -> dict[NoiseExpert | None, LoraState]:
    """The LoRAs of a file by noise expert (key None: the noise expert is not known).

    A file for both noise experts gives two states. The metadata `lapwan.noise_expert` is filled in if the keys or the
    training range tell the noise expert, but not if only the file's name does.

    Raises:
        UserError: see `open_lora`.
    """
    return {noise_expert: file.read() for noise_expert, file in open_lora(path).items()}


def write_lora(
    path: Path, state: LoraState, layout: Layout = "comfy", dtype: torch.dtype | None = None, fold_alpha: bool = False
) -> None:
    """Write one noise expert's LoRA atomically.

    Alpha is a tensor (comfy, musubi) or goes into `lora_adapter_metadata` (diffusers raises at load on a tensor).
    diffusers' reader of the comfy layout takes no alpha outside the blocks: there it is folded into B.

    Args:
        dtype: of A and B in the file; None keeps each tensor's own.
        fold_alpha: multiply B by alpha / r everywhere and write no alpha, for tools that do not read it; rounds once.

    Raises:
        UserError: the LoRA has no modules.
        ValueError: a path that is not a Linear of Wan.
    """
    tensors, metadata = _named(path, state, layout, dtype, fold_alpha)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def write_both(
    path: Path, states: Mapping[NoiseExpert, LoraState], dtype: torch.dtype | None = None, fold_alpha: bool = False
) -> None:
    """Write both noise experts' LoRAs into one file, atomically: `diffusion_model.transformer_1.…` for the high noise
    expert, `transformer_2` for the low one.

    Such files are in use with comfy's names only. Equal metadata is written once; entries that differ get the noise
    expert's name after their key (`lapwan.base_fingerprint.high`), so that no tool reads them for both.

    Raises:
        UserError: not a LoRA for each noise expert, or as `write_lora`.
    """
    if set(states) != set(NoiseExpert):
        have = ", ".join(noise_expert.value for noise_expert in states) or "none"
        raise UserError(f"cannot write {path} as one file for both noise experts: there are LoRAs for: {have}")
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[NoiseExpert, dict[str, str]] = {}
    for noise_expert in NoiseExpert:
        named, metadata[noise_expert] = _named(
            path, states[noise_expert], "comfy", dtype, fold_alpha, noise_expert.one_file_component)
        tensors |= named
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=join_metadata(metadata))


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
        if fold and entry.scale != 1.0:
            entry = _folded(entry, dtype)
        if not fold and layout != "diffusers":
            exact = torch.tensor(entry.alpha, dtype=torch.float32).item() == entry.alpha
            tensors[names["alpha"]] = torch.tensor(entry.alpha, dtype=torch.float32 if exact else torch.float64)
        written.entries[module] = LoraEntry(_plain(entry.down, dtype), _plain(entry.up, dtype), entry.alpha)
        tensors[names["down"]], tensors[names["up"]] = written.entries[module].down, written.entries[module].up
    return tensors, file_metadata(written, layout)


def _folded(entry: LoraEntry, dtype: torch.dtype | None) -> LoraEntry:
    """The same ΔW at scale 1, B rounded once."""
    up = (entry.up.float() * entry.scale).to(dtype or entry.up.dtype)
    return LoraEntry(entry.down, up, float(entry.rank))


def _plain(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    # clone: safetensors refuses tensors that share storage (views of one stacked parameter).
    return tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
