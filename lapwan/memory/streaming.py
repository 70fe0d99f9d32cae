"""Frozen weights that wait in host memory: pinned next to a GPU, so that copies run at the bus's speed, beside work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapwan.wan.transformer.options import forward_options

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

    def offload(self) -> None:
        """Leave the device."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy

    def fetch(self, device: torch.device) -> None:
        """Return to the device, ordered before whatever the current stream does next."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy.to(device, non_blocking=True, copy=True)

DEPTH = 2  # places: one computes while the next is filled


@dataclass(frozen=True)
class _Run:
    """Bytes that lie together in host memory and in a place: one copy."""

    chunk: Tensor
    first: int
    start: int  # in the place
    size: int


@dataclass(frozen=True)
class _Waiting:
    """A block in host memory: its tensors, their copies, where each begins in a place, and the runs they make."""

    tensors: list[Tensor]
    copies: list[Tensor]
    starts: list[int]
    runs: list[_Run]
    size: int


@dataclass
class _Place:
    """Room for one block on the device. `filled` and `free` are events of the copying and the computing stream."""

    memory: Tensor
    holds: int | None = None
    filled: Any = None
    free: Any = None


class BlockRing:
    """The residency of a transformer's streamed blocks; `ready` and `done` of others do nothing.

    Args:
        blocks: tensors of each streamed block by its index; frozen, and not used by another block.
        depth: places on the device, at least 2 for copies to overlap with work.
    """

    def __init__(self, blocks: Mapping[int, Iterable[Tensor]], device: torch.device, depth: int = DEPTH) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        space = HostSpace(pinned=self._cuda)
        self._blocks = {index: _to_host(list(own), space) for index, own in sorted(blocks.items())}
        self._order = list(self._blocks)
        self._depth = max(1, min(depth, len(self._order)))
        self._places: list[_Place] = []
        self._stream: Any = None
        self._next = 0  # position in the order of the block to copy next
        self.copied_bytes = 0

    @property
    def place_bytes(self) -> int:
        """Of the device, all places."""
        return self._depth * max((block.size for block in self._blocks.values()), default=0)

    def start(self) -> None:
        """Take the places and begin to fill them; does nothing if they are there."""
        if self._places or not self._order:
            return
        size = self.place_bytes // self._depth
        self._places = [_Place(torch.empty(size, dtype=torch.uint8, device=self._device)) for _ in range(self._depth)]
        if self._cuda:
            self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # who had this memory before is done
        self._next = 0
        for place in self._places:
            self._fill(place)

    def release(self) -> None:
        """Give the places back; the weights are in host memory."""
        if self._cuda and self._places:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._places = []

    def _fill(self, place: _Place) -> None:
        index = self._order[self._next]
        self._next = (self._next + 1) % len(self._order)
        self._copy(place, index)

    def _copy(self, place: _Place, index: int) -> None:
        block = self._blocks[index]
        if self._cuda and place.free is not None:
            self._stream.wait_event(place.free)
        with torch.cuda.stream(self._stream):  # None, on a CPU, is no other stream
            for run in block.runs:
                source = run.chunk[run.first : run.first + run.size]
                place.memory[run.start : run.start + run.size].copy_(source, non_blocking=True)
        if self._cuda:
            place.filled = self._stream.record_event()
        place.holds = index
        self.copied_bytes += block.size

    def ready(self, index: int) -> None:
        """The block's tensors are in a place; what the current stream does next comes after their copy."""
        block = self._blocks.get(index)
        if block is None:
            return
        self.start()
        place = next((p for p in self._places if p.holds == index), None)
        if place is None:  # a forward that was cut short, or another order: begin again from here
            if self._cuda:  # what was launched may still read a place that was never marked free
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            place = self._places[0]
            self._copy(place, index)
            self._next = (self._order.index(index) + 1) % len(self._order)
            for other in self._places[1:]:
                self._fill(other)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(place.filled)
        for tensor, start in zip(block.tensors, block.starts, strict=True):
            tensor.data = like(place.memory[start : start + tensor.nbytes], tensor)

    def done(self, index: int) -> None:
        """The block has been launched: when it has run, its place takes the next one."""
        block = self._blocks.get(index)
        if block is None:
            return
        place = next(p for p in self._places if p.holds == index)
        for tensor, copy in zip(block.tensors, block.copies, strict=True):
            tensor.data = copy
        if self._cuda:
            place.free = torch.cuda.current_stream(self._device).record_event()
        if self._depth < len(self._order):
            self._fill(place)


def _to_host(tensors: list[Tensor], space: HostSpace) -> _Waiting:
    copies: list[Tensor] = []
    starts: list[int] = []
    runs: list[_Run] = []
    size = 0
    for tensor in tensors:
        copies.append(space.copy_of(tensor))
        tensor.data = copies[-1]  # at once: a block is never in memory twice
        starts.append(size)
        first, length = int(copies[-1].storage_offset()) * tensor.itemsize, aligned(tensor.nbytes)
        last = runs[-1] if runs else None
        if last is not None and last.chunk is space.chunk and last.first + last.size == first:
            runs[-1] = _Run(last.chunk, last.first, last.start, last.size + length)
        else:
            runs.append(_Run(space.chunk, first, size, length))
        size += length
    return _Waiting(tensors, copies, starts, runs, size)


def by_hooks(blocks: nn.ModuleList, ring: BlockRing) -> None:
    """Let a ring bring the weights of blocks that another model's own forward calls."""
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ring.ready(index))
        block.register_forward_hook(lambda *_, index=index: ring.done(index))


class Residence:
    """One transformer's weights between host and device: what stays while it works, and the blocks that stream.

    Args:
        own: tensors that are left where they are (an adapter's rows).
        streamed: indices of blocks that pass through the ring.
        blocks_name: of the model's blocks; those of another model than Wan's transformer bring themselves by hooks.
    """

    def __init__(
        self, transformer: nn.Module, own: Iterable[Tensor], device: torch.device, streamed: Sequence[int] = (),
        blocks_name: str = "blocks",
    ) -> None:
        self._device = device
        kept_out = {id(tensor) for tensor in own}
        blocks = transformer.get_submodule(blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        by_block = {index: [t for t in tensors_of(blocks[index]) if id(t) not in kept_out] for index in streamed}
        self.ring = BlockRing(by_block, device) if by_block else None
        kept_out |= {id(tensor) for own_tensors in by_block.values() for tensor in own_tensors}
        self._rest = HostCopy((t for t in tensors_of(transformer) if id(t) not in kept_out), device.type == "cuda")
        if blocks_name == "blocks":
            forward_options(transformer).residency = self.ring
        elif self.ring is not None:
            by_hooks(blocks, self.ring)
        self.here = False

    def offload(self) -> None:
        """Leave the device."""
        self._rest.offload()
        if self.ring is not None:
            self.ring.release()
        self.here = False

    def fetch(self) -> None:
        """Come to the device, what streams as far as the ring holds it."""
        self._rest.fetch(self._device)
        if self.ring is not None:
            self.ring.start()
        self.here = True


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())
