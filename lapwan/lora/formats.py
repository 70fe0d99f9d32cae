"""LoRA files: one reader for every layout in use, one writer for three, around `AdapterState`.

Tensor names, and how to add a layout, are in `lapwan.checkpoints.lora_keys`; the kinds of update that a file may hold
in `lapwan.lora.kinds`; the noise expert, and alpha outside tensors, in `lapwan.lora.noise_expert` and
`lapwan.lora.metadata`.

Which kind of file a .safetensors is: `open_lora` takes a LoRA and refuses all else; `lora_keys.is_adapter_key` and
`unsupported_kind` tell other adapters from model weights; `moe.mixture_file.is_mixture` a mixture;
`models.original_layout.has_original_names` the layout of a transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.lora_keys import (
    COMPONENT_NOISE_EXPERTS,
    LAYOUTS,
    PARTS,
    AdapterLayout,
    Key,
    is_adapter_key,
    parse_key,
    unknown_keys_error,
)
from lapwan.checkpoints.rewrite import AddRows
from lapwan.checkpoints.tensors import load_rows, load_tensor
from lapwan.checkpoints.wan_keys import to_original
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.lora.kinds import FullDelta, build_update, kind_of
from lapwan.lora.metadata import FORMAT_KEY, AdapterConfig, adapter_config, file_metadata
from lapwan.lora.noise_expert import (
    NOISE_EXPERT_KEY,
    join_metadata,
    metadata_for,
    noise_expert_from_file_name,
    noise_expert_from_metadata,
)
from lapwan.lora.state import (
    AdapterState,
    LowRank,
    WeightUpdate,
    check_fits,
    entries_fingerprint,
    low_rank_only,
)
from lapwan.names import NoiseExpert

_FLOATS = ("F64", "F32", "F16", "BF16")
Check = Callable[[Path], None]  # called with a written file, before it gets its name


@dataclass(frozen=True)
class AdapterModule:
    """One update in a file, not read yet: the names of its tensors by part, and `outline`, the same update of tensors
    without data. `alpha` is a tensor's name, a number, or None for scale 1."""

    file: TensorFile
    path: str
    names: Mapping[str, str]
    alpha: str | float | None
    outline: WeightUpdate = field(compare=False)  # follows from the others, and tensors have no one truth value

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.outline.kind

    @property
    def rank(self) -> int | None:
        """r of its low-rank factors; None where it has none."""
        return self.outline.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it changes."""
        return self.outline.shape

    @property
    def stackable(self) -> bool:
        """A low-rank pair of a Linear."""
        return self.outline.stackable

    @property
    def needs_weight(self) -> bool:
        """ΔW depends on W."""
        return self.outline.needs_weight

    def entry(self) -> WeightUpdate:
        """Read the tensors."""
        alpha = float(load_tensor(self.file, self.alpha).item()) if isinstance(self.alpha, str) else self.alpha
        return build_update({part: load_tensor(self.file, name) for part, name in self.names.items()}, alpha)

    def prepare(self, multiplier: float, dtype: torch.dtype) -> AddRows:
        """As `WeightUpdate.prepare`; a full delta is read tile by tile, since it is as large as the weight."""
        if not isinstance(self.outline, FullDelta):
            return self.entry().prepare(multiplier, dtype)
        name = self.names["diff"]

        def add_rows(work: Tensor, base: Tensor, first: int) -> None:
            work.add_(load_rows(self.file, name, first, len(work)).to(dtype), alpha=multiplier)

        return add_rows


@dataclass(frozen=True)
class AdapterFile:
    """The adapter of one noise expert in a file, not read yet: modules by path as in `AdapterState`, and the metadata.

    `noise_expert_source` is what the noise expert was read from: "metadata", "keys", "name" or "" (not known).
    """

    path: Path
    noise_expert: NoiseExpert | None
    noise_expert_source: str
    modules: dict[str, AdapterModule]
    metadata: dict[str, str]

    def fingerprint(self) -> str:
        """As `AdapterState.fingerprint`, with one module in memory at a time."""
        return entries_fingerprint((path, self.modules[path].entry()) for path in sorted(self.modules))

    def read(self) -> AdapterState:
        """Read every module."""
        return AdapterState({path: module.entry() for path, module in self.modules.items()}, dict(self.metadata))

    def ranks(self, purpose: str) -> dict[str, int]:
        """Rank by module of a plain LoRA.

        Raises:
            UserError: it holds another kind of update; `purpose` says what cannot use that (see `low_rank_only`).
        """
        low_rank_only(self.modules, purpose)
        return {path: module.rank for path, module in self.modules.items() if module.rank is not None}


def open_lora(
    path: Path, layouts: Mapping[str, AdapterLayout] = LAYOUTS
) -> dict[NoiseExpert | None, AdapterFile]:
    """The adapters of a file by noise expert, from its header (key None: the noise expert is not known).

    Args:
        path: a .safetensors file.
        layouts: key layouts by name; the first one that knows a tensor's name reads it.

    Raises:
        UserError: not a LoRA, a mixture, an unknown or unsupported key (named), A without B, shapes that do not fit.
    """
    file = read_header(path)
    if file.metadata.get(FORMAT_KEY, "").startswith("mixture/"):
        raise UserError(f"{path} is a mixture; pass it with --moe")
    keys = {name: parse_key(name, layouts) for name in file.tensors}
    if not any(key is not None or is_adapter_key(name) for name, key in keys.items()):
        raise UserError(f"{path} is not a LoRA: none of its {len(file.tensors)} tensors is a LoRA's "
                        "(expected names such as 'blocks.0.self_attn.q.lora_A.weight')")
    parsed: dict[str, Key] = {name: key for name, key in keys.items() if key is not None}
    if len(parsed) < len(keys):
        raise unknown_keys_error(path, [name for name, key in keys.items() if key is None])
    adapters = {key.adapter for key in parsed.values() if key.part in LowRank.PARTS}
    if len(adapters) > 1:
        names = ", ".join(sorted(str(a) for a in adapters))
        raise UserError(f"{path} holds several adapters ({names}); save one adapter per file")
    return _by_noise_expert(file, parsed)


def _by_noise_expert(file: TensorFile, parsed: dict[str, Key]) -> dict[NoiseExpert | None, AdapterFile]:
    peft_file = any(name.startswith("base_model.") for name in parsed)
    has_magnitudes = any(key.part == "magnitude" for key in parsed.values())
    config = adapter_config(file.path, file.metadata, peft_file, has_magnitudes)
    components = {key.component for key in parsed.values()}
    named = {"transformer_1", "transformer_2"} & components
    if named:  # both noise experts in one file, or a prefix that names one of them
        if None in components:
            bare = next(name for name, key in parsed.items() if key.component is None)
            raise UserError(f"{file.path}: some keys name a transformer ({', '.join(sorted(named))}), "
                            f"others, such as '{bare}', do not; split the file in two")
        files: dict[NoiseExpert | None, AdapterFile] = {}
        for noise_expert in NoiseExpert:
            keys = {n: k for n, k in parsed.items() if COMPONENT_NOISE_EXPERTS[str(k.component)] is noise_expert}
            if keys:
                modules = _modules(file, keys, config)
                metadata = {**metadata_for(file.metadata, noise_expert), NOISE_EXPERT_KEY: noise_expert.value}
                files[noise_expert] = AdapterFile(file.path, noise_expert, "keys", modules, metadata)
        return files
    recorded = noise_expert_from_metadata(file.metadata, file.path)
    from_name = noise_expert_from_file_name(file.path) if recorded is None else None
    metadata = dict(file.metadata)
    if recorded is not None:
        metadata[NOISE_EXPERT_KEY] = recorded.value
    source = "metadata" if recorded is not None else "name" if from_name is not None else ""
    modules = _modules(file, parsed, config)
    return {recorded or from_name: AdapterFile(file.path, recorded or from_name, source, modules, metadata)}


def _modules(file: TensorFile, parsed: dict[str, Key], config: AdapterConfig | None) -> dict[str, AdapterModule]:
    by_path: dict[str, dict[str, str]] = {}
    for name, key in parsed.items():
        names = by_path.setdefault(key.path, {})
        if key.part in names:
            raise UserError(f"{file.path}: '{names[key.part]}' and '{name}' are the same tensor of {key.path}")
        names[key.part] = name
    return {path: _module(file, path, names, config) for path, names in by_path.items()}


def _module(file: TensorFile, path: str, names: Mapping[str, str], config: AdapterConfig | None) -> AdapterModule:
    """The update at `path`; `names` are its tensors' names by part (down, up, alpha, ...)."""
    alpha_name = names.get("alpha")
    tensors = {part: name for part, name in names.items() if part != "alpha"}
    try:
        kind = kind_of(tensors)
    except ValueError as error:
        raise UserError(f"{file.path}: {' and '.join(map(repr, tensors.values()))} change the same tensor, as {error}; "
                        "lapwan reads one kind of update per tensor: remove one of them") from None
    if (missing := kind.missing(tensors)) is not None:
        other = next(iter(names.values()))
        raise UserError(f"{file.path}: '{other}' has no {missing} beside it; the file is incomplete")
    infos = [file.tensors[name] for name in _in_order(tensors)]
    for info in infos:
        if info.dtype not in _FLOATS:
            raise UserError(f"{file.path}: '{info.name}' is {info.dtype}; a LoRA has {', '.join(_FLOATS)}")
    try:
        if any(size == 0 for info in infos for size in info.shape):
            raise ValueError
        empty = {part: torch.empty(file.tensors[name].shape, device="meta") for part, name in tensors.items()}
        outline = build_update(empty, None)
    except ValueError:
        shapes = " and ".join(f"'{info.name}' {list(info.shape)}" for info in infos)
        raise UserError(f"{file.path}: {shapes} are not {kind.FORM}") from None
    alpha: str | float | None = alpha_name
    if alpha_name is not None:
        if file.tensors[alpha_name].shape not in ((), (1,)):
            raise UserError(f"{file.path}: '{alpha_name}' {list(file.tensors[alpha_name].shape)} is not one number")
    elif outline.rank is not None and "down" in tensors:
        alpha = config.alpha(path, outline.rank) if config else float(outline.rank)
    return AdapterModule(file, path, tensors, alpha, outline)


def _in_order(tensors: Mapping[str, str]) -> list[str]:
    """The names in the order of `PARTS`, for messages."""
    return [tensors[part] for part in PARTS if part in tensors]


def read_lora(
    path: Path, layouts: Mapping[str, AdapterLayout] = LAYOUTS
) -> dict[NoiseExpert | None, AdapterState]:
    """The adapters of a file by noise expert (key None: the noise expert is not known).

    A file for both noise experts gives two states. The metadata `lapwan.noise_expert` is filled in if the keys or the
    training range tell the noise expert, but not if only the file's name does.

    Args:
        path: a .safetensors file.
        layouts: as for `open_lora`.

    Raises:
        UserError: see `open_lora`.
    """
    return {noise_expert: file.read() for noise_expert, file in open_lora(path, layouts).items()}


def write_lora(
    path: Path, state: AdapterState, layout: str = "comfy", dtype: torch.dtype | None = None, fold_alpha: bool = False,
    layouts: Mapping[str, AdapterLayout] = LAYOUTS, check: Check = lambda _: None,
) -> None:
    """Write one noise expert's adapter atomically.

    Alpha is a tensor (comfy, musubi) or goes into `lora_adapter_metadata` (diffusers raises at load on a tensor).
    diffusers' reader of the comfy layout takes no alpha outside the blocks: there it is folded into B.

    Args:
        dtype: of A and B in the file; None keeps each tensor's own.
        fold_alpha: multiply B by alpha / r everywhere, so that alpha = r, for tools that do not read alpha; rounds
            once. No alpha is written, except where the layout's tools need it (`AdapterLayout.needs_alpha`).
        check: is called with the path of the finished file, before it is renamed to `path`.

    Raises:
        UserError: the LoRA has no modules, values that are not finite or do not fit `dtype`, or a kind of update that
            the layout has no names for.
        ValueError: a path that is not a tensor of Wan.
    """
    tensors, metadata = _named(path, state, layouts[layout], dtype, fold_alpha)
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        check(temporary)


def write_both(
    path: Path, states: Mapping[NoiseExpert, AdapterState], dtype: torch.dtype | None = None, fold_alpha: bool = False,
    check: Check = lambda _: None,
) -> None:
    """Write both noise experts' LoRAs into one file, atomically: `diffusion_model.transformer_1.…` for the high noise
    expert, `transformer_2` for the low one.

    Such files are in use with comfy's names only. Equal metadata is written once; entries that differ get the noise
    expert's name after their key (`lapwan.base_fingerprint.high`), so that no tool reads them for both.

    Args:
        path: the .safetensors file to write.
        states: one LoRA for each noise expert.
        dtype: of the tensors; None: as they are.
        fold_alpha: multiply the scale into B instead of writing alpha.
        check: as for `write_lora`.

    Raises:
        UserError: not a LoRA for each noise expert, or as `write_lora`.
    """
    if set(states) != set(NoiseExpert):
        have = ", ".join(noise_expert.value for noise_expert in states) or "none"
        raise UserError(f"cannot write {path} as one file for both noise experts: there are LoRAs for: {have}")
    tensors: dict[str, Tensor] = {}
    metadata: dict[NoiseExpert, dict[str, str]] = {}
    for noise_expert in NoiseExpert:
        named, metadata[noise_expert] = _named(
            path, states[noise_expert], LAYOUTS["comfy"], dtype, fold_alpha, noise_expert.one_file_component)
        tensors |= named
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=join_metadata(metadata))
        check(temporary)


def _named(
    path: Path, state: AdapterState, layout: AdapterLayout, dtype: torch.dtype | None, fold_alpha: bool,
    component: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by their names in the file, metadata) of one noise expert's adapter."""
    if not state.entries:
        raise UserError(f"cannot write {path}: the LoRA has no modules")
    written = AdapterState({}, state.metadata)
    tensors: dict[str, Tensor] = {}
    held: set[int] = set()  # one tensor of two modules is written twice
    for module, entry in state.entries.items():
        names = layout.names(module, component)
        fold = fold_alpha or (layout.folds_outer_alpha and component is None and not module.startswith("blocks."))
        update = (entry.folded(dtype) if fold else entry).map(lambda tensor: _plain(tensor, dtype))
        if any(part not in names for part in update.parts()):
            raise _no_names(path, module, update, "down" in names and to_original(module) is not None)
        check_fits(module, update, [entry])
        alpha = not (fold or layout.alpha_in_metadata) or layout.needs_alpha
        if alpha and "alpha" in names and update.rank is not None and (update.alpha is not None or layout.needs_alpha):
            value = float(update.rank) if update.alpha is None else update.alpha
            exact = torch.tensor(value, dtype=torch.float32).item() == value
            tensors[names["alpha"]] = torch.tensor(value, dtype=torch.float32 if exact else torch.float64)
        written.entries[module] = update
        for part, tensor in update.parts().items():
            tensors[names[part]] = tensor.clone() if tensor.data_ptr() in held else tensor
            held.add(tensor.data_ptr())
    return tensors, file_metadata(written, layout.alpha_in_metadata)


def _no_names(path: Path, module: str, update: WeightUpdate, low_rank: bool) -> UserError:
    """The error for a kind of update that a layout does not have, with what to do instead; `low_rank`: it has low-rank
    pairs for this module."""
    remedy = "write the comfy layout"
    if low_rank and not update.needs_weight:
        remedy += ", add --rank N to write it as a low-rank pair by SVD"
    return UserError(f"cannot write {path}: module '{module}' is a {update.kind}, which this layout does not have; "
                     f"{remedy}, or merge the file into the model (lapwan merge --model)")


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU and contiguous. safetensors refuses views of one storage (a stacked parameter): those are copied, but
    not a tensor that fills its storage, since a LoRA of 14B in memory twice takes more than a GiB."""
    plain = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
