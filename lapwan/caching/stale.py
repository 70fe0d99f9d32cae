"""What makes a cache file stale: a difference between its recipe, what it was made from, and the one wanted now.

A recipe is stored in the file's metadata (see `layout.py`). It holds the source video, frame rate, window, size, crop,
model weights, dtype, caption, mask or boxes. A file without a recipe was made by another tool and is compared by shape
and caption. No torch.

How to add a dependency: a key in one of the `..._recipe` functions. Caches made before lack it, so they become stale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwan.caching.layout import (
    TEMPORAL_STRIDE,
    TEXT_END,
    CacheRecipe,
    find_tensor,
    read_recipe,
    recipe_fingerprint,
    spatial_stride,
)
from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.data.buckets import Crop
from lapwan.data.clips import SourceClip
from lapwan.data.decoding.frame_files import frame_files
from lapwan.data.frame_extraction import Window
from lapwan.data.regions import is_interpolated
from lapwan.data.video import VideoFacts
from lapwan.errors import UserError

MISSING = "missing"
# Their values differ from clip to clip: a plan that showed them could not group clips by reason.
_BY_CLIP = frozenset({"source", "window", "crop", "mask", "boxes", "caption", "negative", "last_image"})
_HASHED = 65536  # bytes from each end of a source file
_SOMETIMES = ("pixels", "begin", "between", "last_image")  # keys that a recipe has for the clips that need them only
_LATENTS_RANK = 4  # [C, T, H, W]


@dataclass(frozen=True)
class EncoderSpec:
    """The model's part of the recipes, and what planning needs of the model.

    `vae` and `text` are fingerprints of weights and settings; `strides` are (temporal, spatial); dtypes are those of
    the files; `condition`: whether the image condition is encoded, `last_image`: with the last frame too; `negative` is
    the negative prompt.
    """

    task: str
    fps: float
    vae: str
    text: str
    text_dim: int
    text_length: int
    latent_channels: int
    strides: tuple[int, int]
    vae_dtype: str
    latents_dtype: str
    text_dtype: str
    condition: bool
    last_image: bool
    negative: str


def source_fingerprint(path: Path) -> str:
    """16 hex digits over size and both ends of a file; over names and sizes for a folder of images.

    Blind to a change that keeps the size and both ends, and to the file's time.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for file in frame_files(path):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        return digest.hexdigest()[:16]
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_HASHED))
        if size > _HASHED:
            stream.seek(max(_HASHED, size - _HASHED))
            digest.update(stream.read(_HASHED))
    return digest.hexdigest()[:16]


def frames_recipe(
    source: str, window: Window | None, crop: Crop, fps: float, facts: VideoFacts | None = None
) -> CacheRecipe:
    """The frames of a training item: `source` is the clip's fingerprint with its frame rate, `window` None an image.

    `pixels` (what is done to them beyond decoding) and `begin` (of a part of a recording) are there for the clips that
    have them only, so that older caches of all others stay valid.
    """
    recipe: dict[str, Any] = {
        "source": source, "fps": fps, "window": None if window is None else list(window),
        "size": list(crop.bucket), "crop": [*crop.resized, crop.left, crop.top],
    }
    if facts is not None and facts.treatment:
        recipe["pixels"] = facts.treatment
    if facts is not None and facts.begin:
        recipe["begin"] = facts.begin
    return recipe


def latents_recipe(frames: CacheRecipe, encoders: EncoderSpec) -> CacheRecipe:
    """Latents: the frames, the VAE, its precision and the stored one, and whether the image condition is there, and the
    last frame in it (a key of clips with one only: older caches and images stay valid)."""
    recipe = {**frames, "vae": encoders.vae, "computed": encoders.vae_dtype, "dtype": encoders.latents_dtype,
              "i2v": encoders.condition}
    window = frames["window"]
    return recipe | {"last_image": True} if encoders.last_image and window is not None and window[1] > 1 else recipe


def roi_recipe(frames: CacheRecipe, clip: SourceClip) -> CacheRecipe | None:
    """A region: the frames, and the mask or the boxes; None for a clip without either."""
    if clip.mask is not None:
        return {**frames, "mask": source_fingerprint(clip.mask)}
    if clip.roi:
        recipe = {**frames, "boxes": recipe_fingerprint({"roi": [dict(entry) for entry in clip.roi]})}
        return recipe | {"between": "linear"} if is_interpolated(clip.roi) else recipe
    return None


def text_recipe(caption: str, encoders: EncoderSpec) -> CacheRecipe:
    """Text features of a caption."""
    return {"encoder": encoders.text, "caption": caption, "length": encoders.text_length,
            "dtype": encoders.text_dtype}


def prompts_recipe(encoders: EncoderSpec) -> CacheRecipe:
    """Text features of the empty and the negative prompt."""
    return {"encoder": encoders.text, "negative": encoders.negative, "length": encoders.text_length,
            "dtype": encoders.text_dtype}


def is_ours(path: Path) -> bool:
    """Whether lapwan made a cache file. A file that cannot be read may be anybody's."""
    try:
        return read_recipe(read_header(path)) is not None
    except UserError:
        return False


@dataclass(frozen=True)
class FileCheck:
    """`reason` is why a file must be made again, None if it is up to date; `recipe` is that of an up-to-date file, None
    for a file of another tool, which is checked by shape and caption only."""

    reason: str | None
    recipe: CacheRecipe | None = None


def check_file(path: Path, wanted: CacheRecipe, channels: int) -> FileCheck:
    """Compare a cache file with the recipe wanted; `channels` of the model's latents, which recipes do not hold."""
    if not path.exists():
        return FileCheck(MISSING)
    try:
        file = read_header(path)
    except UserError:
        return FileCheck("damaged")
    made = read_recipe(file)
    if made is None:
        return FileCheck(_shape_difference(file, wanted, channels))
    reason = _difference(made, wanted, file.metadata.get("caption1"))
    return FileCheck(reason, made if reason is None else None)


def _difference(made: Mapping[str, Any], wanted: CacheRecipe, caption: str | None) -> str | None:
    keys = [*wanted, *(key for key in _SOMETIMES if key in made and key not in wanted)]
    changed = [key for key in keys if made.get(key) != wanted.get(key)]
    if (made.get("i2v"), wanted.get("i2v")) == (True, False) and set(changed) <= {"i2v", "last_image"}:
        return None  # an image condition that is not needed does no harm
    if "caption" in wanted and caption != wanted["caption"] and "caption" not in changed:
        changed.append("caption")  # another tool rewrote the features and kept our metadata
    if "crop" in changed and {"size", "source"} & set(changed):
        changed.remove("crop")  # follows from them
    shown = [f"{key} changed" if key in _BY_CLIP else f"{key} {_shown(made.get(key))} -> {_shown(wanted.get(key))}"
             for key in changed]
    return ", ".join(shown) or None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(str(part) for part in value)
    return "as they are" if value is None else str(value)[:40 if "," in str(value) or " " in str(value) else 12]


def _shape_difference(file: TensorFile, wanted: CacheRecipe, channels: int) -> str | None:
    """What differs, as far as shape and caption can tell."""
    if file.path.name.endswith(TEXT_END):
        return None if file.metadata.get("caption1") == wanted.get("caption") else "caption changed"
    try:
        key = find_tensor(file, "latents", required=False)
    except UserError:
        key = None
    if key is None or "size" not in wanted or len(file.tensors[key].shape) != _LATENTS_RANK:
        return "not a cache file"
    given, frames, height, width = file.tensors[key].shape
    if given != channels:
        return f"another VAE (latents have {given} channels)"
    bucket_width, bucket_height = wanted["size"]
    expected = 1 if wanted["window"] is None else wanted["window"][1]
    if height * bucket_width != width * bucket_height or (frames - 1) * TEMPORAL_STRIDE + 1 != expected:
        return f"size changed (latents are {frames}x{height}x{width})"
    if bucket_width != spatial_stride(channels) * width:
        return f"size changed (latents are {frames}x{height}x{width})"
    if wanted["i2v"] and find_tensor(file, "latents_image", required=False) is None:
        return "no image condition"
    if "last_image" in wanted:
        return "last_image not recorded"
    return None
