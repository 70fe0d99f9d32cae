"""Weights of a model by name, whatever file they are in: safetensors, fp8 with scales, GGUF. Headers only; the tensors
are dequantised while they are read.

    fp8 with scales   W = codes · scale, a scale per tensor, per row, or per group of neighbours in a row
    plain fp8         W = codes: a cast
    GGUF              W by the `gguf` library, which knows each type's blocks

| written by | scale of `X.weight` | beside it, not weights |
|---|---|---|
| ComfyUI until 2025, musubi | `X.scale_weight` | `X.scale_input`, a marker `scaled_fp8` |
| ComfyUI | `X.weight_scale` | `X.input_scale`, `X.comfy_quant` (JSON as bytes), metadata `_quantization_metadata` |
| ComfyUI's umT5 | either | `spiece_model`: the tokenizer |

Source: the loaders of ComfyUI, musubi-tuner and ComfyUI-GGUF, as their files show. Other quantised formats are refused
by name.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo, read_header
from lapwan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
_MARKERS = ("scaled_fp8", "spiece_model")
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_QUANTISED_KEYS = {  # of formats that are refused by name
    ".weight_scale_2": "nvfp4", ".weight_scale_inv": "fp8 in blocks of rows and columns", ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes", ".qweight": "GPTQ or Nunchaku", ".qzeros": "GPTQ", ".SCB": "bitsandbytes int8",
}
_REMEDY = "use the bf16, fp16, fp8 or GGUF file of this model"
_UNPACK = {"F64": "d", "F32": "f", "F16": "e"}


@dataclass(frozen=True)
class WeightFile(TensorFile):
    """A file's weights: `tensors` without scales and markers; `scales` by the weight's name."""

    scales: dict[str, TensorInfo]

    @property
    def scale_file(self) -> TensorFile:
        """The same file with the scales as its tensors, by their names in it."""
        return TensorFile(self.path, {}, {info.name: info for info in self.scales.values()}, self.data_start, self.size)

    @property
    def quantised(self) -> bool:
        """Whether a weight is stored in a dtype that torch does not compute in."""
        return any(info.dtype not in FLOATS for info in self.tensors.values())


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file, whatever its name."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:  # `read_header` says what is wrong
        return False


def read_weights(path: Path) -> WeightFile:
    """A file's weights from its header.

    Raises:
        UserError: missing, damaged, no weights file, or quantised in a format that is not read.
    """
    if is_gguf(path):
        return _read_gguf(path)
    file = read_header(path)
    _check_formats(file)
    scales: dict[str, TensorInfo] = {}
    weights: dict[str, TensorInfo] = {}
    for name, info in file.tensors.items():
        suffix = next((s for s in _SCALES if name.endswith(s)), None)
        if suffix is not None:
            scales[f"{name.removesuffix(suffix)}.weight"] = info
        elif not name.endswith(_BESIDE) and name.rpartition(".")[2] not in _MARKERS:
            weights[name] = info
    marked = any(name.rpartition(".")[2] == "scaled_fp8" for name in file.tensors)
    used = _check_scales(file, weights, scales, marked)
    for name, info in weights.items():
        if info.dtype not in (*FLOATS, *FP8):
            raise UserError(f"{path}: '{name}' is {info.dtype}, a quantised format that is not read; {_REMEDY}")
    return WeightFile(path, file.metadata, weights, file.data_start, file.size, used)


def _check_formats(file: TensorFile) -> None:
    """Refuse formats other than fp8 with a scale, by the names of their tensors and what ComfyUI writes of each."""
    for name in file.tensors:
        kind = next((kind for suffix, kind in _QUANTISED_KEYS.items() if name.endswith(suffix)), None)
        if kind is not None:
            raise UserError(f"{file.path} is quantised as {kind} ('{name}'), which is not read; {_REMEDY}")
    stated = [bytes(file.read(name)) for name in file.tensors if name.endswith(".comfy_quant")]
    layers = _json(file.metadata.get("_quantization_metadata", "{}")).get("layers")
    formats = [_json(text).get("format") for text in stated]
    formats += [item.get("format") for item in layers.values() if isinstance(item, dict)] \
        if isinstance(layers, dict) else []
    for kind in formats:
        if kind is not None and kind not in _FP8_FORMATS:
            raise UserError(f"{file.path} is quantised as {kind}; of ComfyUI's formats {' and '.join(_FP8_FORMATS)} "
                            f"are read; {_REMEDY}")


def _json(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _check_scales(
    file: TensorFile, weights: Mapping[str, TensorInfo], scales: Mapping[str, TensorInfo], marked: bool
) -> dict[str, TensorInfo]:
    """The scales of fp8 weights. Each must have its weight, and of a scaled file each fp8 matrix its scale."""
    used: dict[str, TensorInfo] = {}
    for name, scale in scales.items():
        weight = weights.get(name)
        if weight is not None and weight.dtype in FP8:
            if _scale_shape(weight.shape, scale.shape) is None or scale.dtype not in FLOATS:
                raise UserError(f"{file.path}: the scale '{scale.name}' is {list(scale.shape)} {scale.dtype} for a "
                                f"weight {list(weight.shape)}; read are one scale per tensor, per row, or per group "
                                "in a row")
            used[name] = scale
        elif weight is None or not _all_one(file, scale):
            what = "there is no such weight" if weight is None else f"the weight is {weight.dtype}, not fp8"
            raise UserError(f"{file.path} has a scale '{scale.name}', but {what}; loaders disagree about such a "
                            "file: download the model again, or remove the scale")
    bare = [name for name, info in weights.items() if info.dtype in FP8 and len(info.shape) > 1 and name not in used]
    if bare and (used or marked):
        raise UserError(f"{file.path} is fp8 with scales, but {len(bare)} weights lack theirs, such as '{bare[0]}'; "
                        "the file is incomplete, download it again")
    return used


def _scale_shape(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...] | None:
    """The scale's shape as it multiplies the weight as [O, groups, ...]; None: it does not fit."""
    if math.prod(scale) == 1:
        return (1, 1, 1)
    if not weight or scale[0] != weight[0]:
        return None
    groups = math.prod(scale[1:])
    return (weight[0], groups, 1) if groups and math.prod(weight[1:]) % groups == 0 else None


def _all_one(file: TensorFile, scale: TensorInfo) -> bool:
    raw = bytes(file.read(scale.name))
    if scale.dtype == "BF16":  # the upper half of an fp32
        raw = b"".join(b"\0\0" + raw[n : n + 2] for n in range(0, len(raw), 2))
    letter = _UNPACK.get("F32" if scale.dtype == "BF16" else scale.dtype)
    return letter is not None and all(value == 1 for (value,) in struct.iter_unpack(f"<{letter}", raw))


def load_weight(file: WeightFile, name: str) -> Tensor:
    """Tensor `name` as stored; a quantised one in fp32.

    Raises:
        UserError: a file that is cut short.
    """
    import torch

    from lapwan.checkpoints.tensors import load_tensor

    info = file.tensors[name]
    if info.dtype in FLOATS:
        return load_tensor(file, name)
    if info.dtype not in FP8:
        return _dequantised_gguf(file, info)
    codes = load_tensor(file, name).float()
    if name not in file.scales:
        return codes
    scale_info = file.scales[name]
    shape = _scale_shape(info.shape, scale_info.shape)
    assert shape is not None
    scale = load_tensor(file.scale_file, scale_info.name).to(torch.float32).reshape(shape)
    rows = info.shape[0] if info.shape else 1
    return codes.reshape(rows, shape[1], -1).mul_(scale).reshape(info.shape)


def _read_gguf(path: Path) -> WeightFile:
    try:
        import gguf
        import numpy as np
    except ImportError:
        raise UserError(f"{path} is a GGUF file, which needs the gguf package: pip install 'lapwan[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is a damaged or truncated GGUF file ({str(error).splitlines()[0][:80]}); download it "
                        "again") from None
    tensors = {t.name: _gguf_info(reader, t) for t in reader.tensors}
    size = path.stat().st_size
    if not tensors:
        raise UserError(f"{path} is a GGUF file without tensors; download it again")
    if (end := max(info.end for info in tensors.values())) > size:
        raise UserError(f"{path} is truncated: it has {size} bytes, but needs {end}; copy or download it again")
    for kind in {t.tensor_type for t in reader.tensors}:
        if kind.name in FLOATS:
            continue
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, ValueError):
            raise UserError(f"{path} has weights of the GGUF type {kind.name}, which the gguf package cannot "
                            "dequantise; use a Q8_0, Q6_K, Q5_K, Q4_K or BF16 file") from None
    texts = {name: str(field.contents()) for name, field in reader.fields.items()
             if [t.name for t in field.types] == ["STRING"]}
    architecture = texts.get("general.architecture", "")
    if architecture not in ("", "wan", "t5", "t5encoder", "umt5"):
        raise UserError(f"{path} is a GGUF file of a '{architecture}' model; Wan's are 'wan', its text encoder's "
                        "'t5encoder'")
    return WeightFile(path, texts, tensors, reader.data_offset, size, {})


def _gguf_info(reader: Any, tensor: Any) -> TensorInfo:
    """GGUF has dimensions in reversed order; converters note a shape that it cannot hold in `orig_shape`."""
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    if field is not None:
        shape = tuple(int(n) for n in field.contents())
    start = int(tensor.data_offset)
    return TensorInfo(tensor.name, tensor.tensor_type.name, shape, start, start + int(tensor.n_bytes))


def _dequantised_gguf(file: WeightFile, info: TensorInfo) -> Tensor:
    import gguf
    import numpy as np
    import torch

    kind = gguf.GGMLQuantizationType[info.dtype]
    raw = np.frombuffer(file.read(info.name), dtype=np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    assert len(raw) // size * block == math.prod(info.shape)
    values = gguf.dequantize(raw.reshape(-1, size), kind)
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(info.shape)


def stored_dtype(files: Iterable[WeightFile]) -> str:
    """The widest dtype of the weights that are not quantised; BF16 if all are."""
    dtypes = {info.dtype for file in files for info in file.tensors.values()} & set(FLOATS)
    if "F32" in dtypes:
        return "F32"
    return max(sorted(dtypes), key=ITEM_SIZE.__getitem__, default="BF16")
