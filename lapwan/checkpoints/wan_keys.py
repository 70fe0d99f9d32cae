"""Module and tensor names of a Wan transformer in the two key layouts: the original release's and diffusers'.

| original                  | diffusers                |
|---------------------------|--------------------------|
| `blocks.0.self_attn.q`    | `blocks.0.attn1.to_q`    |
| `blocks.0.cross_attn.o`   | `blocks.0.attn2.to_out.0`|
| `blocks.0.ffn.0`          | `blocks.0.ffn.net.0.proj`|
| `head.head`               | `proj_out`               |

LoRA keys, which wrap these names in prefixes, are in `lapwan.checkpoints.lora_keys`.
Source: the official Wan2.2 release and diffusers' WanTransformer3DModel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lapwan.errors import nearest

# The ten Linear layers of a Wan block, by their paths inside it: original (also what settings name) -> diffusers.
PROJECTIONS: dict[str, str] = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}

# Modules outside the blocks: original path -> diffusers path.
OUTER_MODULES: dict[str, str] = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "patch_embedding": "patch_embedding",
}

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_PROJECTION_TO_ORIGINAL = {diffusers: original for original, diffusers in PROJECTIONS.items()}
_OUTER_TO_ORIGINAL = {diffusers: original for original, diffusers in OUTER_MODULES.items()}


def to_diffusers(path: str) -> str | None:
    """A Linear's path in diffusers' layout: `blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`; None if unknown."""
    if match := _BLOCK.match(path):
        inner = PROJECTIONS.get(match[2])
        return f"blocks.{match[1]}.{inner}" if inner else None
    return OUTER_MODULES.get(path)


def to_original(path: str) -> str | None:
    """The inverse of `to_diffusers`: `blocks.0.attn1.to_q` -> `blocks.0.self_attn.q`; None if unknown."""
    if match := _BLOCK.match(path):
        inner = _PROJECTION_TO_ORIGINAL.get(match[2])
        return f"blocks.{match[1]}.{inner}" if inner else None
    return _OUTER_TO_ORIGINAL.get(path)


_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_TOP = re.compile(  # where a transformer's own names begin, behind a wrapper such as `model.diffusion_model.`
    r"(?:^|\.)((?:blocks\.\d+|patch_embedding|(?:text|time)_embedding\.\d|time_projection\.\d|condition_embedder|"
    r"head\.head|head\.modulation|proj_out)(?:\.|$)|scale_shift_table$)")
ORIGINAL_NORMS = {
    "self_attn.norm_q": "attn1.norm_q", "self_attn.norm_k": "attn1.norm_k", "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k", "norm3": "norm2",  # the original numbers the norms in another order
}


def tensor_to_diffusers(name: str) -> str:
    """A transformer tensor's name in diffusers' layout; a name that is not in the original layout is returned as it is.

    `model.diffusion_model.blocks.0.self_attn.q.weight` -> `blocks.0.attn1.to_q.weight`, and with any other wrapper.
    """
    return _renamed(without_wrapper(name))


def without_wrapper(name: str) -> str:
    """A tensor's name without what is before the transformer's: `ema.model.blocks.0.ffn.0.bias` -> `blocks.0...`."""
    top = _TOP.search(name)
    return name[top.start(1) :] if top else name


def _renamed(plain: str) -> str:
    path, _, leaf = plain.rpartition(".")
    if leaf == "modulation":
        return "scale_shift_table" if path == "head" else f"{path}.scale_shift_table"
    if (known := to_diffusers(path)) is not None:
        return f"{known}.{leaf}"
    match = _BLOCK.match(path)
    if match and match[2] in ORIGINAL_NORMS:  # diffusers' own norm3 has no tensors
        return f"blocks.{match[1]}.{ORIGINAL_NORMS[match[2]]}.{leaf}"
    return plain


_NORM_TO_ORIGINAL = {diffusers: original for original, diffusers in ORIGINAL_NORMS.items()}
_LEAVES = ("bias", "scale_shift_table")


def target_path(tensor: str) -> str | None:
    """A tensor of a transformer, named in either layout, as adapters name it; None if Wan has no such tensor.

    A weight by its module's path in diffusers' layout, any other by its tensor's name there:
    `blocks.0.self_attn.q.weight` -> `blocks.0.attn1.to_q`, `blocks.0.norm3.bias` -> `blocks.0.norm2.bias`,
    `blocks.0.modulation` -> `blocks.0.scale_shift_table`.
    """
    name = _renamed(next((tensor.removeprefix(p) for p in _PREFIXES if tensor.startswith(p)), tensor))
    module, _, leaf = name.rpartition(".")
    if leaf == "scale_shift_table":
        return name if module == "" or re.fullmatch(r"blocks\.\d+", module) else None
    match = _BLOCK.match(module)
    known = to_original(module) is not None or (match is not None and match[2] in _NORM_TO_ORIGINAL)
    return {"weight": module, "bias": name}.get(leaf) if known else None


def parameter_name(target: str) -> str:
    """The tensor's name in diffusers' layout: the inverse of `target_path`."""
    return target if target.rpartition(".")[2] in _LEAVES else f"{target}.weight"


def original_target(target: str) -> tuple[str, str] | None:
    """(module in the original layout, leaf): `blocks.0.attn1.to_q` -> (`blocks.0.self_attn.q`, `weight`).

    The leaf is `weight`, `bias` or `modulation`; None for a target Wan does not have.
    """
    module, _, leaf = parameter_name(target).rpartition(".")
    if leaf == "scale_shift_table":
        return module or "head", "modulation"
    match = _BLOCK.match(module)
    norm = _NORM_TO_ORIGINAL.get(match[2]) if match else None
    original = f"blocks.{match[1]}.{norm}" if match and norm else to_original(module)
    return (original, leaf) if original else None


def target_label(target: str) -> tuple[str, str]:
    """(block or `outer`, name inside it in the original layout) of a target: `blocks.7.attn1.to_q` -> (`7`,
    `self_attn.q`), its bias -> (`7`, `self_attn.q.bias`); a target Wan does not have keeps its name."""
    if (original := original_target(target)) is None:
        return "outer", target
    module, leaf = original
    match = re.fullmatch(r"blocks\.(\d+)\.?(.*)", module)
    inner = match[2] if match else module
    name = inner if leaf == "weight" else f"{inner}.{leaf}".removeprefix(".")
    return (match[1] if match else "outer"), name


def split_block(path: str) -> tuple[int, str] | None:
    """`blocks.7.attn1.to_q` -> (7, 'self_attn.q'); None for a module outside the blocks."""
    match = _BLOCK.match(path)
    if match is None or match[2] not in _PROJECTION_TO_ORIGINAL:
        return None
    return int(match[1]), _PROJECTION_TO_ORIGINAL[match[2]]


_BLOCKS = re.compile(r"^blocks\.(\d+)(?:-(\d+))?$")


def _part_words() -> frozenset[str]:
    names = [name for pair in (*PROJECTIONS.items(), *OUTER_MODULES.items(), *ORIGINAL_NORMS.items()) for name in pair]
    words = {"modulation", "scale_shift_table", "bias"}
    for name in names:
        steps = name.split(".")
        words |= {".".join(steps[i:j]) for i in range(len(steps)) for j in range(i + 1, len(steps) + 1)}
    return frozenset(word for word in words if not word.isdigit())


PART_WORDS = _part_words()  # names of parts of a transformer in either layout: `ffn`, `attn1`, `self_attn.q`, `to_q`


def check_part(part: str) -> None:
    """Check the name of a part of a transformer: blocks (`blocks.7`, `blocks.20-39`), or one of `PART_WORDS`.

    Raises:
        ValueError: no such part.
    """
    match = _BLOCKS.match(part)
    if match and int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"'{part}': the first block comes after the last one")
    if not match and part not in PART_WORDS:
        raise ValueError(f"unknown part '{part}'{nearest(part, PART_WORDS)}; write blocks.7, blocks.20-39, or a name "
                         "such as attn1, attn2, ffn, self_attn.q")


def in_part(target: str, part: str) -> bool:
    """Whether a target lies in a part: `blocks.7.attn1.to_q` lies in `blocks.0-19`, `attn1`, `self_attn.q` and `q`."""
    block = _BLOCK.match(target)
    if match := _BLOCKS.match(part):
        return block is not None and int(match[1]) <= int(block[1]) <= int(match[2] or match[1])
    names = block[2] if block else target, target_label(target)[1]
    return any(f".{part}." in f".{name}." for name in names)


_CONTENTS = (  # what a file is by the name of any of its tensors
    ("an all-in-one checkpoint (transformer, VAE and text encoder in one file): give the three as files of their own",
     re.compile(r"(vae|first_stage_model|text_encoders|cond_stage_model|conditioner)\..+")),
    ("an adapter: give it as a LoRA", re.compile(r".*\.(lora_(A|B|up|down)\b.*|lokr_w\d.*|hada_w\d.*|diff(_[bm])?)")),
    ("a VACE model, which lapwan does not support", re.compile(r"(.*\.)?vace_blocks\..+")),
    ("Wan's VAE", re.compile(r"(encoder|decoder)\.(conv1|conv_in|middle|mid_block|downsamples|upsamples)\..+")),
    ("a umT5 encoder (or another T5)", re.compile(r"(shared|token_embedding|token_embd)\.weight")),
    ("an image encoder (CLIP)", re.compile(r"(visual|vision_model)\..+")),
    ("a Wan transformer", re.compile(r"(.*\.)?blocks\.\d+\.(self_attn|attn1)\..+")),
)


def contents_of(names: Iterable[str]) -> str | None:
    """What a file of these tensors is, for an error message about a file given as something else; None: not known."""
    tensors = list(names)
    return next((kind for kind, pattern in _CONTENTS if any(map(pattern.fullmatch, tensors))), None)


def transformer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a transformer with this config (diffusers'), by its name in diffusers' layout."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    ffn, patch = config["ffn_dim"], config["patch_size"]
    sizes = {  # [out, in] of the Linears outside the blocks
        "text_embedder.linear_1": (width, config["text_dim"]), "text_embedder.linear_2": (width, width),
        "time_embedder.linear_1": (width, config["freq_dim"]), "time_embedder.linear_2": (width, width),
        "time_proj": (6 * width, width),
    }
    linears = {f"condition_embedder.{name}": shape for name, shape in sizes.items()}
    linears["proj_out"] = config["out_channels"] * math.prod(patch), width
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (width, config["in_channels"], *patch), "patch_embedding.bias": (width,),
        "scale_shift_table": (1, 2, width),
    }
    for block in (f"blocks.{index}" for index in range(config["num_layers"])):
        linears |= {f"{block}.{path}": (width, width) for path in PROJECTIONS.values() if path.startswith("attn")}
        linears |= {f"{block}.ffn.net.0.proj": (ffn, width), f"{block}.ffn.net.2": (width, ffn)}
        norms = [f"attn{n}.norm_{part}.weight" for n in (1, 2) for part in "qk"]
        norms += ["norm2.weight", "norm2.bias"] if config["cross_attn_norm"] else []
        shapes |= {f"{block}.{name}": (width,) for name in norms} | {f"{block}.scale_shift_table": (1, 6, width)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
