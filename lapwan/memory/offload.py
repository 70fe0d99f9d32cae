"""Offloading noise experts in training: the idle one waits in host memory, the frozen prefix may be streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lapwan.lora.layer import StackedLoraLinear
from lapwan.memory.streaming import HostPool, ModelOffload, offload_backbone
from lapwan.names import NoiseExpert
from lapwan.wan.backbone import WanBackbone


class NoiseExpertOffload:
    """Keeps one noise expert at a time on the device; frozen weights of the other wait in pinned host memory.

    Trained parameters stay on the device: they are small, and optimizers hold on to them.

    Args:
        both: keep all noise experts on the device; nothing ever moves.
        streamed: indices of blocks without trained parameters, streamed through a ring while their noise expert runs.
    """

    def __init__(self, device: torch.device, both: bool = True, streamed: Sequence[int] = ()) -> None:
        self.device, self.both, self._streamed = device, both and not streamed, streamed
        self._offloads: dict[NoiseExpert, ModelOffload] = {}
        self._pool = HostPool(pinned=True) if device.type == "cuda" and not self.both else None
        self._active: NoiseExpert | None = None

    @property
    def load_device(self) -> torch.device:
        """Where to load a noise expert before `add`."""
        return self.device if self.both else torch.device("cpu")

    @property
    def to_host(self) -> Callable[[Tensor], Tensor] | None:
        """Copies a tensor into the pinned memory that keeps it; None: not next to a GPU, or nothing is offloaded."""
        return None if self._pool is None else self._pool.copy_of

    def add(self, noise_expert: NoiseExpert, backbone: WanBackbone, kept: Sequence[Tensor] = ()) -> None:
        """Manage a noise expert that was loaded on `load_device`.

        Args:
            kept: its tensors that stay on the device, those of an adapter.

        Raises:
            RuntimeError: a streamed block holds something trained.
        """
        if self.both:
            return
        # A backward needs the weights after their slot has gone to another block.
        if any(_needs_graph(backbone.transformer.blocks[index]) for index in self._streamed):
            raise RuntimeError("a block with trained parameters cannot stream")
        offload = self._offloads[noise_expert] = offload_backbone(
            backbone, kept, self.device, self._streamed, self._pool)
        offload.offload()
        for tensor in kept:
            tensor.data = tensor.data.to(self.device)

    def activate(self, noise_expert: NoiseExpert) -> None:
        """Bring this noise expert's weights to the device, after offloading the others'."""
        if noise_expert is self._active or noise_expert not in self._offloads:
            return
        for other, offload in self._offloads.items():
            if other is not noise_expert:
                offload.offload()
        self._offloads[noise_expert].onload()
        self._active = noise_expert


def _needs_graph(block: nn.Module) -> bool:
    """Whether it holds trained parameters, or adapters whose gates carry gradient."""
    gated = any(isinstance(m, StackedLoraLinear) and m.holder.required for m in block.modules())
    return gated or any(p.requires_grad for p in block.parameters())
