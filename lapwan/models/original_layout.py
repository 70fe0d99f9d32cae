"""Load weights in the original release's layout into diffusers' and transformers' classes, tensor by tensor.

`blocks.0.self_attn.q` transformers, `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, `models_t5_umt5-xxl-enc-bf16.pth`. Names of the
transformer's tensors are in `lapwan.checkpoints.wan_keys`; those of Wan2.2's VAE and of umT5 are here.

Source: the key layouts of the official Wan2.2 release and of diffusers' and transformers' classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lapwan.checkpoints.container import ITEM_SIZE
from lapwan.checkpoints.tensors import DTYPES, PickledFile, load_tensor
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.checkpoints.weights import WeightFile, read_weights, stored_dtype
from lapwan.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

# What `from_pretrained` finds without being told a variant.
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
Value = TypeVar("Value")  # a tensor, or its shape
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def loads_by_name(files: Sequence[Path], stem: str = DIFFUSERS_STEM) -> bool:
    """True if files are not as `from_pretrained` reads them: in another key layout, quantised, shards without their
    index, or under another file name, such as that of a variant; `load_*` here read those."""
    if len(files) > 1 and not (files[0].parent / f"{stem}.safetensors.index.json").is_file():
        return True
    name = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    return any(not name.fullmatch(file.name) or _by_name(read_weights(file)) for file in files)


def _by_name(file: WeightFile) -> bool:
    return bool(file.quantised) or any(tensor_to_diffusers(name) != name for name in file.tensors)


def tensor_infos(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """(shape, bytes as loaded) of every tensor by name: from the header, of a `.pth` from its memory map. Quantised
    tensors are loaded in the dtype of the others.

    Raises:
        UserError: as `read_tensors`.
    """
    file = _weights(path)
    item = ITEM_SIZE[stored_dtype([file])]
    return {name: (info.shape, math.prod(info.shape) * item if _is_quantised(file, name) else info.size)
            for name, info in file.tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name; quantised ones in fp32, an unquantised `.pth` memory-mapped if its format allows.

    Raises:
        UserError: the file is missing, unreadable, or holds more than tensors (nothing in a .pth is executed).
    """
    header = _weights(path)
    if isinstance(header.raw, PickledFile) and not header.quantised:
        return {name: header.raw.content[name] for name in header.tensors}
    return {name: load_tensor(header, name) for name in header.tensors}


def _weights(path: Path) -> WeightFile:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the weights file in it")
    return read_weights(path)


def set_parameters(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], what: str, path: Path) -> None:
    """Set each parameter of a model made without storage (on the meta device) to the tensor of its name, exactly once.

    Args:
        what: the model in error messages.

    Raises:
        UserError: a tensor that is unknown, of another shape or quantised, or a parameter without a tensor.
    """
    missing = dict(model.named_parameters())
    for name, value in tensors:
        target = missing.pop(name, None)
        if target is None:
            raise UserError(f"{path}: tensor '{name}' does not belong to {what}; is it the right file?")
        if target.shape != value.shape:
            raise UserError(f"{path}: '{name}' has shape {list(value.shape)}, {what} needs {list(target.shape)}")
        if value.dtype not in _FLOATS:
            raise UserError(f"{path}: '{name}' is {value.dtype}; quantised weights cannot be loaded; use bf16, fp16 "
                            "or fp32")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors of {what}, such as '{next(iter(missing))}'; "
                        "is it complete?")


def check_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], what: str, path: Path) -> None:
    """Compare a model's parameters with the shapes of a file's tensors, by name.

    Args:
        what: the model in error messages.

    Raises:
        UserError: as `set_parameters`.
    """
    needed = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        if name not in needed:
            raise UserError(f"{path}: tensor '{name}' does not belong to {what}; is it the right file?")
        if shape != needed[name]:
            raise UserError(f"{path}: '{name}' has shape {list(shape)}, {what} needs {list(needed[name])}")
    if missing := needed.keys() - shapes.keys():
        raise UserError(f"{path} lacks {len(missing)} tensors of {what}, such as '{min(missing)}'; is it complete?")


def check_filled(model: nn.Module, path: Path) -> None:
    """Raise for parameters that the weights at `path` did not have: diffusers leaves them without memory.

    Raises:
        UserError: with their number and one of them.
    """
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise UserError(f"the weights in {path} lack {len(empty)} tensors of its config, such as '{empty[0]}'; is the "
                        "download complete?")


def load_transformer_files(
    config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype
) -> WanTransformer3DModel:
    """A transformer from files in any key layout, in `dtype`, except where diffusers keeps fp32."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights():  # parameters only: buffers (the RoPE tables) are computed
        model = WanTransformer3DModel.from_config(dict(config))
    fp32_modules = tuple(model._keep_in_fp32_modules)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for header in map(read_weights, files):
            for stored in header.tensors:
                name = tensor_to_diffusers(stored)
                keep_fp32 = any(part in fp32_modules for part in name.split("."))
                yield name, load_tensor(header, stored).to(torch.float32 if keep_fp32 else dtype)

    set_parameters(model, tensors(), "a Wan transformer of this shape", files[0])
    return model.eval()


# Wan2.2's VAE (TI2V-5B: 48 channels, strides 4x16x16). Source: the module structure of the official release's vae2_2.
_VAE_INNER = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_OUTER = {
    "conv1": "quant_conv", "conv2": "post_quant_conv",
    **{f"{side}.{theirs}": f"{side}.{ours}" for side in ("encoder", "decoder")
       for theirs, ours in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))},
}
# A stage is a sequence of residual blocks, followed by its resampling, if any.
_VAE_STAGE = re.compile(
    r"(?P<side>encoder|decoder)\.(?:down|up)samples\.(?P<i>\d+)\.(?:down|up)samples\.(?P<j>\d+)\.(.+)"
)
_VAE_MIDDLE_NAME = re.compile(r"(encoder|decoder)\.middle\.([012])\.(.+)")
_VAE_STAGES = 4  # widths base · (1, 2, 4, 4)

# Mean and standard deviation of the latents by channel; the .pth does not hold them.
WAN22_LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
WAN22_LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
WAN22_VAE_CHANNELS = len(WAN22_LATENTS_MEAN)


def wan22_vae_to_diffusers(name: str) -> str:
    """`encoder.downsamples.1.downsamples.0.residual.2.weight` -> `encoder.down_blocks.1.resnets.0.conv1.weight`.

    A name that is not in the original layout is returned as it is.
    """
    path, _, leaf = name.rpartition(".")
    if path in _VAE_OUTER:
        return f"{_VAE_OUTER[path]}.{leaf}"
    if match := _VAE_MIDDLE_NAME.fullmatch(path):
        return f"{match[1]}.mid_block.{_VAE_MIDDLE[match[2]]}.{_VAE_INNER.get(match[3], match[3])}.{leaf}"
    if match := _VAE_STAGE.fullmatch(path):
        down = match["side"] == "encoder"
        stage = f"{match['side']}.{'down' if down else 'up'}_blocks.{match['i']}"
        if match[4] in _VAE_INNER:
            return f"{stage}.resnets.{match['j']}.{_VAE_INNER[match[4]]}.{leaf}"
        return f"{stage}.{'down' if down else 'up'}sampler.{match[4]}.{leaf}"
    return name


def wan22_vae_config(stored: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """An AutoencoderKLWan's config from shapes, with names in either layout; None if it is another VAE.

    Widths, blocks per stage and the stages that halve the time are read. 12 input channels are 2x2 pixel patches.
    """
    shapes = {wan22_vae_to_diffusers(name): shape for name, shape in stored.items()}
    first, last = shapes.get("encoder.conv_in.weight"), shapes.get("decoder.conv_out.weight")
    quant = shapes.get("post_quant_conv.weight")
    if first is None or last is None or quant is None or (first[1], quant[0]) != (12, WAN22_VAE_CHANNELS):
        return None
    blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down_blocks.0.resnets.")}
    halved = [f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in shapes for i in range(_VAE_STAGES - 1)]
    return {
        "_class_name": "AutoencoderKLWan", "base_dim": first[0], "decoder_base_dim": last[1],
        "z_dim": WAN22_VAE_CHANNELS, "num_res_blocks": len(blocks), "temperal_downsample": halved,
        "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
        "scale_factor_temporal": 4, "scale_factor_spatial": 16,
        "latents_mean": list(WAN22_LATENTS_MEAN), "latents_std": list(WAN22_LATENTS_STD),
    }


def load_vae_file(config: Mapping[str, Any], path: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """A VAE from `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth` or a safetensors file with the same names (or diffusers')."""
    vae, tensors = _empty_vae(config), _vae_to_diffusers(config, read_tensors(path))
    set_parameters(vae, ((name, value.to(dtype)) for name, value in tensors.items()), _vae_name(config), path)
    return vae.eval()


def check_vae_file(config: Mapping[str, Any], path: Path) -> None:
    """Compare a VAE file's tensors with the class, from the header.

    Raises:
        UserError: a tensor that is unknown, missing or of another shape.
    """
    shapes = {name: shape for name, (shape, _) in tensor_infos(path).items()}
    check_parameters(_empty_vae(config), _vae_to_diffusers(config, shapes), _vae_name(config), path)


def _empty_vae(config: Mapping[str, Any]) -> AutoencoderKLWan:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan

    with init_empty_weights():
        return AutoencoderKLWan.from_config(dict(config))


def _vae_name(config: Mapping[str, Any]) -> str:
    return "Wan2.2's VAE" if config.get("is_residual") else "Wan2.1's VAE"


def _vae_to_diffusers(config: Mapping[str, Any], tensors: dict[str, Value]) -> dict[str, Value]:
    if config.get("is_residual"):
        return {wan22_vae_to_diffusers(name): value for name, value in tensors.items()}
    if "encoder.conv1.weight" not in tensors:
        return tensors
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    converted: dict[str, Value] = convert_wan_vae_to_diffusers(tensors)
    return converted


_T5_OUTER = {
    "token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight",
    "token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight",  # GGUF
}
_T5_BLOCK = {
    "norm1": "0.layer_norm", "norm2": "1.layer_norm", "attn.q": "0.SelfAttention.q", "attn.k": "0.SelfAttention.k",
    "attn.v": "0.SelfAttention.v", "attn.o": "0.SelfAttention.o",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias", "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1", "ffn.fc2": "1.DenseReluDense.wo",
}


_T5_GGUF = {
    "attn_norm": "norm1", "ffn_norm": "norm2", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v",
    "attn_o": "attn.o", "attn_rel_b": "pos_embedding.embedding", "ffn_gate": "ffn.gate.0", "ffn_up": "ffn.fc1",
    "ffn_down": "ffn.fc2",
}
_T5_NAME = re.compile(r"(?:blocks|enc\.blk)\.(\d+)\.(.+)\.(\w+)")


def t5_to_transformers(name: str) -> str:
    """`blocks.0.ffn.gate.0.weight` and GGUF's `enc.blk.0.ffn_gate.weight` ->
    `encoder.block.0.layer.1.DenseReluDense.wi_0.weight`; other names as they are."""
    if name in _T5_OUTER:
        return _T5_OUTER[name]
    match = _T5_NAME.fullmatch(name)
    inner = _T5_BLOCK.get(_T5_GGUF.get(match[2], match[2])) if match else None
    return f"encoder.block.{match[1]}.layer.{inner}.{match[3]}" if match and inner else name


def text_readers(files: Sequence[Path]) -> dict[str, Callable[[], Tensor]]:
    """A function that reads each tensor of a text encoder, by its name in UMT5EncoderModel; quantised ones in the dtype
    of those that are not (bf16 if all are)."""
    readers: dict[str, Callable[[], Tensor]] = {}
    headers = [_weights(file) for file in files]
    dtype = DTYPES[stored_dtype(headers)]
    for header in headers:
        readers |= {t5_to_transformers(name): partial(_in_dtype, header, name, dtype) for name in header.tensors}
    return readers


def _in_dtype(file: WeightFile, name: str, dtype: torch.dtype) -> Tensor:
    if isinstance(file.raw, PickledFile) and not _is_quantised(file, name):
        return file.raw.content[name]  # memory-mapped
    value = load_tensor(file, name)
    return value.to(dtype) if _is_quantised(file, name) else value


def _is_quantised(file: WeightFile, name: str) -> bool:
    return file.raw.tensors[name].dtype in file.quantised


def load_text_files(config: Mapping[str, Any], files: Sequence[Path], dtype: torch.dtype | None) -> UMT5EncoderModel:
    """A umT5 encoder from `models_t5_*.pth`, or safetensors or GGUF files in any of the key layouts.

    Args:
        dtype: None keeps the stored one.
    """
    model, readers = _empty_text_encoder(config), text_readers(files)
    if "shared.weight" in readers:
        readers["encoder.embed_tokens.weight"] = readers["shared.weight"]  # tied: the class has the embedding twice
    values = ((name, read() if dtype is None else read().to(dtype)) for name, read in readers.items())
    set_parameters(model, values, "a umT5 encoder", files[0])
    return model.eval()


def check_text_file(config: Mapping[str, Any], path: Path) -> None:
    """Compare a umT5 file's tensors with the class, from the header.

    Raises:
        UserError: a tensor that is unknown, missing or of another shape.
    """
    shapes = {t5_to_transformers(name): shape for name, (shape, _) in tensor_infos(path).items()}
    shapes["encoder.embed_tokens.weight"] = shapes["shared.weight"]  # tied
    check_parameters(_empty_text_encoder(config), shapes, "a umT5 encoder", path)


def _empty_text_encoder(config: Mapping[str, Any]) -> UMT5EncoderModel:
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    with init_empty_weights():
        return UMT5EncoderModel(UMT5Config(**config))
