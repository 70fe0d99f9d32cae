"""Tensor names in LoRA files: parsing the keys of every layout in use, and the names lapwan writes.

| layout    | example                                                                              |
|-----------|--------------------------------------------------------------------------------------|
| comfy     | `diffusion_model.blocks.0.self_attn.q.lora_A.weight` (also `lora_down`/`lora_up`)    |
| musubi    | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.lora_up.weight`, `.alpha`       |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight` (also PEFT's `base_model.model.` and `.default.`) |

Module names of both key layouts (original and diffusers', see `wan_keys`) are read under any prefix. A key that is not
understood gives None or an error; it is never skipped.

`is_adapter_key` and `unsupported_kind` tell adapters of other kinds from model weights; where the other kinds of files
are detected is listed in `lapwan.lora.formats`.

How to add a layout: its name in `Layout` and `LAYOUTS`. To read it: its prefix in `_PREFIXES` or a case in `_resolve`.
To write it: a case in `key_names`, and its name in `LoraLayout` of settings/merge.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lapwan.checkpoints.wan_keys import OUTER_MODULES, PROJECTIONS, to_diffusers, to_original
from lapwan.errors import UserError, nearest
from lapwan.names import NoiseExpert

Layout = Literal["comfy", "musubi", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("comfy", "musubi", "diffusers")
Part = Literal["down", "up", "alpha"]

_PART = re.compile(
    r"^(?P<module>.+)\.(?:(?P<kind>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)"
    r"(?:\.(?P<adapter>[^.]+))?\.weight|(?P<alpha>alpha))$"
)
_KINDS: dict[str, Part] = {
    "lora_A": "down", "lora_down": "down", "lora.down": "down", "lora_B": "up", "lora_up": "up", "lora.up": "up",
}
# Prefixes of a module path -> the transformer they name. transformer_1 and transformer_2 are the noise experts in files
# that hold both; a plain `transformer` may be either, since users load such a file into either transformer.
_PREFIXES: dict[str, str | None] = {
    "base_model.model.": None, "model.": None, "diffusion_model.": None, "transformer.": "transformer",
    "transformer_1.": "transformer_1", "transformer_2.": "transformer_2",
}
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

# Kinds of adapters that are more than ΔW = B A, by a pattern in their keys.
_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"\.diff$", "a full weight difference (.diff)"),
    (r"\.diff_b$", "a bias difference (.diff_b)"),
    (r"dora_scale|lora_magnitude_vector", "DoRA"),
    (r"lora_[AB]\.(.+\.)?bias$|lora_B_bias", "a LoRA with biases"),
    (r"hada_w[12]", "LoHa"),
    (r"lokr_w[12]", "LoKr"),
    (r"(^|[._])b?oft_", "OFT"),
    (r"lora_mid|\.reshape_weight$", "a Tucker decomposition (lora_mid)"),
    (r"^(lora_te|text_encoder|lora_llm|text_encoders)", "a text encoder's LoRA"),
    (r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder", "Wan2.1's image branch, which Wan2.2 lacks"),
)


@dataclass(frozen=True)
class Key:
    """A parsed key. `path` is diffusers' module path; `component` the transformer that a prefix names, if any."""

    path: str
    part: Part
    component: str | None
    layout: Layout
    adapter: str | None


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


def canonical_path(path: str) -> str | None:
    """A module path in either layout as diffusers' path; None if Wan has no such Linear."""
    if path == "patch_embedding":  # a Conv3d, not a Linear
        return None
    return to_diffusers(path) or (path if to_original(path) else None)


def _resolve(module: str) -> tuple[str, str | None, Layout] | None:
    """(diffusers' path, component named by a prefix, layout) of a key without its `.lora_A.weight` or the like."""
    for prefix in _FLAT_PREFIXES:
        if module.startswith(prefix):
            flat = module.removeprefix(prefix)
            path = _unflatten(flat)
            return (path, None, "musubi") if path and path != "patch_embedding" else None
    component: str | None = None
    stripped = True
    while stripped:
        stripped = False
        for prefix, named in _PREFIXES.items():
            if module.startswith(prefix):
                module, stripped, component = module.removeprefix(prefix), True, named or component
    diffusers_path = canonical_path(module)
    if diffusers_path is None:
        return None
    return diffusers_path, component, "comfy" if to_diffusers(module) else "diffusers"


def parse_key(key: str) -> Key | None:
    """Parse a tensor's name; None if it is not the LoRA key of a Wan Linear."""
    match = _PART.match(key)
    resolved = _resolve(match["module"]) if match else None
    if match is None or resolved is None:
        return None
    path, component, layout = resolved
    part: Part = "alpha" if match["alpha"] else _KINDS[match["kind"]]
    return Key(path, part, component, layout, match["adapter"])


def unsupported_kind(key: str) -> str | None:
    """The unsupported kind of adapter that a key belongs to, in words for the error message; None if it is not one."""
    return next((kind for pattern, kind in _UNSUPPORTED if re.search(pattern, key)), None)


def is_adapter_key(key: str) -> bool:
    """True if a key belongs to an adapter, supported or not, and so not to a model's weights."""
    return _PART.match(key) is not None or "lora" in key or unsupported_kind(key) not in (None, _UNSUPPORTED[-1][1])


def unknown_keys_error(path: object, keys: Sequence[str]) -> UserError:
    """The error for keys of a LoRA file that are not understood: names the first, with its kind or a near match."""
    key, more = keys[0], f" (and {len(keys) - 1} more such keys)" if len(keys) > 1 else ""
    kind = unsupported_kind(key)
    if kind:
        return UserError(f"{path}: key {key!r}{more} is {kind}; lapwan reads plain LoRA (A, B and alpha) of Wan's "
                         "Linear layers: convert the file first, or use a file without it")
    match = _PART.match(key)
    known = [*PROJECTIONS, *PROJECTIONS.values(), *OUTER_MODULES, *OUTER_MODULES.values()]
    module = re.sub(r"^.*blocks[._]\d+[._]", "", match["module"]) if match else key
    return UserError(f"{path}: key {key!r}{more} is not understood{nearest(module, known)}; expected are LoRA keys of "
                     "Wan's Linear layers, such as 'diffusion_model.blocks.0.self_attn.q.lora_A.weight'")


def key_names(path: str, layout: Layout, component: str | None = None) -> dict[Part, str]:
    """Names of a module's tensors by part.

    Args:
        path: diffusers' module path.
        component: the transformer, in a file for both noise experts (comfy only).

    Raises:
        ValueError: not a Linear of a Wan transformer.
    """
    original = to_original(path)
    if original is None:
        raise ValueError(f"not a Linear of a Wan transformer: {path}")
    if layout == "musubi":
        stem = "lora_unet_" + original.replace(".", "_")
        return {"down": f"{stem}.lora_down.weight", "up": f"{stem}.lora_up.weight", "alpha": f"{stem}.alpha"}
    named = f"{component}." if component else ""
    stem = f"diffusion_model.{named}{original}" if layout == "comfy" else f"transformer.{path}"
    return {"down": f"{stem}.lora_A.weight", "up": f"{stem}.lora_B.weight", "alpha": f"{stem}.alpha"}


# A prefix's component -> the noise expert, in a file for both.
COMPONENT_NOISE_EXPERTS: dict[str, NoiseExpert] = {
    name: noise_expert for noise_expert in NoiseExpert
    for name in (noise_expert.component, noise_expert.one_file_component)
}
