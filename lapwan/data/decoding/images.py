"""Pictures as upright RGB: orientation, depth, transparency, animations. No torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lapwan.data.dropped_clips import BadClip
from lapwan.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

LARGEST_PIXELS = 2**27  # a frame of 16384x8192; more is a mistake, or a file made to fill the memory
_LIMIT = "LAPWAN_MAX_PIXELS"
_SHORTEST = 0.011  # seconds: browsers and FFmpeg show animation frames of up to 10 ms for 100 ms
_BACKGROUNDS = {"black": 0, "white": 255}


@dataclass(frozen=True)
class AnimationFrame:
    """A frame of an animated picture: seconds from the first, and how long it is shown."""

    at: float
    seconds: float


def check_pixels(width: int, height: int) -> None:
    """Refuse a declared size before anything of it is decoded.

    Raises:
        BadClip: more pixels than `LARGEST_PIXELS`, or than the environment's LAPWAN_MAX_PIXELS.
    """
    limit = largest_pixels()
    if width * height > limit:
        raise BadClip(f"declares {width}x{height} pixels, more than the limit of {limit}; set the environment variable "
                      f"{_LIMIT}={width * height} if that is its size")


def largest_pixels() -> int:
    """The largest number of pixels of a frame: `LARGEST_PIXELS`, or the environment's LAPWAN_MAX_PIXELS.

    Raises:
        UserError: not a number of pixels.
    """
    text = os.environ.get(_LIMIT, "")
    if not text:
        return LARGEST_PIXELS
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"environment {_LIMIT} = '{text}' must be a number of pixels, such as {LARGEST_PIXELS}")
    return int(text)


def opened(path: Path) -> Any:
    """A picture file opened by Pillow, of an allowed size; nothing is decoded yet.

    Raises:
        BadClip: too large.
        OSError, SyntaxError, ValueError: it cannot be read as an image.
    """
    from PIL import Image

    limit = largest_pixels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if limit > LARGEST_PIXELS:  # asked for by the user; Pillow has a limit of its own
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limit)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError:
            raise BadClip(f"declares more pixels than the limit of {limit}; set the environment variable {_LIMIT} to a "
                          "higher one if that is its size") from None
    try:
        check_pixels(*image.size)
    except BadClip:
        image.close()
        raise
    return image


def rgb_image(path: Path, background: str = "black") -> Image.Image:
    """A picture as RGB: turned and mirrored by its EXIF orientation, 16 bits scaled to 8, transparency composited.

    Args:
        background: black or white, behind transparent pixels.

    Raises:
        BadClip: too large.
        OSError, SyntaxError, ValueError: it cannot be read as an image.
    """
    from PIL import ImageOps

    with opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image), background)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading a clip's file as a BadClip that names it."""
    try:
        yield
    except BadClip as error:
        raise BadClip(f"{path.name} {error}") from None
    except FileNotFoundError:
        raise BadClip("no such file") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise BadClip(f"{path.name} cannot be read as an image ({short_reason(error)})") from None


def open_frame(path: Path, background: str = "black") -> Image.Image:
    """`rgb_image` of a clip's file.

    Raises:
        BadClip: missing, too large, or not an image.
    """
    with _named(path):
        return rgb_image(path, background)


def to_rgb(image: Image.Image, background: str = "black") -> Image.Image:
    """RGB of a picture of any mode. v/257 for 16 bits; c·a + b·(1 − a) over the background b.

    32-bit integers and floats have no scale of their own: integers above 65535 and floats above 255 are scaled by their
    largest value, floats up to 1 by 255.
    """
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled(np.asarray(image), image.mode)).convert("RGB")
    if not has_alpha(image):
        return image.convert("RGB")
    return Image.fromarray(composite(np.asarray(image.convert("RGBA")), background))


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _scaled(values: np.ndarray, mode: str) -> np.ndarray:
    data = values.astype(np.float64)
    largest = float(data.max(initial=0.0))
    if mode == "F":
        white = 1.0 if largest <= 1 else 255.0 if largest <= 255 else largest
    else:
        white = max(65535.0, largest)
    return (data.clip(0, white) * (255.0 / white)).round().astype(np.uint8)


def composite(pixels_HW4: np.ndarray, background: str) -> np.ndarray:
    """uint8 [H, W, 3]: straight alpha over black or white."""
    alpha = pixels_HW4[..., 3:].astype(np.uint16)
    if int(alpha.min(initial=255)) == 255:
        return np.ascontiguousarray(pixels_HW4[..., :3])
    behind = np.uint16(_BACKGROUNDS[background])
    mixed: np.ndarray = ((pixels_HW4[..., :3] * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)
    return mixed


def image_traits(path: Path) -> str:
    """What a picture is, as words with commas: animated, 16 bits, alpha (if anything shows through it).

    Raises:
        BadClip: missing, too large, or not an image.
    """
    with _named(path), opened(path) as image:
        # Pages of a TIFF and the views in a phone's JPEG are no animation.
        if image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "n_frames", 1) > 1:
            return "animated"
        if image.mode.startswith("I") or image.mode == "F":
            return "16 bits"
        shown = has_alpha(image) and int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255
        return "alpha" if shown else ""


def animation(path: Path, background: str = "black") -> Iterator[tuple[AnimationFrame, Image.Image]]:
    """The frames of an animated picture with their times; its loop counts once."""
    from PIL import ImageSequence

    with opened(path) as image:
        at = 0.0
        for frame in ImageSequence.Iterator(image):
            frame.load()
            seconds = float(frame.info.get("duration", 0)) / 1000
            seconds = seconds if seconds >= _SHORTEST else 0.1
            yield AnimationFrame(at, seconds), to_rgb(frame.copy(), background)  # the next frame overwrites this one
            at += seconds


def short_reason(error: BaseException) -> str:
    """An exception as one line of at most 120 characters."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0][:120] if str(text) else type(error).__name__
