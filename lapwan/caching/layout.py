"""Cache files on disk, byte by byte as musubi-tuner lays them out, plus what lapwan adds beside them.

- `{stem}_{start:05d}-{frames:03d}_{W:04d}x{H:04d}_wan.safetensors` (an image: without the frames part):
  `latents_{T}x{H}x{W}_{dtype}` [C, T, H, W], C = 16 (TI2V-5B: 48); I2V-A14B also
  `latents_image_{T}x{H}x{W}_{dtype}` [4 mask + 16, T, H, W].
- `{stem}_wan_te.safetensors`: `varlen_t5_{dtype}` [n tokens, D], not padded.
- `..._lapwan_roi.safetensors` instead of `_wan` (ours): `roi_{T}x{H}x{W}_float32` [T, H, W].
- `lapwan_prompts.safetensors` (ours): `empty_{dtype}`, `negative_{dtype}` [n, D].

`{W}x{H}` of a name and `width`, `height` of the metadata are a video's size after resizing and cropping, an image's
before (older versions of lapwan: before, for both). Extra tensors would enter musubi's batch and stray
`*_wan.safetensors` are deleted by it, so ours have another suffix; extra metadata is ignored. Our metadata:
`lapwan.recipe`, what a file was made from as JSON, which shows whether it is stale and why (`stale.py`), and
`lapwan.sha256`, a checksum of the whole file.
Source: musubi-tuner's dataset documentation and cache files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapwan.checkpoints.container import RawTensor, TensorFile, packed_header, read_header, write_packed
from lapwan.data.frame_extraction import Window
from lapwan.documents import parse_json
from lapwan.errors import UserError
from lapwan.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

RECIPE_KEY, CHECKSUM_KEY = "lapwan.recipe", "lapwan.sha256"
_NO_CHECKSUM = "0" * 64  # in place of the checksum while it is computed
_CHECKSUM = re.compile("[0-9a-f]{64}")
_PIECE = 1 << 20  # bytes read at a time
_MUSUBI_ALIGN = 256  # bytes: the headers that its own writer makes are padded to a multiple
PROMPTS_FILE = "lapwan_prompts.safetensors"
LATENTS_END, TEXT_END, ROI_END = "_wan.safetensors", "_wan_te.safetensors", "_lapwan_roi.safetensors"
_FORMAT = {"architecture": "wan", "format_version": "1.0.1"}
_NAME = re.compile(r"(?P<stem>.+?)(?:_(?P<start>\d{5,})-(?P<frames>\d{3,}))?_(?P<width>\d{4,})x(?P<height>\d{4,})"
                   + re.escape(LATENTS_END), re.DOTALL)

TEMPORAL_STRIDE = 4  # of every Wan VAE
_SPATIAL_STRIDE, _SPATIAL_BY_CHANNELS = 8, {48: 16}

CacheRecipe = Mapping[str, Any]


def spatial_stride(channels: int) -> int:
    """The spatial stride of the VAE that made latents of so many channels: of 48 Wan2.2's, else Wan2.1's."""
    return _SPATIAL_BY_CHANNELS.get(channels, _SPATIAL_STRIDE)


def latents_name(stem: str, window: Window | None, width: int, height: int) -> str:
    """The name of a latents file: `width`, `height` of the bucket for a video, of the image where `window` is None."""
    part = "" if window is None else f"_{window.start:05d}-{window.frames:03d}"
    return f"{stem}{part}_{width:04d}x{height:04d}{LATENTS_END}"


def text_name(stem: str) -> str:
    """The text file shared by all windows of a clip."""
    return f"{stem}{TEXT_END}"


def roi_name(latents: str) -> str:
    """The ROI file beside a latents file."""
    return latents.removesuffix(LATENTS_END) + ROI_END


@dataclass(frozen=True)
class LatentsName:
    """The parts of a latents file's name."""

    stem: str
    window: Window | None
    width: int
    height: int


def parse_latents_name(name: str) -> LatentsName | None:
    """The inverse of `latents_name`; None for any other file."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    window = None if match["start"] is None else Window(int(match["start"]), int(match["frames"]))
    return LatentsName(match["stem"], window, int(match["width"]), int(match["height"]))


def recipe_text(recipe: CacheRecipe) -> str:
    """Canonical JSON."""
    return json.dumps(recipe, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def recipe_fingerprint(recipe: CacheRecipe) -> str:
    """16 hex digits over the canonical recipe."""
    return hashlib.sha256(recipe_text(recipe).encode()).hexdigest()[:16]


def read_recipe(file: TensorFile) -> dict[str, Any] | None:
    """The recipe of a cache file, {} if it is damaged; None for a file that lapwan did not make."""
    text = file.metadata.get(RECIPE_KEY)
    if text is None:
        return None
    try:
        recipe = parse_json(text, file.path)
    except UserError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def write_latents(
    path: Path, latents_CTHW: Tensor, condition_CTHW: Tensor | None, size: tuple[int, int], frames: int | None,
    recipe: CacheRecipe,
) -> None:
    """Write a latents file; `size` is the (width, height) of its name, `frames` None for an image."""
    tensors = {_latents_key("latents", latents_CTHW): latents_CTHW}
    if condition_CTHW is not None:
        tensors[_latents_key("latents_image", condition_CTHW)] = condition_CTHW
    metadata = {**_FORMAT, "width": str(size[0]), "height": str(size[1]), RECIPE_KEY: recipe_text(recipe)}
    if frames is not None:
        metadata["frame_count"] = str(frames)
    _save(path, _raw(tensors), metadata)


def write_text_features(path: Path, features_ND: Tensor, caption: str, recipe: CacheRecipe) -> None:
    """Write a text file."""
    metadata = {**_FORMAT, "caption1": caption, RECIPE_KEY: recipe_text(recipe)}
    _save(path, _raw({f"varlen_t5_{_dtype_name(features_ND)}": features_ND}), metadata)


def write_prompts(path: Path, empty_ND: Tensor, negative_ND: Tensor, recipe: CacheRecipe) -> None:
    """Write the features of the empty and of the negative prompt."""
    tensors = {f"empty_{_dtype_name(empty_ND)}": empty_ND, f"negative_{_dtype_name(negative_ND)}": negative_ND}
    _save(path, _raw(tensors), {RECIPE_KEY: recipe_text(recipe)})


def write_roi(path: Path, roi_THW: Any, recipe: CacheRecipe) -> None:
    """Write a region mask, a float32 numpy array [T, H, W] in [0, 1]. Needs no torch."""
    key = f"roi_{'x'.join(str(n) for n in roi_THW.shape)}_float32"
    tensor = RawTensor(key, "F32", roi_THW.shape, roi_THW.astype("<f4").tobytes())
    _save(path, [tensor], {RECIPE_KEY: recipe_text(recipe)})


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")  # as musubi-tuner writes it: bfloat16, float32


def _latents_key(kind: str, tensor: Tensor) -> str:
    return f"{kind}_{'x'.join(str(n) for n in tensor.shape[-3:])}_{_dtype_name(tensor)}"


def _raw(tensors: Mapping[str, Tensor]) -> list[RawTensor]:
    from lapwan.checkpoints.tensors import raw_tensor

    return [raw_tensor(name, tensor) for name, tensor in tensors.items()]


def _save(path: Path, tensors: Sequence[RawTensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically, with the checksum of all its bytes."""
    digest = hashlib.sha256(packed_header(tensors, {**metadata, CHECKSUM_KEY: _NO_CHECKSUM}))
    for tensor in tensors:
        digest.update(tensor.data)
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        write_packed(stream, tensors, {**metadata, CHECKSUM_KEY: digest.hexdigest()})


def checksum_matches(file: TensorFile) -> bool | None:
    """Whether every byte of a file is the one that was written: SHA-256 of it with zeros in place of the checksum.

    Returns:
        None if that cannot be told: the file has no checksum, or another tool rewrote it and kept our metadata.
    """
    stored = file.metadata.get(CHECKSUM_KEY)
    if stored is None:  # none, or a flipped bit in its key
        return False if any(_CHECKSUM.fullmatch(value) for value in file.metadata.values()) else None
    with file.path.open("rb") as stream:
        header = stream.read(file.data_start)
        if _is_musubi_header(header):
            return None
        digest = hashlib.sha256(header.replace(stored.encode(), _NO_CHECKSUM.encode(), 1))
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest() == stored


def _is_musubi_header(header: bytes) -> bool:
    """Whether musubi-tuner wrote the header: it caches a caption again into the file and copies all metadata."""
    text = header[8:].rstrip(b" ")
    return len(header) % _MUSUBI_ALIGN == 0 and json.dumps(json.loads(text)).encode() == text


def find_tensor(file: TensorFile, kind: str, required: bool = True) -> str | None:
    """The key of tensor `kind` (`latents`, `latents_image`, `varlen_t5`, `roi`, ...) whatever its shape and dtype.

    Raises:
        UserError: none though `required`, or more than one.
    """
    pattern = re.compile(re.escape(kind) + r"(_\d+x\d+x\d+)?_[a-z0-9]+")
    keys = [key for key in file.tensors if pattern.fullmatch(key)]
    if kind == "latents":
        keys = [key for key in keys if not key.startswith("latents_image")]
    if len(keys) == 1:
        return keys[0]
    if not keys and not required:
        return None
    raise UserError(f"{file.path}: {'no' if not keys else 'more than one'} '{kind}' tensor; is it a Wan cache file? "
                    "Delete it and cache again")


def open_cache_file(path: Path) -> TensorFile:
    """`read_header`, with advice in the error of a damaged cache file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return read_header(path)
    except UserError as error:
        raise UserError(f"{str(error).split(';')[0]}; run lapwan cache again") from None
