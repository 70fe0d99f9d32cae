"""Tensor names in adapter files: parsing the keys of every layout in use, and the names lapwan writes.

| layout    | example                                                                              |
|-----------|--------------------------------------------------------------------------------------|
| comfy     | `diffusion_model.blocks.0.self_attn.q.lora_A.weight` (also `lora_down`/`lora_up`)    |
| musubi    | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.lora_up.weight`, `.alpha`       |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight` (also PEFT's `base_model.model.` and `.default.`) |

A key is a module's name behind a wrapper, and a part (`PARTS`) of one kind of update. Names of modules in both key
layouts (original and diffusers', see `wan_keys`), with dots, underscores or both, are read behind any wrapper, and
every part in every layout. Wrappers that belong to modules of other models (`OTHER_MODULES`) are not stripped.

A key that is not read is dropped for a reason that is reported, or refused: `OTHER_MODULES` has which. `is_adapter_key`
tells adapters from model weights; where the other kinds of files are detected is listed in `lapwan.lora.formats`.

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
from functools import lru_cache

from lapwan.checkpoints.wan_keys import (
    ORIGINAL_NORMS,
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
    "down": ("lora_A*.weight", "lora_down*.weight", "lora.down*.weight", "lora_A*", "lora_down*", "lora.down*",
             "lora_linear_layer.down.weight"),
    "up": ("lora_B*.weight", "lora_up*.weight", "lora.up*.weight", "lora_B*", "lora_up*", "lora.up*",
           "lora_linear_layer.up.weight"),
    "mid": ("lora_mid*.weight", "lora_mid"),
    "up_bias": ("lora_B*.bias", "lora_up*.bias", "lora.up*.bias"),
    "alpha": ("alpha", "lora_alpha"),
    "diff": ("diff",),
    "magnitude": ("dora_scale", "lora_magnitude_vector*.weight", "lora_magnitude_vector*"),
    **{part: (f"{part}*", f"{part}*.weight") for part in (
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2",
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f"glora_{factor}": (f"{factor}.weight",) for factor in ("a1", "a2", "b1", "b2")},
}
# A difference is of a weight, a bias or a modulation: its end, and the leaf of the tensor. The first one of a leaf is
# written. ComfyUI reads `blocks.0.modulation.diff`; `diff_m` is what the distillations' tools write, and it drops that.
# LyCORIS writes `w_norm` and `b_norm` of norms.
_DIFF_ENDS = {"modulation.diff": "modulation", "diff": "weight", "diff_b": "bias", "diff_m": "modulation",
              "w_norm": "weight", "b_norm": "bias"}
_LEAVES = {"up_bias": "bias"}  # of the other parts; else a weight


def _ends() -> list[tuple[re.Pattern[str], str, str]]:
    """(pattern of a whole key, part, leaf of the tensor that it changes)."""
    ends = [(end, part, _LEAVES.get(part, "weight")) for part, known in PARTS.items() for end in known
            if part != "diff"]
    ends += [(end, "diff", leaf) for end, leaf in _DIFF_ENDS.items()]
    adapter = r"(?:\.(?P<adapter>(?!(?:bias|weight)$)[^.]+))?"
    return [(re.compile(rf"^(?P<module>.+)\.{re.escape(end).replace(re.escape('*'), adapter)}$"), part, leaf)
            for end, part, leaf in ends]


_ENDS = _ends()
# Words of wrappers -> the transformer they name. transformer_1 and transformer_2 are the noise experts in files that
# hold both; a plain `transformer` may be either, since users load such a file into either transformer.
_COMPONENTS = {
    "transformer": "transformer", "dit": "transformer", "transformer_1": "transformer_1",
    "transformer_2": "transformer_2", "dit2": "transformer_2", "high_noise_model": "transformer_1",
    "low_noise_model": "transformer_2",
}
# Wrappers of names with underscores consist of these words: others may be modules of another architecture, such as
# `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q`.
_FLAT_KINDS = ("lora", "lycoris", "locon", "lokr", "loha", "dora", "glora")
_FLAT_WORDS = {"unet", "dit", "dit2", "wan", "model", "diffusion", "base", "module", "pipe", "net", "denoiser", "high",
               "low", "noise", "1", "2"}
_USUAL_WRAPPERS = re.compile(
    r"((base_model\.model|model|diffusion_model|transformer(_[12])?)\.)*|lora_unet__?|lora_transformer_|lycoris_")

_IMAGE_BRANCH = "Wan2.1's image branch, which Wan2.2 lacks"
# What lapwan does not read, by a pattern of keys: words, and whether it is "dropped" with a report, dropped only on
# demand since a part of the adapter's effect may be lost ("other" models' modules), or refused always ("kind").
OTHER_MODULES: tuple[tuple[str, str, str], ...] = (
    (r"(^|[._])[kv][._]img([._]|$)|norm_[kv][._]img|img_emb|add(ed)?_[kqv]_proj|norm_added_[kq]|image_embedder",
     _IMAGE_BRANCH, "dropped"),
    (r"^(lora_te|text_encoder|lora_llm|cond_stage_model)|(^|[._])(text_encoders?|te[12]?|t5|umt5|clip)[._]",
     "a text encoder's LoRA, which lapwan does not apply", "dropped"),
    (r"(^|[._])vace_", "a module of VACE models (Wan-VACE)", "other"),
    (r"(^|[._])(ref_conv|control_adapter|controlnet|control_blocks)", "a module of Fun control models", "other"),
    (r"(^|[._])(cam_|camera)", "a module of camera control models", "other"),
    (r"(^|[._])(casual_audio|causal_audio|audio_|trainable_cond|cond_encoder|frame_packer)",
     "a module of speech-to-video models (Wan2.2-S2V)", "other"),
    (r"(^|[._])(face_|motion_encoder|pose_patch)", "a module of Wan2.2-Animate", "other"),
    (r"(^|[._])(vae|first_stage_model|image_encoder)[._]", "a module of a VAE or an image encoder", "other"),
    (r"lora_A(\.[^.]+)?\.bias$|lora_down\.bias$", "a bias inside a low-rank pair", "kind"),
    (r"(^|[._])b?oft_", "OFT or BOFT", "kind"),
    (r"[._](ia3_l|on_input)(\.|$)", "IA3", "kind"),
    (r"[._]vera_(lambda_[bd]|[AB])(\.|$)", "VeRA", "kind"),
    (r"[._](hra_(u|theta)|(bone|miss)_block|shira_weight|fourierft_spectrum|vblora_|randlora_)",
     "an adapter of another kind (HRA, Bone, SHiRA, FourierFT, VB-LoRA or RandLoRA)", "kind"),
    (r"lora_embedding_[AB]", "a LoRA of an embedding", "kind"),
    (r"[._]modules_to_save[._]", "a module trained whole (PEFT's modules_to_save)", "kind"),
    (r"\.set_weight$", "a replacement of a whole weight", "kind"),
    (r"\.base_layer\.(weight|bias)$", "the base model's weights", "dropped"),
    (r"\.reshape_weight$", "a LoRA that reshapes its weight", "kind"),
)


@dataclass(frozen=True)
class Key:
    """A parsed key. `path` names the tensor that is changed, as `wan_keys.target_path` does: diffusers' module path for
    a weight; `component` is the transformer that the wrapper names, if any; `wrapper` is what was stripped."""

    path: str
    part: str
    component: str | None
    layout: str
    adapter: str | None
    wrapper: str = ""


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


def _flat_names() -> tuple[dict[str, str], dict[str, str]]:
    """Names with underscores -> with dots, of what adapters change inside a block and outside, in both layouts."""
    inner = [*PROJECTIONS, *PROJECTIONS.values(), *ORIGINAL_NORMS, *ORIGINAL_NORMS.values()]
    outer = [*OUTER_MODULES, *OUTER_MODULES.values(), "head"]
    modulations = ["modulation", "scale_shift_table"]
    tables = inner + modulations, [*outer, "head.modulation", "scale_shift_table"]
    first, second = ({name.replace(".", "_"): name for name in names} for names in tables)
    return first, second


_FLAT_INNER, _FLAT_OUTER = _flat_names()
_FLAT_BLOCK = re.compile(r"^(|.*_)blocks_(\d+)(?:_(.+))?$")


def _unflatten(name: str) -> tuple[str, str] | None:
    """(wrapper, module with dots) of a name with underscores; None if it is not one of Wan's."""
    if match := _FLAT_BLOCK.match(name):
        if match[3] is None:
            return match[1], f"blocks.{match[2]}"
        inner = _FLAT_INNER.get(match[3])
        return (match[1], f"blocks.{match[2]}.{inner}") if inner else None
    for flat, module in _FLAT_OUTER.items():
        if name == flat or name.endswith(f"_{flat}"):
            return name.removesuffix(flat), module
    return None


def _flat_wrapper(wrapper: str) -> bool:
    """Whether it is a wrapper rather than modules of another architecture."""
    words = [word for word in wrapper.split("_") if word]
    if words and words[0] in _FLAT_KINDS:
        words = words[1:]
        if words == ["transformer"]:
            return True
    return _FLAT_WORDS.issuperset(words) and (not words or words[-1] != "transformer")


def _dotted_wrapper(words: Sequence[str]) -> bool:
    wrapper = "".join(f"{word}." for word in words)
    return "blocks" not in words and not any(word.isdigit() for word in words) and other_modules(wrapper) is None


def _target(module: str, leaf: str, part: str) -> str | None:
    """The target of a part at `module`; a difference may also be named by the tensor (`blocks.0.modulation.diff`)."""
    target = target_path(f"{module}.{leaf}")
    return target_path(module) if target is None and part == "diff" else target


@lru_cache(maxsize=1 << 14)
def _resolve(module: str, leaf: str, part: str) -> tuple[str, str | None, str, str] | None:
    """(target path, component named by the wrapper, layout, wrapper) of a key's module."""
    words = module.split(".")
    for start in range(len(words)):
        name = ".".join(words[start:])
        target = _target(name, leaf, part)
        if target is None:
            continue
        if not _dotted_wrapper(words[:start]):
            return None
        named = [_COMPONENTS[word] for word in words[:start] if word in _COMPONENTS]
        original = original_target(target)
        layout = "comfy" if original is not None and original[0] in name else "diffusers"
        return target, named[-1] if named else None, layout, "".join(f"{word}." for word in words[:start])
    flat = _unflatten(module.replace(".", "_"))
    if flat is None or not _flat_wrapper(flat[0]) or other_modules(flat[0]) is not None:
        return None
    target = _target(flat[1], leaf, part)
    return (target, None, "musubi", flat[0]) if target else None


def _split(key: str) -> tuple[str, str, str, str | None] | None:
    """(module, part, leaf of the tensor it changes, adapter's name) of a key; None if it ends as no part does."""
    for pattern, part, leaf in _ENDS:
        if match := pattern.match(key):
            return match["module"], part, leaf, match.groupdict().get("adapter")
    return None


def _reader(layout: str) -> Callable[[str], Key | None]:
    def read(key: str) -> Key | None:
        split = _split(key)
        resolved = _resolve(split[0], split[2], split[1]) if split else None
        if split is None or resolved is None or resolved[2] != layout:
            return None
        _, part, _, adapter = split
        path, component, _, wrapper = resolved
        # Norms have no low-rank pairs or products.
        known = part in ("diff", "up_bias") or to_original(path)
        return Key(path, part, component, layout, adapter, wrapper) if known else None

    return read


def parse_key(key: str, layouts: Mapping[str, AdapterLayout] | None = None) -> Key | None:
    """Parse a tensor's name by the first of `layouts` (None: `LAYOUTS`) that knows it; None if none does."""
    keys = (layout.read(key) for layout in (LAYOUTS if layouts is None else layouts).values())
    return next((parsed for parsed in keys if parsed is not None), None)


def other_modules(key: str) -> tuple[str, str] | None:
    """(words, treatment) of `OTHER_MODULES` for a key that is not read; None if it is in none of them."""
    return next(((words, how) for pattern, words, how in OTHER_MODULES if re.search(pattern, key)), None)


def is_unusual_wrapper(wrapper: str) -> bool:
    """True for a wrapper that no layout of lapwan's table has."""
    return _USUAL_WRAPPERS.fullmatch(wrapper) is None


def is_adapter_key(key: str) -> bool:
    """True if a key belongs to an adapter, supported or not, and so not to a model's weights."""
    other = other_modules(key)
    return _split(key) is not None or "lora" in key or (other is not None and other[1] == "kind")


def unknown_keys_error(path: object, keys: Sequence[str]) -> UserError:
    """The error for keys of an adapter file that are not understood: names the first, with its kind or a near match."""
    key, more = keys[0], f" (and {len(keys) - 1} more such keys)" if len(keys) > 1 else ""
    other = other_modules(key)
    if other and other[1] == "other":
        return UserError(f"{path}: key {key!r}{more} is {other[0]}; to apply only the modules that Wan2.2 has, add "
                         "--common-modules (common_modules = true), or use a file for this model")
    if other and other[1] == "dropped":
        return UserError(f"{path}: key {key!r}{more} is of {other[0]}; it would be dropped, which --strict refuses: "
                         "leave --strict out, or use a file for this model")
    if other:
        return UserError(f"{path}: key {key!r}{more} is {other[0]}; lapwan reads LoRA, DoRA, LoKr, LoHa, GLoRA and "
                         "full deltas of Wan's layers: convert the file first, or use a file without it")
    whole, _, leaf = key.rpartition(".")
    if leaf in ("weight", "bias") and _resolve(whole, leaf, "diff") is not None:
        return UserError(f"{path}: key {key!r}{more} is a whole weight beside an adapter (PEFT's modules_to_save), "
                         "which is not read: use a file without it, or one that holds the difference from the base")
    split = _split(key)
    known = [*PROJECTIONS, *PROJECTIONS.values(), *OUTER_MODULES, *OUTER_MODULES.values()]
    module = re.sub(r"^.*blocks[._]\d+[._]", "", split[0]) if split else key
    near = "" if module in known else nearest(module, known)
    return UserError(f"{path}: key {key!r}{more} is not understood{near}; expected are LoRA keys of "
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
