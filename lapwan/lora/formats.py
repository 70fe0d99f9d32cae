"""LoRA files: one reader for every layout in use, one writer for three, around `AdapterState`.

Tensor names, and how to add a layout, are in `lapwan.checkpoints.lora_keys`; the kinds of update that a file may hold
in `lapwan.lora.kinds`; the noise expert, and alpha outside tensors, in `lapwan.lora.noise_expert` and
`lapwan.lora.metadata`.

A file is a .safetensors, one of `torch.save` (.bin, .pt, ...), or a PEFT folder (`adapter_config.json`). What of it is
not read is counted by reason (`AdapterFile.dropped`); `KeyRule` says what may be dropped.

Which kind of file a .safetensors is: `open_lora` takes a LoRA and refuses all else; `lora_keys.is_adapter_key` tells
other adapters from model weights; `moe.mixture_file.is_mixture` a mixture;
`models.original_layout.has_original_names` the layout of a transformer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lapwan.checkpoints.container import TensorFile
from lapwan.checkpoints.lora_keys import (
    COMPONENT_NOISE_EXPERTS,
    LAYOUTS,
    PARTS,
    AdapterLayout,
    Key,
    is_adapter_key,
    is_unusual_wrapper,
    other_modules,
    parse_key,
    unknown_keys_error,
)
from lapwan.checkpoints.tensors import load_tensor, open_tensors, save_tensors
from lapwan.checkpoints.wan_keys import to_original
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.lora.adapter_file import AdapterFile, AdapterModule
from lapwan.lora.checks import check_fits
from lapwan.lora.kinds import build_update, kind_of
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.metadata import FORMAT_KEY, AdapterConfig, adapter_config, file_metadata
from lapwan.lora.noise_expert import (
    NOISE_EXPERT_KEY,
    join_metadata,
    metadata_for,
    noise_expert_from_file_name,
    noise_expert_from_metadata,
    of_one_transformer,
)
from lapwan.lora.state import AdapterState, LowRank, WeightUpdate
from lapwan.names import NoiseExpert

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
# strict: whatever would be dropped is refused. default: what no Wan2.2 model has is dropped. common: modules of other
# models are dropped too.
Check = Callable[[Path], None]  # called with a written file, before it gets its name
KeyRule = Literal["strict", "default", "common"]


def open_lora(
    path: Path, layouts: Mapping[str, AdapterLayout] = LAYOUTS, rule: KeyRule = "default"
) -> dict[NoiseExpert | None, AdapterFile]:
    """The adapters of a file by noise expert, from its header (key None: the noise expert is not known).

    Args:
        path: a .safetensors file, one of `torch.save`, or a PEFT folder.
        layouts: key layouts by name; the first one that knows a tensor's name reads it.
        rule: what may be dropped.

    Raises:
        UserError: not a LoRA, a mixture, an unknown or unsupported key (named), A without B, shapes that do not fit.
    """
    file = open_tensors(_adapter_path(path))
    if file.metadata.get(FORMAT_KEY, "").startswith("mixture/"):
        raise UserError(f"{path} is a mixture; pass it with --moe")
    keys = {name: parse_key(name, layouts) for name in file.tensors}
    if not any(key is not None or is_adapter_key(name) for name, key in keys.items()):
        raise UserError(f"{path} is not a LoRA: none of its {len(file.tensors)} tensors is a LoRA's "
                        "(expected names such as 'blocks.0.self_attn.q.lora_A.weight')")
    parsed: dict[str, Key] = {name: key for name, key in keys.items() if key is not None}
    dropped = _dropped(path, [name for name, key in keys.items() if key is None], rule)
    if not parsed:
        raise UserError(f"{path} holds nothing that Wan2.2 has: "
                        + ", ".join(f"{count} tensors of {reason}" for reason, count in dropped.items()))
    adapters = {key.adapter for key in parsed.values() if key.part in LowRank.PARTS}
    if len(adapters) > 1:
        names = ", ".join(sorted(str(a) for a in adapters))
        raise UserError(f"{path} holds several adapters ({names}); save one adapter per file")
    wrappers = tuple(sorted({key.wrapper for key in parsed.values() if is_unusual_wrapper(key.wrapper)}))
    return {noise_expert: replace(adapter, dropped=dict(dropped), wrappers=wrappers)
            for noise_expert, adapter in _by_noise_expert(file, parsed).items()}


def open_for_use(path: Path, rule: KeyRule = "default") -> dict[NoiseExpert | None, AdapterFile]:
    """`open_lora` without full deltas of zeros, which some files have for every norm: they change nothing.

    Args:
        path: a .safetensors file, one of `torch.save`, or a PEFT folder.
        rule: which unknown tensors may be dropped; with `strict` full deltas of zeros stay too.

    Returns:
        Adapters by noise expert; None as key if the file does not say which.

    Raises:
        UserError: as `open_lora`.
    """
    return {e: adapter if rule == "strict" else adapter.without_zeros()
            for e, adapter in open_lora(path, rule=rule).items()}


def is_peft_folder(path: Path) -> bool:
    """A folder as PEFT saves an adapter."""
    return any((path / name).is_file() for name in _PEFT_NAMES)


def _adapter_path(path: Path) -> Path:
    """The file itself, or that of a PEFT folder."""
    if not path.is_dir():
        return path
    inside = next((path / name for name in _PEFT_NAMES if (path / name).is_file()), None)
    if inside is None:
        raise UserError(f"{path} is a folder; a .safetensors file is needed here, or a PEFT folder with "
                        f"{' or '.join(_PEFT_NAMES)} and adapter_config.json")
    return inside


def _dropped(path: Path, unknown: Sequence[str], rule: KeyRule) -> dict[str, int]:
    """How many tensors are dropped, by reason; refuses what `rule` does not let drop."""
    droppable = {"strict": (), "default": ("dropped",), "common": ("dropped", "other")}[rule]
    counts: Counter[str] = Counter()
    refused: list[str] = []
    for name in unknown:
        other = other_modules(name)
        if other is None or other[1] not in droppable:
            refused.append(name)
        else:
            counts[other[0]] += 1
    if refused:
        raise unknown_keys_error(path, refused)
    return dict(counts)


def _by_noise_expert(file: TensorFile, parsed: dict[str, Key]) -> dict[NoiseExpert | None, AdapterFile]:
    peft_file = file.path.name in _PEFT_NAMES or any(name.startswith("base_model.") for name in parsed)
    config = adapter_config(file.path, file.metadata, peft_file)
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
    named_path = file.path.parent if file.path.name in _PEFT_NAMES else file.path  # PEFT names the folder
    unknown = recorded is None and not of_one_transformer(file.metadata)
    from_name = noise_expert_from_file_name(named_path) if unknown else None
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
    modules = {path: _module(file, path, names, config) for path, names in by_path.items() if "up_bias" not in names}
    for path, names in by_path.items():
        if "up_bias" in names:
            modules[path] = _pair_bias(file, path, names, modules.get(path.removesuffix(".bias")))
    return modules


def _pair_bias(file: TensorFile, path: str, names: Mapping[str, str], pair: AdapterModule | None) -> AdapterModule:
    """The bias of a pair's B (PEFT's `lora_bias`): alpha / r times it is added to the module's bias."""
    name = names["up_bias"]
    if len(names) > 1:
        raise UserError(f"{file.path}: {' and '.join(map(repr, names.values()))} change the same tensor; lapwan reads "
                        "one kind of update per tensor: remove one of them")
    if pair is None or not pair.stackable or pair.rank is None:
        raise UserError(f"{file.path}: '{name}' has no low-rank pair of a Linear beside it; the file is incomplete")
    alpha = pair.alpha
    scale = 1.0 if alpha is None else (
        float(load_tensor(file, alpha).item()) if isinstance(alpha, str) else alpha) / pair.rank
    module = _module(file, path, {"diff": name}, None)
    if module.shape != pair.shape[:1]:
        raise UserError(f"{file.path}: '{name}' {list(module.shape)} is not a bias of {pair.shape[0]} features")
    return replace(module, factor=scale)


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
    if config is not None and config.use_dora and kind is LowRank:
        # Loaders disagree: some apply a plain LoRA, PEFT a DoRA with the base's norms. The magnitudes were trained.
        raise UserError(f"{config.source}: use_dora = true, but module '{path}' has no magnitude in the file "
                        "(lora_magnitude_vector, dora_scale), without which its update is not known: save the adapter "
                        "again with them, or set use_dora to false if it was trained as a plain LoRA")
    infos = [file.tensors[name] for name in _in_order(tensors)]
    for info in infos:
        if info.dtype not in _FLOATS:
            raise UserError(f"{file.path}: '{info.name}' is {info.dtype}; a LoRA has {', '.join(_FLOATS)}")
        if 0 in info.shape:
            raise UserError(f"{file.path}: '{info.name}' {list(info.shape)} is empty, as of a LoRA of rank 0; remove "
                            "its module from the file, which changes nothing, or download the file again")
    try:
        empty = {part: torch.empty(file.tensors[name].shape, device="meta") for part, name in tensors.items()}
        outline = build_update(empty, None)
    except ValueError:
        shapes = " and ".join(f"'{info.name}' {list(info.shape)}" for info in infos)
        raise UserError(f"{file.path}: {shapes} are not {kind.FORM}") from None
    alpha: str | float | None = alpha_name
    factor = 1.0
    if alpha_name is not None:
        if math.prod(file.tensors[alpha_name].shape) != 1:
            raise UserError(f"{file.path}: '{alpha_name}' {list(file.tensors[alpha_name].shape)} is not one number")
    elif outline.rank is not None and "down" in tensors:
        alpha = config.alpha(path, outline.rank) if config else float(outline.rank)
    elif config is not None and kind in (LoKr, LoHa):  # PEFT scales them by its r, also where no factor has that rank
        scale = config.product_scale(path)
        alpha, factor = (None, scale) if outline.rank is None else (scale * outline.rank, 1.0)
    return AdapterModule(file, path, tensors, alpha, outline, factor)


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
        path: replaced if it exists.
        state: the adapter.
        layout: of the tensors' names, a key of `layouts`.
        dtype: of A and B in the file; None keeps each tensor's own.
        fold_alpha: multiply B by alpha / r everywhere, so that alpha = r, for tools that do not read alpha; rounds
            once. No alpha is written, except where the layout's tools need it (`AdapterLayout.needs_alpha`).
        layouts: key layouts by name.
        check: is called with the path of the finished file, before it is renamed to `path`.

    Raises:
        UserError: the LoRA has no modules, values that are not finite or do not fit `dtype`, or a kind of update that
            the layout has no names for.
        ValueError: a path that is not a tensor of Wan.
    """
    tensors, metadata = _named(path, state, layouts[layout], dtype, fold_alpha)
    with atomic_file(path) as temporary:
        save_tensors(tensors, temporary, metadata=metadata)
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
        save_tensors(tensors, temporary, metadata=join_metadata(metadata))
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
        _check_names(path, module, update, names)
        if fold or dtype is not None:  # else the numbers are the given ones, which a checkpoint keeps as they are
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


def check_layout(path: Path, outline: AdapterState, layout: str) -> None:
    """Refuse before the work what a layout cannot hold.

    Args:
        path: the file that is to be written.
        outline: the adapter, in tensors without data.
        layout: a key of `LAYOUTS`.

    Raises:
        UserError: a kind of update that the layout has no names for.
    """
    for module, update in outline.entries.items():
        _check_names(path, module, update, LAYOUTS[layout].names(module, None))


def _check_names(path: Path, module: str, update: WeightUpdate, names: Mapping[str, str]) -> None:
    if all(part in names for part in update.parts()):
        return
    remedy = "write the comfy layout"
    if "down" in names and to_original(module) is not None and not update.needs_weight:
        remedy += ", add --rank N to write it as a low-rank pair by SVD"
    raise UserError(f"cannot write {path}: module '{module}' is a {update.kind}, which this layout does not have; "
                    f"{remedy}, or merge the file into the model (lapwan merge --model)")


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU and contiguous. safetensors refuses views of one storage (a stacked parameter): those are copied, but
    not a tensor that fills its storage, since a LoRA of 14B in memory twice takes more than a GiB."""
    plain = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
