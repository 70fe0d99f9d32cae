"""Tensor names in adapter files: parsing the keys of every layout in use, and the names lapwan writes.

| layout    | example                                                                              |
|-----------|--------------------------------------------------------------------------------------|
| comfy     | `diffusion_model.blocks.0.self_attn.q.lora_A.weight` (also `lora_down`/`lora_up`)    |
| musubi    | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.lora_up.weight`, `.alpha`       |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight` (also PEFT's `base_model.model.` and `.default.`) |

A key is a module's name under a prefix, and a part (`PARTS`) of one kind of update. Module names of both key layouts
(original and diffusers', see `wan_keys`) are read under any prefix, and every part in every layout. A key that is not
understood gives None or an error; it is never skipped.

`is_adapter_key` and `unsupported_kind` tell adapters of other kinds from model weights; where the other kinds of files
are detected is listed in `lapwan.lora.formats`.

How to add a layout: an `AdapterLayout` in `LAYOUTS`. Its `read` detects and reads: a tensor's name gives a `Key`, or
None if it is not in this layout (the first layout in `LAYOUTS` that knows a name reads it). Its `names` are those that
lapwan writes. For `merge --format` to write it, its name in `LoraLayout` of settings/merge.py. Nothing else: files are
grouped, checked, read and written from these two functions (`open_lora` and `write_lora` of `lapwan.lora.formats`,
which also take other layouts than `LAYOUTS`).

How to add a kind of update: the names of its parts in `PARTS`; its class in `lapwan.lora.kinds`, which says more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lapwan.checkpoints.wan_keys import (
    OUTER_MODULES,
    PROJECTIONS,
    original_target,
    target_path,
    to_original,
)
from lapwan.errors import UserError, nearest
from lapwan.names import NoiseExpert

# Part -> the ends of names by which it is read; the first is what lapwan writes. `*` is the adapter's name, or nothing.
PARTS: dict[str, tuple[str, ...]] = {
    "down": ("lora_A*.weight", "lora_down*.weight", "lora.down*.weight"),
    "up": ("lora_B*.weight", "lora_up*.weight", "lora.up*.weight"),
    "alpha": ("alpha",),
    "diff": ("diff",),
    "magnitude": ("dora_scale", "lora_magnitude_vector*.weight", "lora_magnitude_vector*"),
    **{part: (part,) for factor in ("lokr_w1", "lokr_w2") for part in (factor, f"{factor}_a", f"{factor}_b")},
    **{part: (part,) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
}
# A difference is of a weight, a bias or a modulation: its end, and the leaf of the tensor. The first one of a leaf is
# written. ComfyUI reads `blocks.0.modulation.diff`; `diff_m` is what the distillations' tools write, and it drops that.
_DIFF_ENDS = {"modulation.diff": "modulation", "diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


def _ends() -> list[tuple[re.Pattern[str], str, str]]:
    """(pattern of a whole key, part, leaf of the tensor that it changes)."""
    ends = [(end, part, "weight") for part, known in PARTS.items() for end in known if part != "diff"]
    ends += [(end, "diff", leaf) for end, leaf in _DIFF_ENDS.items()]
    adapter = r"(?:\.(?P<adapter>[^.]+))?"
    return [(re.compile(rf"^(?P<module>.+)\.{re.escape(end).replace(re.escape('*'), adapter)}$"), part, leaf)
            for end, part, leaf in ends]


_ENDS = _ends()
# Prefixes of a module path -> the transformer they name. transformer_1 and transformer_2 are the noise experts in files
# that hold both; a plain `transformer` may be either, since users load such a file into either transformer.
_PREFIXES: dict[str, str | None] = {
    "base_model.model.": None, "model.": None, "diffusion_model.": None, "transformer.": "transformer",
    "transformer_1.": "transformer_1", "transformer_2.": "transformer_2",
}
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

# Kinds of adapters that lapwan does not read, by a pattern in their keys.
_IMAGE_BRANCH = "Wan2.1's image branch, which Wan2.2 lacks"
_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"lora_[AB]\.(.+\.)?bias$|lora_B_bias", "a LoRA with biases"),
    (r"(^|[._])b?oft_", "OFT"),
    (r"lora_mid|\.reshape_weight$", "a Tucker decomposition (lora_mid)"),
    (r"lokr_t2|hada_t[12]", "a Tucker decomposition (t1, t2)"),
    (r"^(lora_te|text_encoder|lora_llm|text_encoders)", "a text encoder's LoRA"),
    (r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder", _IMAGE_BRANCH),
)


@dataclass(frozen=True)
class Key:
    """A parsed key. `path` names the tensor that is changed, as `wan_keys.target_path` does: diffusers' module path for
    a weight; `component` is the transformer that a prefix names, if any."""

    path: str
    part: str
    component: str | None
    layout: str
    adapter: str | None


@dataclass(frozen=True)
class AdapterLayout:
    """How a tool names the tensors of an adapter.

    read: a tensor's name -> its key; None if it is not in this layout.
    names: (path, as `wan_keys.target_path` has it; the transformer in a file for both noise experts, or None) -> names
        by part. A kind of update of which a part has no name is not written.
    alpha_in_metadata: alpha is written to the metadata `lora_adapter_metadata`, not as a tensor.
    folds_outer_alpha: alpha of modules outside the blocks is folded into B, since tools do not read it there.
    needs_alpha: alpha is always a tensor, also where it is r, since tools raise without it.
    """

    read: Callable[[str], Key | None]
    names: Callable[[str, str | None], dict[str, str]]
    alpha_in_metadata: bool = False
    folds_outer_alpha: bool = False
    needs_alpha: bool = False


def _flat_names() -> dict[str, str]:
    """`self_attn_q` -> `attn1.to_q`: projections and outer modules in both layouts, with underscores for dots."""
    pairs = [(original, path) for original, path in (PROJECTIONS | OUTER_MODULES).items()]
    return {name.replace(".", "_"): path for original, path in pairs for name in (original, path)}


_FLAT = _flat_names()
_FLAT_BLOCK = re.compile(r"^blocks_(\d+)_(.+)$")


def _unflatten(name: str) -> str | None:
    if match := _FLAT_BLOCK.match(name):
        inner = _FLAT.get(match[2])
        return f"blocks.{match[1]}.{inner}" if inner and match[2] not in _FLAT_OUTER else None
    return _FLAT.get(name) if name in _FLAT_OUTER else None


_FLAT_OUTER = {name.replace(".", "_") for pair in OUTER_MODULES.items() for name in pair}


def _resolve(module: str, leaf: str) -> tuple[str, str | None, str] | None:
    """(target path, component named by a prefix, layout) of a key's module and the leaf of the tensor it changes."""
    for prefix in _FLAT_PREFIXES:
        if module.startswith(prefix):
            path = _unflatten(module.removeprefix(prefix))
            target = target_path(f"{path}.{leaf}") if path else None
            return (target, None, "musubi") if target else None
    component: str | None = None
    stripped = True
    while stripped:
        stripped = False
        for prefix, named in _PREFIXES.items():
            if module.startswith(prefix):
                module, stripped, component = module.removeprefix(prefix), True, named or component
    target = target_path(f"{module}.{leaf}")
    if target is None:
        return None
    original = original_target(target)
    return target, component, "comfy" if original is not None and original[0] == module else "diffusers"


def _split(key: str) -> tuple[str, str, str, str | None] | None:
    """(module, part, leaf of the tensor it changes, adapter's name) of a key; None if it ends as no part does."""
    for pattern, part, leaf in _ENDS:
        if match := pattern.match(key):
            return match["module"], part, leaf, match.groupdict().get("adapter")
    return None


def _reader(layout: str) -> Callable[[str], Key | None]:
    def read(key: str) -> Key | None:
        split = _split(key)
        resolved = _resolve(split[0], split[2]) if split else None
        if split is None or resolved is None or resolved[2] != layout:
            return None
        _, part, _, adapter = split
        path, component, _ = resolved
        # Norms have no low-rank pairs or products.
        return Key(path, part, component, layout, adapter) if part == "diff" or to_original(path) else None

    return read


def parse_key(key: str, layouts: Mapping[str, AdapterLayout] | None = None) -> Key | None:
    """Parse a tensor's name by the first of `layouts` (None: `LAYOUTS`) that knows it; None if none does."""
    keys = (layout.read(key) for layout in (LAYOUTS if layouts is None else layouts).values())
    return next((parsed for parsed in keys if parsed is not None), None)


def unsupported_kind(key: str) -> str | None:
    """The unsupported kind of adapter that a key belongs to, in words for the error message; None if it is not one."""
    return next((kind for pattern, kind in _UNSUPPORTED if re.search(pattern, key)), None)


def is_adapter_key(key: str) -> bool:
    """True if a key belongs to an adapter, supported or not, and so not to a model's weights."""
    return _split(key) is not None or "lora" in key or unsupported_kind(key) not in (None, _IMAGE_BRANCH)


def unknown_keys_error(path: object, keys: Sequence[str]) -> UserError:
    """The error for keys of an adapter file that are not understood: names the first, with its kind or a near match."""
    key, more = keys[0], f" (and {len(keys) - 1} more such keys)" if len(keys) > 1 else ""
    kind = unsupported_kind(key)
    if kind:
        return UserError(f"{path}: key {key!r}{more} is {kind}; lapwan reads LoRA, DoRA, LoKr, LoHa and full "
                         "deltas of Wan's layers: convert the file first, or use a file without it")
    split = _split(key)
    known = [*PROJECTIONS, *PROJECTIONS.values(), *OUTER_MODULES, *OUTER_MODULES.values()]
    module = re.sub(r"^.*blocks[._]\d+[._]", "", split[0]) if split else key
    return UserError(f"{path}: key {key!r}{more} is not understood{nearest(module, known)}; expected are LoRA keys of "
                     "Wan's Linear layers, such as 'diffusion_model.blocks.0.self_attn.q.lora_A.weight'")


def _original(path: str) -> tuple[str, str]:
    original = original_target(path)
    if original is None:
        raise ValueError(f"not a tensor of a Wan transformer that adapters change: {path}")
    return original


def _part_ends(leaf: str) -> dict[str, str]:
    """The end of the name by part of the kinds that can change a tensor with this leaf."""
    diff = next(end for end, of in _DIFF_ENDS.items() if of == leaf)
    if leaf != "weight":
        return {"diff": diff}
    return {part: ends[0].replace("*", "") for part, ends in PARTS.items()} | {"diff": diff}


def _comfy_names(path: str, component: str | None) -> dict[str, str]:
    module, leaf = _original(path)
    stem = f"diffusion_model.{component}.{module}" if component else f"diffusion_model.{module}"
    return {part: f"{stem}.{end}" for part, end in _part_ends(leaf).items()}


_MUSUBI_PARTS = (
    "alpha", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _musubi_names(path: str, component: str | None) -> dict[str, str]:
    """What musubi-tuner's loader applies: not differences, magnitudes or a w1 of two factors, which it drops with a
    warning at most, nor the patch embedding, on whose five dimensions it raises."""
    module, leaf = _original(path)
    if leaf != "weight" or path == "patch_embedding":
        return {}
    ends = {"down": "lora_down.weight", "up": "lora_up.weight"} | {part: part for part in _MUSUBI_PARTS}
    return {part: f"lora_unet_{module.replace('.', '_')}.{end}" for part, end in ends.items()}


def _diffusers_names(path: str, component: str | None) -> dict[str, str]:
    """Low-rank pairs alone: diffusers drops other kinds with a warning."""
    _, leaf = _original(path)
    ends = _part_ends(leaf)
    return {part: f"transformer.{path}.{ends[part]}" for part in ("down", "up", "alpha") if part in ends}


LAYOUTS: dict[str, AdapterLayout] = {
    "comfy": AdapterLayout(_reader("comfy"), _comfy_names, folds_outer_alpha=True),
    "musubi": AdapterLayout(_reader("musubi"), _musubi_names, needs_alpha=True),
    "diffusers": AdapterLayout(_reader("diffusers"), _diffusers_names, alpha_in_metadata=True),
}

# A prefix's component -> the noise expert, in a file for both.
COMPONENT_NOISE_EXPERTS: dict[str, NoiseExpert] = {
    name: noise_expert for noise_expert in NoiseExpert
    for name in (noise_expert.component, noise_expert.one_file_component)
}
