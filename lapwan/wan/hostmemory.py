"""Frozen weights that wait in host memory: pinned next to a GPU, so that copies run at the bus's speed, beside work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 30  # of pinned memory: torch rounds every pinned allocation up to a power of two
ALIGNMENT = 256  # bytes, as the CUDA allocator's; products round by it on a CPU


def aligned(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class HostSpace:
    """Host memory handed out piece by piece from large allocations."""

    def __init__(self, pinned: bool) -> None:
        self._pinned, self._least = pinned, _CHUNK if pinned else 0
        self.chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def take(self, size: int) -> Tensor:
        """`size` bytes."""
        if self._used + aligned(size) > len(self.chunk):
            wanted = max(aligned(size), self._least)
            self.chunk, self._used = torch.empty(wanted, dtype=torch.uint8, pin_memory=self._pinned), 0
        start, self._used = self._used, self._used + aligned(size)
        return self.chunk[start : start + size]

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The tensor's values in this memory."""
        return like(self.take(tensor.nbytes), tensor).copy_(tensor.data)


def like(memory: Tensor, tensor: Tensor) -> Tensor:
    """A piece of memory as a tensor of another's dtype and shape."""
    return memory.view(tensor.dtype).view(tensor.shape)


class HostCopy:
    """Frozen tensors with a copy in host memory, made once: afterwards parking is free and fetching one copy.

    The tensors keep their identity, so that adapters and modules that hold them see the move.
    """

    def __init__(self, tensors: Iterable[Tensor], pinned: bool) -> None:
        self._tensors = list(tensors)
        space = HostSpace(pinned)
        self._copies: list[Tensor] = []
        for tensor in self._tensors:
            self._copies.append(space.copy_of(tensor))
            if pinned and tensor.device.type == "cpu":
                tensor.data = self._copies[-1]  # at once: the weights are in host memory one time only

    def park(self) -> None:
        """Leave the device."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy

    def fetch(self, device: torch.device) -> None:
        """Return to the device, ordered before whatever the current stream does next."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy.to(device, non_blocking=True, copy=True)
