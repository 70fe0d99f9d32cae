"""Images and videos to start from: read, resized and cropped as training clips are, scaled to [-1, 1]."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lapwan.data.buckets import centre_crop
from lapwan.data.dropped_clips import BadClip
from lapwan.data.video import probe, read_frames, resize_and_crop, rgb_image
from lapwan.errors import UserError
from lapwan.wan.image_condition import condition_video, first_frame_mask
from lapwan.wan.vae import encode

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
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
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {path} as an image: {error}") from None


def as_rgb_image(image: Image.Image | np.ndarray, name: str) -> Image.Image:
    """An RGB image from one of any mode or from uint8 [H, W, 3].

    Args:
        name: of the option, for the error message.

    Raises:
        UserError: an array of another dtype or shape.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"{name} is an array {image.dtype} {list(image.shape)}; give a file, a PIL image, or RGB "
                            "as uint8 [height, width, 3]")
        return Image.fromarray(image)
    return image.convert("RGB")


def image_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """[1, 3, H, W] in [-1, 1]: resized to cover the size, then centre-cropped (no stretching).

    Args:
        size: (height, width). An image of exactly this size is not resampled.
    """
    pixels = resize_and_crop(image, centre_crop(image.width, image.height, (size[1], size[0])))
    scaled = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).unsqueeze(0).float() / 255.0
    return 2.0 * scaled - 1.0


def first_last_condition(vae: AutoencoderKLWan, first_BCHW: Tensor, last_BCHW: Tensor, frames: int) -> Tensor:
    """`mask | encode([first, 0, ..., 0, last])`: [B, 20, N+1, H/8, W/8] in fp32.

    The mask has a channel for each pixel frame of a latent frame: 1111 on the first, 0001 on the last latent frame.
    Source: diffusers' WanImageToVideoPipeline.prepare_latents with `last_image`.
    """
    video = condition_video(first_BCHW, frames)
    video[:, :, -1] = last_BCHW
    condition = encode(vae, video)
    mask = first_frame_mask(condition)
    mask[:, -1, -1] = 1
    return torch.cat([mask, condition], dim=1)


def read_clip(path: Path, frames: int, size: tuple[int, int], fps: int) -> np.ndarray:
    """The first `frames` frames of a video at `fps`, resized and cropped as images are: uint8 [T, H, W, 3].

    Raises:
        UserError: missing, unreadable, or too short.
    """
    try:
        info = probe(path, fps)
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
