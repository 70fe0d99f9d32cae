"""A model's weights in the layouts that other tools write, with what they stand for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapwan.checkpoints.tensors import load_tensor
from lapwan.checkpoints.wan_keys import original_target, parameter_name, target_path, tensor_to_diffusers
from lapwan.checkpoints.weights import read_weights
from lapwan.models.base import Base, resolve_base
from lapwan.models.spec import ModelSpec, weight_files
from lapwan.names import NoiseExpert
from lapwan.settings.model import ModelFilesSettings

Tensors = dict[str, Tensor]
F8 = torch.float8_e4m3fn
HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def stored(spec: ModelSpec, noise_expert: NoiseExpert) -> Tensors:
    (file,) = weight_files(spec.component(noise_expert))
    return load_file(file)


def original(name: str) -> str:
    target = target_path(name)
    module, leaf = original_target(target) if target else (None, None)
    assert module and parameter_name(target) == name
    return f"{module}.{leaf}"


def is_linear(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name


def per_tensor(w: Tensor) -> Tensor:
    return w.abs().max() / 448


def per_row(w: Tensor) -> Tensor:
    return w.abs().amax(1) / 448


def per_row_column(w: Tensor) -> Tensor:
    return w.abs().amax(1, keepdim=True) / 448


def per_group(w: Tensor) -> Tensor:
    return w.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 448


SCALES = {f.__name__: f for f in (per_tensor, per_row, per_row_column, per_group)}


def divided(w: Tensor, scale: Tensor) -> Tensor:
    return (w.reshape(len(w), -1, w.shape[1] // max(1, scale.numel() // len(w))) / spread(w, scale)).reshape(w.shape)


def spread(w: Tensor, scale: Tensor) -> Tensor:
    return scale.reshape((1, 1, 1) if scale.numel() == 1 else (len(w), -1, 1))


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """codes · scale in fp64, rounded once."""
    wide = codes.double().reshape(len(codes), -1, codes.shape[1] // max(1, scale.numel() // len(codes)))
    return (wide * spread(codes, scale).double()).reshape(codes.shape).float()


def scaled(
    tensors: Tensors, dialect: str, rule: Callable[[Tensor], Tensor], prefix: str = ""
) -> tuple[Tensors, Tensors]:
    """(tensors of the file, the weights by diffusers' name that they stand for)."""
    out: Tensors = {} if dialect == "b" else {f"{prefix}scaled_fp8": torch.zeros(2, dtype=F8)}
    meant: Tensors = {}
    for name, value in tensors.items():
        key = prefix + original(name)
        if not is_linear(name):
            out[key] = meant[name] = value
            continue
        scale = rule(value)
        codes = divided(value, scale).clamp(-448, 448).to(F8)
        module = key.removesuffix(".weight")
        out[key], meant[name] = codes, dequantised(codes, scale)
        if dialect == "b":
            out[f"{module}.weight_scale"] = scale
            out[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format":"float8_e4m3fn"}'), dtype=torch.uint8)
        else:
            out[f"{module}.scale_weight"], out[f"{module}.scale_input"] = scale, torch.ones(())
    return out, meant


def write_gguf(path: Path, tensors: Tensors, kind: gguf.GGMLQuantizationType, prefix: str = "") -> Tensors:
    """A GGUF file as ComfyUI-GGUF's converter writes it; returns what its tensors stand for, by diffusers' name."""
    writer = gguf.GGUFWriter(str(path), "wan")
    meant: Tensors = {}
    for name, value in tensors.items():
        array = value.float().numpy()
        key = prefix + original(name)
        if array.ndim > 4:  # more dimensions than the format has
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [int(n) for n in array.shape])
            array = array.reshape(array.shape[0], -1)
        if not is_linear(name):
            writer.add_tensor(key, array)
            meant[name] = value
            continue
        codes = gguf.quantize(array, kind)
        writer.add_tensor(key, codes, raw_dtype=kind)
        meant[name] = torch.from_numpy(np.array(gguf.dequantize(codes, kind)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def read_all(path: Path) -> Tensors:
    file = read_weights(path)
    return {tensor_to_diffusers(name): load_tensor(file, name) for name in file.tensors}


def files_of(spec: ModelSpec, **changes: object) -> ModelFilesSettings:
    shift = spec.flow_shift
    fields = {"vae": spec.path, "text_encoder": spec.path / "text_encoder", "tokenizer": spec.path / "tokenizer",
              "flow_shift": shift, **changes}
    return ModelFilesSettings.model_validate(fields)


def with_config(spec: ModelSpec, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(spec.component(HIGH) / "config.json", folder)
    return folder


def pair_of(spec: ModelSpec, folder: Path, write: Callable[[Path, Tensors], Tensors], suffix: str = ".safetensors"
            ) -> tuple[Base, dict[NoiseExpert, Tensors]]:
    """A base of separate files, and the weights that they stand for."""
    with_config(spec, folder)
    paths = {e: folder / f"wan_{e.value}_noise{suffix}" for e in NoiseExpert}
    meant = {e: write(paths[e], stored(spec, e)) for e in NoiseExpert}
    return resolve_base(files_of(spec, high=paths[HIGH], low=paths[LOW])), meant


def write_scaled(path: Path, tensors: Tensors) -> Tensors:
    out, meant = scaled(tensors, "b", per_tensor, "model.diffusion_model.")
    metadata = {"_quantization_metadata": '{"format_version": "1.0"}'}
    save_file({n: v.contiguous() for n, v in out.items()}, path, metadata)
    return meant


def write_q8(path: Path, tensors: Tensors) -> Tensors:
    return write_gguf(path, tensors, gguf.GGMLQuantizationType.Q8_0)


BROKEN = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 28577\n",
    "HTML page": b"\n<!DOCTYPE html><html><body>Please log in</body></html>",
    "zip archive": b"PK\x03\x04" + b"\0" * 60,
    "GGUF file": b"GGUF" + b"\3\0\0\0" * 20,
    "empty file": b"",
    "begins with zeros": b"\0" * 400,
    "truncated inside its header": (5000).to_bytes(8, "little") + b'{"a":' + b" " * 100,
}
