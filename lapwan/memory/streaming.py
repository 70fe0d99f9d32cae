"""Frozen weights in host memory, moved to the device whole (`ModelOffload`) or block by block (`BlockRing`).

Next to a GPU the host memory is pinned, so that copies run at the bus's speed and overlap with compute.

    host memory   block 0 | block 1 | block 2 | ...
    device        slot 0: block i computes    slot 1: block i + 1 is copied on another stream
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lapwan.memory.plan import RING_SLOTS
from lapwan.wan.backbone import WanBackbone

_CHUNK = 1 << 30  # of pinned memory: torch rounds every pinned allocation up to a power of two
ALIGNMENT = 256  # bytes, as in the CUDA allocator; on a CPU the rounding of matrix products depends on alignment too


def aligned(size: int) -> int:
    """`size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class HostPool:
    """Host memory cut from large allocations.

    Args:
        chunk_size: bytes of an allocation, or those of a tensor that is larger; None: 1 GiB if pinned, else a tensor's.
    """

    def __init__(self, pinned: bool, chunk_size: int | None = None) -> None:
        self._pinned, self._chunk_size = pinned, (_CHUNK if pinned else 0) if chunk_size is None else chunk_size
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._chunks: set[int] = set()  # addresses

    def allocate(self, size: int) -> Tensor:
        """`size` bytes, aligned."""
        if self._used + aligned(size) > len(self._chunk):
            length = max(aligned(size), self._chunk_size)
            self._chunk, self._used = torch.empty(length, dtype=torch.uint8, pin_memory=self._pinned), 0
            self._chunks.add(_address(self._chunk))
        start, self._used = self._used, self._used + aligned(size)
        return self._chunk[start : start + size]

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The tensor's values in this memory; a tensor that is in it already is not copied again."""
        if _address(tensor) in self._chunks:
            return tensor.data
        return view_like(self.allocate(tensor.nbytes), tensor).copy_(tensor.data)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def view_like(memory: Tensor, tensor: Tensor) -> Tensor:
    """Bytes viewed as a tensor of another's dtype and shape."""
    return memory.view(tensor.dtype).view(tensor.shape)


class HostCopy:
    """Frozen tensors with a copy in host memory, made once: afterwards offloading is free and onloading one copy.

    The tensors keep their identity, so that adapters and modules that hold them see the move.
    """

    def __init__(self, tensors: Iterable[Tensor], pinned: bool, pool: HostPool | None = None) -> None:
        self._tensors = list(tensors)
        pool = pool or HostPool(pinned)
        self._copies: list[Tensor] = []
        for tensor in self._tensors:
            self._copies.append(pool.copy_of(tensor))
            if pinned and tensor.device.type == "cpu":
                tensor.data = self._copies[-1]  # at once, so that host memory never holds all weights twice

    def offload(self) -> None:
        """Leave the device."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy

    def onload(self, device: torch.device) -> None:
        """Copy to the device; work queued on the current stream afterwards sees the weights."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy.to(device, non_blocking=True, copy=True)


@dataclass(frozen=True)
class _Span:
    """Bytes that are contiguous both in host memory and in a slot: one copy."""

    chunk: Tensor
    chunk_start: int
    slot_start: int
    size: int


@dataclass(frozen=True)
class _HostBlock:
    """A block in host memory: its tensors, their copies, each one's offset in a slot, and the spans to copy."""

    tensors: list[Tensor]
    copies: list[Tensor]
    offsets: list[int]
    spans: list[_Span]
    size: int


@dataclass
class _Slot:
    """Device memory for one block. `filled` and `free` are events of the copy stream and of the compute stream."""

    memory: Tensor
    block: int | None = None
    filled: Any = None
    free: Any = None


class BlockRing:
    """Streams a transformer's blocks through a few slots on the device; other blocks are left alone.

    The `Residency` of a forward: `ready(index)` before a block runs, `done(index)` after it was launched.

    Args:
        blocks: tensors of each streamed block by its index; frozen, and not shared with another block.
        slots: on the device; at least 2 for copies to overlap with compute.
        pool: the host memory that takes the blocks; None: one of its own.
    """

    def __init__(
        self, blocks: Mapping[int, Iterable[Tensor]], device: torch.device, slots: int = RING_SLOTS,
        pool: HostPool | None = None,
    ) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        pool = pool or HostPool(pinned=self._cuda)
        self._blocks = {index: _to_host(list(tensors), pool) for index, tensors in sorted(blocks.items())}
        self._order = list(self._blocks)
        self._slot_count = max(1, min(slots, len(self._order)))
        self._slots: list[_Slot] = []
        self._stream: Any = None
        self._next = 0  # position in the order of the block to copy next
        self.copied_bytes = 0

    @property
    def ring_bytes(self) -> int:
        """Device memory of all slots."""
        return self._slot_count * max((block.size for block in self._blocks.values()), default=0)

    def start(self) -> None:
        """Allocate the slots and start to fill them; does nothing if they are allocated."""
        if self._slots or not self._order:
            return
        size = self.ring_bytes // self._slot_count
        self._slots = [
            _Slot(torch.empty(size, dtype=torch.uint8, device=self._device)) for _ in range(self._slot_count)]
        if self._cuda:
            self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            # Whatever used this memory before has finished.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._next = 0
        for slot in self._slots:
            self._fill(slot)

    def release(self) -> None:
        """Free the slots; the weights are in host memory."""
        if self._cuda and self._slots:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._slots = []

    def _fill(self, slot: _Slot) -> None:
        index = self._order[self._next]
        self._next = (self._next + 1) % len(self._order)
        self._copy(slot, index)

    def _copy(self, slot: _Slot, index: int) -> None:
        block = self._blocks[index]
        if self._cuda and slot.free is not None:
            self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):  # on a CPU the stream is None, which changes nothing
            for span in block.spans:
                source = span.chunk[span.chunk_start : span.chunk_start + span.size]
                slot.memory[span.slot_start : span.slot_start + span.size].copy_(source, non_blocking=True)
        if self._cuda:
            slot.filled = self._stream.record_event()
        slot.block = index
        self.copied_bytes += block.size

    def ready(self, index: int) -> None:
        """Point the block's tensors at a slot; work queued on the current stream afterwards sees its weights."""
        block = self._blocks.get(index)
        if block is None:
            return
        self.start()
        slot = next((slot for slot in self._slots if slot.block == index), None)
        if slot is None:  # an interrupted forward, or another order: restart from this block
            if self._cuda:  # launched work may still read a slot that was never marked free
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            slot = self._slots[0]
            self._copy(slot, index)
            self._next = (self._order.index(index) + 1) % len(self._order)
            for other in self._slots[1:]:
                self._fill(other)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        for tensor, offset in zip(block.tensors, block.offsets, strict=True):
            tensor.data = view_like(slot.memory[offset : offset + tensor.nbytes], tensor)

    def done(self, index: int) -> None:
        """The block was launched: once it has run, its slot takes the next block."""
        block = self._blocks.get(index)
        if block is None:
            return
        slot = next(slot for slot in self._slots if slot.block == index)
        for tensor, copy in zip(block.tensors, block.copies, strict=True):
            tensor.data = copy
        if self._cuda:
            slot.free = torch.cuda.current_stream(self._device).record_event()
        if self._slot_count < len(self._order):
            self._fill(slot)


def _to_host(tensors: list[Tensor], pool: HostPool) -> _HostBlock:
    copies: list[Tensor] = []
    offsets: list[int] = []
    spans: list[_Span] = []
    size = 0
    for tensor in tensors:
        copies.append(pool.copy_of(tensor))
        tensor.data = copies[-1]  # at once, so that a block is never in memory twice
        offsets.append(size)
        start, length = int(copies[-1].storage_offset()) * copies[-1].itemsize, aligned(tensor.nbytes)
        last = spans[-1] if spans else None
        if last and _address(last.chunk) == _address(copies[-1]) and last.chunk_start + last.size == start:
            spans[-1] = _Span(last.chunk, last.chunk_start, last.slot_start, last.size + length)
        else:
            chunk = torch.empty(0, dtype=torch.uint8).set_(copies[-1].untyped_storage())
            spans.append(_Span(chunk, start, size, length))
        size += length
    return _HostBlock(tensors, copies, offsets, spans, size)


class ModelOffload:
    """Moves a model's frozen weights between host and device; some of its blocks may stream while it runs.

    Whoever runs the model asks the ring for its blocks: see `offload_backbone` and `offload_by_hooks`.

    Args:
        excluded: tensors that are never moved (an adapter's rows).
        streamed: indices of the blocks that pass through a ring.
        blocks_name: path of the model's blocks.
        pool: host memory that may hold some of the weights already, and takes the rest; None: new memory.
    """

    def __init__(
        self, model: nn.Module, excluded: Iterable[Tensor], device: torch.device, streamed: Sequence[int] = (),
        blocks_name: str = "blocks", pool: HostPool | None = None,
    ) -> None:
        self._device = device
        skip = {id(tensor) for tensor in excluded}
        blocks = model.get_submodule(blocks_name)
        assert isinstance(blocks, nn.ModuleList)
        by_block = {index: [t for t in tensors_of(blocks[index]) if id(t) not in skip] for index in streamed}
        self.ring = BlockRing(by_block, device, pool=pool) if by_block else None
        skip |= {id(tensor) for tensors in by_block.values() for tensor in tensors}
        self._rest = HostCopy((t for t in tensors_of(model) if id(t) not in skip), device.type == "cuda", pool)
        self.on_device = False

    def offload(self) -> None:
        """Leave the device; slots of the ring are freed."""
        self._rest.offload()
        if self.ring is not None:
            self.ring.release()
        self.on_device = False

    def onload(self) -> None:
        """Bring resident weights to the device and start the ring."""
        self._rest.onload(self._device)
        if self.ring is not None:
            self.ring.start()
        self.on_device = True


def offload_backbone(
    backbone: WanBackbone, excluded: Iterable[Tensor], device: torch.device, streamed: Sequence[int] = (),
    pool: HostPool | None = None,
) -> ModelOffload:
    """Offload a noise expert's frozen weights; its forward asks the ring for the `streamed` blocks."""
    offload = ModelOffload(backbone.transformer, excluded, device, streamed, pool=pool)
    backbone.stream(offload.ring)
    return offload


def offload_by_hooks(
    model: nn.Module, device: torch.device, streamed: Sequence[int], blocks_name: str
) -> ModelOffload:
    """Offload a model with its own forward; its `streamed` blocks ask the ring by forward hooks."""
    offload, blocks = ModelOffload(model, (), device, streamed, blocks_name), model.get_submodule(blocks_name)
    ring = offload.ring
    if ring is not None:
        assert isinstance(blocks, nn.ModuleList)
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, index=index: ring.ready(index))
            block.register_forward_hook(lambda *_, index=index: ring.done(index))
    return offload


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())
