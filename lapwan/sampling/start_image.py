"""Images and videos to start from: read, resized and cropped as training clips are, scaled to [-1, 1]."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lapwan.data.buckets import centre_crop
from lapwan.data.decoding.images import rgb_image
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import probe, read_frames, resize_and_crop
from lapwan.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: Path) -> Image.Image:
    """Read an image as RGB, with its EXIF rotation applied.

    Raises:
        UserError: missing, or not an image.
    """
    try:
        return rgb_image(path)
    except FileNotFoundError:
        raise UserError(f"no such image: {path}") from None
    except BadClip as error:
        raise UserError(f"{path} {error}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {path} as an image: {error}") from None


def as_rgb_image(image: Image.Image | np.ndarray | Tensor, name: str) -> Image.Image:
    """An RGB image from one of any mode, or from an array of uint8 or of floats in [0, 1].

    Args:
        image: numpy [H, W, 3]; torch [3, H, W], [1, 3, H, W] or [H, W, 3].
        name: of the option, for the error message.

    Raises:
        UserError: an array of another dtype, shape or range.
    """
    from PIL import Image

    if isinstance(image, np.ndarray | Tensor):
        return Image.fromarray(_rgb_array(image, name))
    return image.convert("RGB")


def _rgb_array(image: np.ndarray | Tensor, name: str) -> np.ndarray:
    array = image.detach().cpu() if isinstance(image, Tensor) else image
    if isinstance(array, Tensor):
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        channels_first = array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3
        array = array.permute(1, 2, 0) if channels_first else array
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy has no bf16
    form = f"{name} is an array {array.dtype} {list(array.shape)}"
    if array.ndim != 3 or array.shape[2] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise UserError(f"{form}; give a file, a PIL image, or RGB as uint8 or floats in [0, 1], numpy [height, width, "
                        "3] or torch [3, height, width]")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN too
        raise UserError(f"{form} with values from {low:.3g} to {high:.3g}; floats must be in [0, 1]: divide by 255, or "
                        "from [-1, 1] take (x + 1) / 2")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def image_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """[1, 3, H, W] in [-1, 1]: resized to cover the size, then centre-cropped (no stretching).

    Args:
        size: (height, width). An image of exactly this size is not resampled.
    """
    pixels = resize_and_crop(image, centre_crop(image.width, image.height, (size[1], size[0])))
    scaled = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).unsqueeze(0).float() / 255.0
    return 2.0 * scaled - 1.0


def read_clip(
    path: Path, frames: int, size: tuple[int, int], fps: int, part: tuple[float, float | None] | None = None
) -> np.ndarray:
    """The first `frames` frames of a video at `fps`, resized and cropped as images are: uint8 [T, H, W, 3].

    Args:
        part: (start, duration) in seconds of a part of a recording; its frames are read instead.

    Raises:
        UserError: missing, unreadable, or too short.
    """
    try:
        info = probe(path, fps)
        info = info if part is None else info.part(*part)
        count = info.count_at(fps)
        if count < frames:
            raise UserError(f"{path} has {count} frames at {fps} fps, {frames} are needed; ask for fewer with "
                            "--num-frames")
        crop = centre_crop(info.width, info.height, (size[1], size[0]))
        return read_frames(path, range(frames), crop, fps, info)
    except BadClip as error:
        raise UserError(f"{path}: {error}") from None


def clip_tensor(frames_THWC: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] -> [1, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames_THWC).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1.0


def image_fingerprint(image: Image.Image) -> str:
    """sha256 of size and RGB pixels: 64 hex digits, independent of the file's format."""
    return frames_fingerprint(np.asarray(image.convert("RGB"))[None])


def frames_fingerprint(frames_THWC: np.ndarray) -> str:
    """sha256 of shape and pixels of uint8 frames: 64 hex digits."""
    return hashlib.sha256(f"{frames_THWC.shape}\0".encode() + np.ascontiguousarray(frames_THWC).tobytes()).hexdigest()
