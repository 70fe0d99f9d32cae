"""Whether the noise experts stay on the device, or one thing at a time, and the host memory the idle ones wait in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lapwan.names import NoiseExpert
from lapwan.wan.folder import ModelSpec, original_file, tensor_shapes, weight_files

Memory = Literal["auto", "both", "one"]

_GIB = 1 << 30
# Beside A14B's bf16 weights a forward takes 2.1 GiB at 256x256 and 10.4 GiB at 480x832 (81 frames, H200): at most 40
# values of the transformer's width a token. The VAE's decoding takes less.
_VALUES_A_TOKEN = 40
_MARGIN = _GIB  # CUDA's own buffers, fragmentation
_CHUNK = _GIB  # of pinned memory: torch rounds every pinned allocation up to a power of two


@dataclass(frozen=True)
class Need:
    """Bytes: of the noise experts' weights with their adapters, of a forward pass, of the text encoder."""

    weights: Sequence[int]
    forward: int
    text_encoder: int

    @property
    def beside(self) -> int:
        """What must fit next to the weights: the forward pass, or the text encoder while a prompt is read."""
        return max(self.forward, self.text_encoder)


def keep_both(asked: Memory, need: Need, free: int | None) -> bool:
    """True if both noise experts (or the only one) stay: as asked, else where

        Σ weights + max(forward, text encoder) ≤ free

    Args:
        free: bytes the device could give, weights already there included; None on a CPU, where both stay.
    """
    if asked != "auto":
        return asked == "both"
    return free is None or sum(need.weights) + need.beside <= free


def describe(both: bool, asked: Memory, need: Need, free: int | None, device: torch.device) -> str:
    """The decision and its numbers, as one line."""
    if len(need.weights) > 1:
        what = f"both noise experts stay on {device}" if both else f"one noise expert on {device} at a time"
    elif both:
        what = f"the transformer stays on {device}"
    else:
        what = f"the transformer leaves {device} to the text encoder"
    why = "as asked" if asked != "auto" else "auto"
    has = "" if free is None else f", {free / _GIB:.1f} GiB free"
    weights = " + ".join(f"{size / _GIB:.1f}" for size in need.weights)
    return f"memory: {what} ({why}: {weights} GiB of weights, {need.beside / _GIB:.1f} GiB to work in{has})"


def weight_bytes(spec: ModelSpec, expert: NoiseExpert, dtype: torch.dtype) -> int:
    """A transformer's size in `dtype`, from the headers of its files."""
    shapes = tensor_shapes(weight_files(spec.component(expert)))
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())


def forward_bytes(spec: ModelSpec, dtype: torch.dtype, num_frames: int, size: tuple[int, int]) -> int:
    """What a forward pass takes beside the weights: 40 · width · itemsize · tokens, and a margin; `size` (H, W)."""
    _, frames, height, width = spec.latent_shape(num_frames, *size)
    patch = spec.pixel_multiple // spec.spatial_stride
    tokens = frames * (height // patch) * (width // patch)
    features = tensor_shapes(weight_files(spec.component(spec.experts[0])))["patch_embedding.weight"][0]
    return _VALUES_A_TOKEN * features * dtype.itemsize * tokens + _MARGIN


def text_encoder_bytes(spec: ModelSpec) -> int:
    """The text encoder's size as it is stored, which is how it runs."""
    folder = spec.path / "text_encoder"
    original = original_file(folder)
    return sum(file.stat().st_size for file in ([original] if original else weight_files(folder)))


def free_bytes(device: torch.device) -> int | None:
    """What torch could still get on a CUDA device, blocks it holds without use included; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


class HostCopy:
    """Frozen tensors with a copy in host memory, made once: afterwards parking is free and fetching one copy.

    The tensors keep their identity, so that adapters and modules that hold them see the move.
    """

    def __init__(self, tensors: Iterable[Tensor], pinned: bool) -> None:
        self._tensors = list(tensors)
        self._copies: list[Tensor] = []
        self._pinned = pinned
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0
        for tensor in self._tensors:
            self._copies.append(self._space(tensor).copy_(tensor.data))

    def _space(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.nbytes // 64) * 64  # every dtype stays aligned
        if self._used + size > len(self._chunk):
            wanted = max(size, _CHUNK) if self._pinned else size
            self._chunk, self._used = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pinned), 0
        start, self._used = self._used, self._used + size
        return self._chunk[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def park(self) -> None:
        """Leave the device."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy

    def fetch(self, device: torch.device) -> None:
        """Return to the device, ordered before whatever the current stream does next."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy.to(device, non_blocking=True, copy=True)
