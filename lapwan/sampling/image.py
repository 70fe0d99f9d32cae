"""The image a video starts from: read upright, fitted to the size as training clips are, scaled to [-1, 1]."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lapwan.data.buckets import centre_crop
from lapwan.data.video import fit
from lapwan.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


def open_image(path: Path) -> Image.Image:
    """The image as a viewer shows it (EXIF rotation applied), RGB.

    Raises:
        UserError: missing, or not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"no such image: {path}") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {path} as an image: {error}") from None


def image_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """[1, 3, H, W] in [-1, 1]: scaled until the tighter side fits, then cut in the centre (no stretching).

    Args:
        size: (height, width). An image of exactly this size is taken pixel for pixel.
    """
    pixels = fit(image, centre_crop(image.width, image.height, (size[1], size[0])))
    scaled = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).unsqueeze(0).float() / 255.0
    return 2.0 * scaled - 1.0


def image_fingerprint(image: Image.Image) -> str:
    """sha256 over size and RGB pixels: 64 hex digits, whatever the file's format."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}\0".encode() + rgb.tobytes()).hexdigest()
