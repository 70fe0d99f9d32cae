"""The transformers of a model with their adapters: loaded at their first step, kept together or one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan import console
from lapwan.lora.attach import Adapter, attach
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.memory import (
    HostCopy,
    Memory,
    Need,
    describe,
    forward_bytes,
    free_bytes,
    keep_both,
    text_encoder_bytes,
    weight_bytes,
)
from lapwan.wan.base import Base
from lapwan.wan.compiling import Compile, CompileReport, compile_blocks, pays

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass
class _Loaded:
    model: WanTransformer3DModel
    adapter: Adapter | None = None
    host: HostCopy | None = None
    parked: bool = False


class NoiseExperts:
    """A noise expert is loaded when first asked for, so that one without steps is never read.

    One at a time (the text encoder counts), the idle one waits in pinned host memory; on a CPU it is released and read
    again. Results do not depend on it.
    """

    def __init__(
        self, base: Base, adapters: AdapterSet, device: torch.device, dtype: torch.dtype, memory: Memory = "auto",
        compile: Compile = "auto",
    ) -> None:
        self.base, self.adapters = base, adapters
        self.device, self.dtype, self.memory = device, dtype, memory
        self._loaded: dict[NoiseExpert, _Loaded] = {}
        self._together = memory != "one"
        self._told: str | None = None
        self._compile = compile
        self._work: dict[NoiseExpert, int] = {}
        self._latents_THW: tuple[int, ...] = (0, 0, 0)
        self.compiling = CompileReport()

    def use(self, base: Base, adapters: AdapterSet) -> None:
        """Take other adapters on the same model; what is loaded stays, unless LoRAs are merged into its weights."""
        if adapters is self.adapters:
            return
        for one in self._loaded.values():
            if one.adapter is not None:
                one.adapter.detach()
        if base.loras != self.base.loras:
            self._loaded.clear()
        self.base, self.adapters = base, adapters
        for expert, one in self._loaded.items():
            one.adapter = self._attached(one.model, expert)

    def plan(self, num_frames: int, size: tuple[int, int]) -> None:
        """Decide for a video what stays on the device; the decision is logged when it changes."""
        spec = self.base.spec
        weights = {e: weight_bytes(spec, e, self.dtype) + self._adapter_bytes(e) for e in spec.experts}
        need = Need(
            list(weights.values()), forward_bytes(spec, self.dtype, num_frames, size), text_encoder_bytes(spec)
        )
        free = free_bytes(self.device)
        if free is not None:
            free += sum(weights[expert] for expert in self.resident())
        self._together = keep_both(self.memory, need, free)
        line = describe(self._together, self.memory, need, free, self.device)
        tell = console.detail if free is None and self._together else console.log
        if self._told is None or self._told.split("(")[0] != line.split("(")[0]:
            tell(line)
        self._told = line

    def expect(self, evaluations: Mapping[NoiseExpert, int], latents_THW: tuple[int, ...]) -> None:
        """What the next video will ask of each noise expert, which decides whether compiling its blocks pays."""
        self._work, self._latents_THW = dict(evaluations), latents_THW

    def resident(self) -> tuple[NoiseExpert, ...]:
        """The noise experts on the device now."""
        return tuple(expert for expert, one in self._loaded.items() if not one.parked)

    def transformer(self, expert: NoiseExpert) -> WanTransformer3DModel:
        """A noise expert's transformer on the device, with its adapters attached."""
        if not self._together:
            self._park(besides=expert)
        if expert not in self._loaded:
            console.log(f"loading the {expert.value} noise expert")
            model = self.base.load(expert, self.dtype, self.device)
            self._loaded[expert] = _Loaded(model, self._attached(model, expert))
        one = self._loaded[expert]
        if one.parked:
            assert one.host is not None
            one.host.fetch(self.device)
            _move(one.adapter, self.device)
            one.parked = False
        auto = self._compile == "auto" and pays(one.model, self._latents_THW, self._work.get(expert, 0), training=False)
        compile_blocks(one.model, auto or self._compile == "on")
        return one.model

    def scope(self, expert: NoiseExpert, gates_1G: Tensor) -> AbstractContextManager[object]:
        """Hold the adapters' gates around evaluations of a loaded noise expert."""
        adapter = self._loaded[expert].adapter
        return nullcontext() if adapter is None else adapter.holder.scope(gates_1G)

    def make_room(self) -> None:
        """Leave the device to the text encoder, unless everything stays."""
        if not self._together:
            self._park(besides=None)

    def _park(self, besides: NoiseExpert | None) -> None:
        for expert in self.resident():
            if expert is besides:
                continue
            if self.device.type == "cpu":
                del self._loaded[expert]
                continue
            one = self._loaded[expert]
            if one.host is None:
                own = () if one.adapter is None else one.adapter.own_tensors()
                rows = {id(tensor) for tensor in own}
                every = (*one.model.parameters(), *one.model.buffers())
                one.host = HostCopy((t for t in every if id(t) not in rows), self.device.type == "cuda")
            one.host.park()
            _move(one.adapter, torch.device("cpu"))
            one.parked = True

    def _attached(self, model: WanTransformer3DModel, expert: NoiseExpert) -> Adapter | None:
        groups = self.adapters.groups(expert)
        return attach(model, groups, gates_required=True) if groups else None

    def _adapter_bytes(self, expert: NoiseExpert) -> int:
        """Stacked rows are kept in fp32."""
        entries = (entry for group in self.adapters.groups(expert) for entry in group.state.entries.values())
        return 4 * sum(entry.down.numel() + entry.up.numel() for entry in entries)


def _move(adapter: Adapter | None, device: torch.device) -> None:
    """An adapter's rows are small and come and go with it: moved plainly."""
    for tensor in () if adapter is None else adapter.own_tensors():
        tensor.data = tensor.data.to(device)
