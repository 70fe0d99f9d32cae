"""Weights in the original release's layout into diffusers' and transformers' classes, tensor by tensor.

`blocks.0.self_attn.q` transformers, `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, `models_t5_umt5-xxl-enc-bf16.pth`.

Source: the key layouts of the official Wan2.2 release and of diffusers' and transformers' classes.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import load
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.errors import UserError
from lapwan.models import wan22_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def has_original_names(files: Sequence[Path]) -> bool:
    """True if a transformer's safetensors files use another layout than diffusers'."""
    return any(tensor_to_diffusers(name) != name for file in files for name in read_header(file).tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` or a `.pth` file, by name; a `.pth` is memory-mapped where it can be.

    Raises:
        UserError: missing, unreadable, or more than plain tensors (nothing in a .pth is executed).
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        header = read_header(path)
        return {name: load(header, name) for name in header.tensors}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError:  # torch's own words advise to execute what the file holds
        raise UserError(f"cannot read {path} as weights: it is no file of tensors that torch.save wrote, or holds more "
                        "than plain tensors (nothing in it is executed); is it the right file?") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"cannot read {path} as weights: {str(error).splitlines()[0]}") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{path} holds no table of tensors; is it the right file?")
    return found


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def fill(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], what: str, path: Path) -> None:
    """Put tensors under the model's parameters by name, each exactly once; the model was made without storage."""
    want = dict(model.named_parameters())
    for name, value in tensors:
        target = want.pop(name, None)
        if target is None:
            raise UserError(f"{path}: tensor '{name}' does not belong to {what}; is it the right file?")
        if target.shape != value.shape:
            raise UserError(f"{path}: '{name}' has shape {list(value.shape)}, {what} needs {list(target.shape)}")
        if value.dtype not in _FLOATS:
            raise UserError(f"{path}: '{name}' is {value.dtype}; quantised weights are not read; use bf16, fp16 "
                            "or fp32")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    if want:
        raise UserError(f"{path} lacks {len(want)} tensors of {what}, such as '{next(iter(want))}'; is it complete?")


def load_transformer_files(
    config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype
) -> WanTransformer3DModel:
    """A transformer from files in any key layout, in `dtype`, with fp32 where diffusers keeps it."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights():  # buffers (the rope tables) are made for real
        model = WanTransformer3DModel.from_config(dict(config))
    kept = tuple(model._keep_in_fp32_modules)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            header = read_header(file)
            for stored in header.tensors:
                name = tensor_to_diffusers(stored)
                wide = any(part in kept for part in name.split("."))
                value = load(header, stored)
                yield name, value.to(torch.float32 if wide else dtype) if value.dtype in _FLOATS else value

    fill(model, tensors(), "a Wan transformer of this shape", files[0])
    return model.eval()


def load_vae_file(config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """A VAE from `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth` or a safetensors file with the same names (or diffusers')."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with init_empty_weights():
        vae = AutoencoderKLWan.from_config(dict(config))
    found = read_tensors(path)
    what = "Wan2.2's VAE" if config.get("is_residual") else "Wan2.1's VAE"
    if config.get("is_residual"):
        found = {wan22_vae.tensor_to_diffusers(name): value for name, value in found.items()}
    elif "encoder.conv1.weight" in found:
        found = convert_wan_vae_to_diffusers(found)
    fill(vae, ((name, value.to(dtype)) for name, value in found.items()), what, path)
    return vae.eval()


_T5_OUTER = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_T5_BLOCK = {
    "norm1": "0.layer_norm", "norm2": "1.layer_norm", "attn.q": "0.SelfAttention.q", "attn.k": "0.SelfAttention.k",
    "attn.v": "0.SelfAttention.v", "attn.o": "0.SelfAttention.o",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias", "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1", "ffn.fc2": "1.DenseReluDense.wo",
}


def t5_to_transformers(name: str) -> str:
    """`blocks.0.ffn.gate.0.weight` -> `encoder.block.0.layer.1.DenseReluDense.wi_0.weight`; other names as they are."""
    if name in _T5_OUTER:
        return _T5_OUTER[name]
    path, _, leaf = name.rpartition(".")
    first, _, rest = path.partition(".")
    block, _, inner = rest.partition(".")
    if first == "blocks" and inner in _T5_BLOCK:
        return f"encoder.block.{block}.layer.{_T5_BLOCK[inner]}.{leaf}"
    return name


def load_text_file(config: Mapping[str, Any], path: Path, dtype: torch.dtype | None) -> UMT5EncoderModel:
    """A umT5 encoder from `models_t5_*.pth` or a safetensors file with its names (or transformers'); `dtype` None keeps
    the stored one."""
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    with init_empty_weights():
        model = UMT5EncoderModel(UMT5Config(**config))
    found = {t5_to_transformers(name): value for name, value in read_tensors(path).items()}
    if "shared.weight" in found:
        found["encoder.embed_tokens.weight"] = found["shared.weight"]  # the class names the one embedding twice
    fill(model, ((n, v if dtype is None else v.to(dtype)) for n, v in found.items()), "a umT5 encoder", path)
    return model.eval()
