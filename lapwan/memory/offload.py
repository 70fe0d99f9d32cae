"""Noise experts between host and device while they train: the idle one waits, the frozen prefix may stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lapwan.lora.attach import Adapter
from lapwan.lora.layer import StackedLoraLinear
from lapwan.memory.streaming import Residence
from lapwan.names import NoiseExpert


class NoiseExpertOffload:
    """One noise expert at a time on the device; the frozen weights of the others wait in pinned host memory.

    What is trained stays on the device: it is small, and optimizers hold on to it. With `both` nothing ever moves.

    Args:
        streamed: indices of blocks without anything trained, which pass through a ring while their expert works.
    """

    def __init__(self, device: torch.device, both: bool = True, streamed: Sequence[int] = ()) -> None:
        self.device, self.both, self._streamed = device, both and not streamed, streamed
        self._homes: dict[NoiseExpert, Residence] = {}
        self._here: NoiseExpert | None = None

    @property
    def load_on(self) -> torch.device:
        """Where to load a noise expert before `add`."""
        return self.device if self.both else torch.device("cpu")

    def add(self, adapters: Mapping[NoiseExpert, Adapter]) -> None:
        """Take in noise experts that lie on `load_on`."""
        if self.both:
            return
        for noise_expert, adapter in adapters.items():
            blocks = adapter.transformer.get_submodule("blocks")
            assert isinstance(blocks, nn.ModuleList)
            # A backward needs the weights after their place has gone to another block.
            if any(_needs_graph(blocks[index]) for index in self._streamed):
                raise RuntimeError("a block that something is trained in cannot stream")
            own = adapter.own_tensors()
            home = self._homes[noise_expert] = Residence(adapter.transformer, own, self.device, self._streamed)
            home.offload()
            for tensor in own:
                tensor.data = tensor.data.to(self.device)

    def turn(self, noise_expert: NoiseExpert) -> None:
        """This noise expert's weights are on the device from here on, the others' are not."""
        if noise_expert is self._here or noise_expert not in self._homes:
            return
        for other, home in self._homes.items():
            if other is not noise_expert:
                home.offload()
        self._homes[noise_expert].fetch()
        self._here = noise_expert


def _needs_graph(block: nn.Module) -> bool:
    """Something in it is trained, or gated by what is."""
    gated = any(isinstance(m, StackedLoraLinear) and m.holder.required for m in block.modules())
    return gated or any(p.requires_grad for p in block.parameters())
