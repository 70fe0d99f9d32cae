"""Weights of a model by name, whatever file they are in: safetensors, fp8 with scales, GGUF, a file of `torch.save`.
Opening reads the header; quantised tensors look like fp32 ones and are dequantised while they are read. What a file is
decides its content, not its name.

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

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo, is_pickled, read_header
from lapwan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (".scale_weight", ".weight_scale")
_BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
_METADATA = "_quantization_metadata"
_MARKERS = ("scaled_fp8", "spiece_model")
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_QUANTISED_KEYS = {  # of formats that are refused by name
    ".weight_scale_2": "nvfp4", ".weight_scale_inv": "fp8 in blocks of rows and columns", ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes", ".qweight": "GPTQ or Nunchaku", ".qzeros": "GPTQ", ".SCB": "bitsandbytes int8",
}
_REMEDY = "use the bf16, fp16, fp8 or GGUF file of this model"
_GGUF_GROUP = 32  # neighbours with one scale, of most types
_GGUF_SYMMETRIC = ("Q3_K", "Q6_K")  # besides Q4_0, Q5_0 and Q8_0
_UNPACK = {"F64": "d", "F32": "f", "F16": "e"}


@dataclass(frozen=True)
class WeightFile(TensorFile):
    """A file's weights: `tensors` without scales and markers, quantised ones as `read` gives them.

    Args:
        raw: the same file as it is stored.
        scales: the name of the scale in `raw` by the weight's name.
        wide: the file with its quantised tensors in fp32; None: they are.
    """

    raw: TensorFile
    scales: dict[str, str]
    wide: WeightFile | None = None

    @property
    def quantised(self) -> tuple[str, ...]:
        """The dtypes of its quantised weights."""
        return tuple(sorted({self.raw.tensors[name].dtype for name in self.tensors} - set(FLOATS)))

    @property
    def as_stored(self) -> bool:
        """As `TensorFile.as_stored`."""
        return self.raw.as_stored and not self.quantised

    @property
    def unrounded(self) -> TensorFile:
        """As `TensorFile.unrounded`."""
        return self.wide or self

    def read_into(self, view: memoryview, name: str, offset: int = 0) -> None:
        """As `TensorFile.read_into`, dequantised."""
        if self.raw.tensors[name].dtype == self.tensors[name].dtype:
            self.raw.read_into(view, name, offset)
            return
        import torch

        from lapwan.checkpoints.tensors import DTYPES  # torch only where numbers are read

        dtype = DTYPES[self.tensors[name].dtype]
        first, count = offset // dtype.itemsize, len(view) // dtype.itemsize
        if count:
            values = _dequantised(self.raw, name, self.scales.get(name), first, count)
            torch.frombuffer(view, dtype=dtype).copy_(values)


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
    file = _open(path)
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
    return _weight_file(file, weights, used)


def _open(path: Path) -> TensorFile:
    if not is_pickled(path):
        return read_header(path)
    from lapwan.checkpoints.tensors import open_pickle  # torch only where a file of torch.save is read

    return open_pickle(path)


def _weight_file(raw: TensorFile, weights: Mapping[str, TensorInfo], scales: Mapping[str, TensorInfo]) -> WeightFile:
    shown = {name: info if info.dtype in FLOATS else _in_dtype(info, "F32", info.start)
             for name, info in weights.items()}
    return WeightFile(raw.path, raw.metadata, shown, raw.data_start, raw.size, raw,
                      {name: scale.name for name, scale in scales.items()})


def _in_dtype(info: TensorInfo, dtype: str, start: int) -> TensorInfo:
    return TensorInfo(info.name, dtype, info.shape, start, start + math.prod(info.shape) * ITEM_SIZE[dtype])


def unquantised(file: WeightFile, dtype: str) -> WeightFile:
    """The weights as an unquantised file would hold them, one after the other: quantised ones in `dtype`.

    Args:
        dtype: BF16, F16 or F32.
    """
    infos, position = {}, 0
    for name, info in file.tensors.items():
        stored = file.raw.tensors[name].dtype
        infos[name] = _in_dtype(info, stored if stored in FLOATS else dtype, position)
        position = infos[name].end
    metadata = {} if is_gguf(file.path) else {k: v for k, v in file.metadata.items() if k != _METADATA}
    return WeightFile(file.path, metadata, infos, 0, position, file.raw, file.scales, file)


def _check_formats(file: TensorFile) -> None:
    """Refuse formats other than fp8 with a scale, by the names of their tensors and what ComfyUI writes of each."""
    for name in file.tensors:
        kind = next((kind for suffix, kind in _QUANTISED_KEYS.items() if name.endswith(suffix)), None)
        if kind is not None:
            raise UserError(f"{file.path} is quantised as {kind} ('{name}'), which is not read; {_REMEDY}")
    stated = [bytes(file.read(name)) for name in file.tensors if name.endswith(".comfy_quant")]
    layers = _json(file.metadata.get(_METADATA, "{}")).get("layers")
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
            if not _fits(weight.shape, scale.shape) or scale.dtype not in FLOATS:
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


def _fits(weight: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """A scale of one number, [O], [O, 1], or [O, groups, 1] for a weight [O, I] whose rows divide into such groups."""
    if math.prod(scale) == 1:
        return True
    groups = math.prod(scale[1:])
    return bool(weight) and scale[0] == weight[0] and groups > 0 and math.prod(weight[1:]) % groups == 0


def _all_one(file: TensorFile, scale: TensorInfo) -> bool:
    raw = bytes(file.read(scale.name))
    if scale.dtype == "BF16":  # the upper half of an fp32
        raw = b"".join(b"\0\0" + raw[n : n + 2] for n in range(0, len(raw), 2))
    letter = _UNPACK.get("F32" if scale.dtype == "BF16" else scale.dtype)
    return letter is not None and all(value == 1 for (value,) in struct.iter_unpack(f"<{letter}", raw))


def _dequantised(raw: TensorFile, name: str, scale: str | None, first: int, count: int) -> Tensor:
    """Values [first, first + count) of a weight, row by row, in fp32."""
    import torch

    from lapwan.checkpoints.tensors import DTYPES

    info = raw.tensors[name]
    if info.dtype not in FP8:
        return _dequantised_gguf(raw, info, first, count)
    codes = torch.frombuffer(raw.read(name, first, count), dtype=DTYPES[info.dtype]).float()
    return codes if scale is None else codes.mul_(_scales(raw, name, scale, first, count))


def _scales(raw: TensorFile, name: str, scale: str, first: int, count: int) -> Tensor:
    """The scale of each of the values [first, first + count), or the one of all."""
    from lapwan.checkpoints.tensors import load_tensor

    scales = load_tensor(raw, scale).float().flatten()
    if len(scales) == 1:
        return scales
    group = math.prod(raw.tensors[name].shape) // len(scales)  # neighbours with one scale; a row, or a part of it
    start = first // group
    each = scales[start : (first + count - 1) // group + 1].repeat_interleave(group)
    return each[first - start * group :][:count]


def rounding_steps(file: WeightFile, name: str, values: Tensor, first: int) -> Tensor:
    """Distance of the neighbouring numbers of the stored format at each of a weight's values, in fp32.

    Of fp8 that of its codes times their scale. Of GGUF the range of each 32 neighbours over 2^bits - 1, or twice their
    largest magnitude over 2^bits in types without an offset; where the steps are not even, about their mean.

    Args:
        file: holds the weight.
        name: of the weight.
        values: rows of it as `load_rows` gives them, [rows, columns], on any device.
        first: the first row of them.
    """
    import torch

    from lapwan.checkpoints.tensors import DTYPES, spacing

    stored = file.raw.tensors[name].dtype
    if stored in FLOATS:
        return spacing(values)
    if stored in FP8:
        count, scale = values.numel(), file.scales.get(name)
        each = _scales(file.raw, name, scale, first * values.shape[1], count) if scale else torch.ones(1)
        each = each.to(values.device).abs().clamp_min(torch.finfo(torch.float32).tiny)
        each = each.reshape(values.shape) if len(each) > 1 else each
        return spacing((values / each).to(DTYPES[stored])) * each
    bits = int(next(letter for letter in stored if letter.isdigit()))  # Q4_K, IQ4_NL: 4
    width = _GGUF_GROUP if values.shape[1] % _GGUF_GROUP == 0 else values.shape[1]
    groups = values.reshape(len(values), -1, width)
    low, high = groups.amin(-1), groups.amax(-1)
    if stored.endswith("_0") or stored in _GGUF_SYMMETRIC:
        step: Tensor = 2 * torch.maximum(high, -low) / (254 if bits == 8 else 2**bits)
    else:
        step = (high - low) / (2**bits - 1)
    return step.repeat_interleave(width, 1)


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
    return _weight_file(TensorFile(path, texts, tensors, int(reader.data_offset), size), tensors, {})


def _gguf_info(reader: Any, tensor: Any) -> TensorInfo:
    """GGUF has dimensions in reversed order; converters note a shape that it cannot hold in `orig_shape`."""
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    if field is not None:
        shape = tuple(int(n) for n in field.contents())
    start = int(tensor.data_offset)
    return TensorInfo(tensor.name, tensor.tensor_type.name, shape, start, start + int(tensor.n_bytes))


def _dequantised_gguf(raw: TensorFile, info: TensorInfo, first: int, count: int) -> Tensor:
    import gguf
    import numpy as np
    import torch

    kind = gguf.GGMLQuantizationType[info.dtype]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    start, end = first // block, -(-(first + count) // block)
    stored = np.frombuffer(raw.read(info.name, start * size, (end - start) * size), dtype=np.uint8)
    values = np.ascontiguousarray(gguf.dequantize(stored.reshape(-1, size), kind), dtype=np.float32)
    return torch.from_numpy(values.reshape(-1)[first - start * block :][:count].copy())


def stored_dtype(files: Iterable[WeightFile]) -> str:
    """The widest dtype of the weights that are not quantised; BF16 if all are."""
    dtypes = {file.raw.tensors[name].dtype for file in files for name in file.tensors} & set(FLOATS)
    if "F32" in dtypes:
        return "F32"
    return max(sorted(dtypes), key=ITEM_SIZE.__getitem__, default="BF16")
