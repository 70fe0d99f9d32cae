"""The transformers of a model with their adapters: loaded at their first step, kept together or one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan import console
from lapwan.distributed import Processes
from lapwan.lora.attach import Adapter, attach
from lapwan.memory.generation import Asking, Memory, describe, free_bytes, plan_generation, text_encoder_bytes
from lapwan.memory.plan import MemoryPlan, Placement, Strategy, free_of, host_memory, needs
from lapwan.memory.shapes import heads_of
from lapwan.memory.streaming import Residence, tensors_of
from lapwan.memory.throughput import rates_of
from lapwan.models.base import Base
from lapwan.models.device import limit_memory
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.adapters import AdapterSet
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer.compile import Compile, CompileReport, compile_blocks, pays
from lapwan.wan.transformer.context_parallel import ContextParallel, check_heads
from lapwan.wan.transformer.options import forward_options

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass
class _Loaded:
    model: WanTransformer3DModel
    adapter: Adapter | None = None
    host: Residence | None = None
    offloaded: bool = False
    streamed: int = 0


class NoiseExperts:
    """A noise expert is loaded when first asked for, so that one without steps is never read.

    One at a time (the text encoder counts), the idle one waits in pinned host memory, and blocks of the one at work may
    stream from there; on a CPU the idle one is released and read again. Results do not depend on it.
    Several `processes` share the tokens of each video, each with the whole weights; they decide alike.
    """

    def __init__(
        self, base: Base, adapters: AdapterSet, device: torch.device, dtype: torch.dtype, memory: Memory = "auto",
        compile: Compile = "auto", precision: Precision | None = None, text_precision: Precision | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        check_heads(heads_of(base.spec), self.processes.count)
        self.base, self.adapters = base, adapters
        self.device, self.dtype, self.memory = device, dtype, memory
        self.precision, self._text_precision = precision, text_precision
        self._loaded: dict[NoiseExpert, _Loaded] = {}
        own = Placement(memory in ("auto", "both"), base.spec.num_layers if memory == "stream" else 0)
        self._plan = MemoryPlan(Strategy(own, 0, 0.0), 0, 0, None, memory)
        self._plans: dict[Asking, MemoryPlan] = {}
        self.text_streams = False
        self._told: str | None = None
        self._compile = compile
        self._work: dict[NoiseExpert, int] = {}
        self._latents_THW: tuple[int, ...] = (0, 0, 0)
        self.compiling = CompileReport()
        self._coming: dict[NoiseExpert, Future[_Loaded]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.compiled: set[NoiseExpert] = set()  # by the video at work

    def use(self, base: Base, adapters: AdapterSet) -> None:
        """Take other adapters on the same model; what is loaded stays, unless LoRAs are merged into its weights."""
        if adapters is self.adapters:
            return
        for noise_expert in list(self._coming):
            self._loaded[noise_expert] = self._coming.pop(noise_expert).result()
        for one in self._loaded.values():
            if one.adapter is not None:
                one.adapter.detach()
        if base.loras != self.base.loras:
            self._loaded.clear()
        self.base, self.adapters = base, adapters
        self._plans.clear()
        for noise_expert, one in self._loaded.items():
            one.adapter = self._attached(one.model, noise_expert)
            if not one.offloaded:  # rows are made where a weight is: in host memory, where its block streams
                _move(one.adapter, self.device)

    @property
    def together(self) -> bool:
        """Whether guidance's two evaluations make one batch."""
        return self._plan.strategy.together

    def plan(
        self, num_frames: int, size: tuple[int, int], steps: int = 40, guided: bool = True, batch: int = 1
    ) -> MemoryPlan:
        """Decide for a video what stays on the device; the decision is logged when it changes."""
        asking = Asking(num_frames, size, steps, batch, guided, self.processes.count)
        free = free_bytes(self.device)
        if free is not None:
            free = min(self.processes.gather(free + self._here()))
        if isinstance(self.memory, float) and self.device.type == "cuda":
            limit_memory(self.device, self.memory)
        # What is free moves a little all the time: a plan holds as long as it fits.
        if asking not in self._plans or (free is not None and needs(self._plans[asking].peak) > free):
            self._plans[asking] = self._choose(asking, free)
        self._plan = self._plans[asking]
        line = describe(self._plan, self.device, len(self.base.spec.noise_experts))
        tell = console.detail if self._plan.both and not self._plan.parts else console.log
        if self._told is None or self._told.split("(")[0] != line.split("(")[0]:
            tell(line)
        self._told = line
        return self._plan

    def _choose(self, asking: Asking, free: int | None) -> MemoryPlan:
        spec, limit = self.base.spec, free_of(free, self.memory)
        whole = text_encoder_bytes(spec, self._text_precision)
        self.text_streams = self.memory == "stream" or (limit is not None and needs(whole) > limit)
        text = text_encoder_bytes(spec, self._text_precision, self.text_streams)
        groups = {noise_expert: self.adapters.groups(noise_expert) for noise_expert in spec.noise_experts}
        rates = self.processes.from_first(rates_of(self.device, self.dtype)) if limit is not None else None
        return plan_generation(spec, groups, self.dtype, self._recipe(), asking, self.memory, free, rates, text,
                               self._host_free())

    def _host_free(self) -> int | None:
        """What the host could give this process, weights that wait there already included."""
        free = host_memory()
        models = [one.model for one in self._loaded.values() if one.host is not None]
        held = sum(t.nbytes for model in models for t in tensors_of(model))
        if free is None:
            return None
        return min(self.processes.gather(free // self.processes.count + held))

    def _recipe(self) -> Recipe | None:
        return None if self.precision is None else Recipe(self.precision)

    def _here(self) -> int:
        """Bytes of loaded transformers on the device."""
        models = [one.model for one in self._loaded.values()]
        held = sum(t.nbytes for model in models for t in tensors_of(model) if t.device.type == self.device.type)
        rings = [one.host.ring for one in self._loaded.values() if one.host is not None and one.host.here]
        return held + sum(ring.place_bytes for ring in rings if ring is not None)

    def expect(self, evaluations: Mapping[NoiseExpert, int], latents_THW: tuple[int, ...]) -> None:
        """What the next video will ask of each noise expert, which decides whether compiling its blocks pays."""
        self._work, self._latents_THW = dict(evaluations), latents_THW
        self.compiled.clear()

    def resident(self) -> tuple[NoiseExpert, ...]:
        """The noise experts on the device now."""
        return tuple(noise_expert for noise_expert, one in self._loaded.items() if not one.offloaded)

    def transformer(self, noise_expert: NoiseExpert) -> WanTransformer3DModel:
        """A noise expert's transformer on the device, with its adapters attached."""
        place = self._plan.strategy.placement
        if not place.both:
            self._park(besides=noise_expert)
        if noise_expert in self._coming:
            self._loaded[noise_expert] = self._coming.pop(noise_expert).result()
        if noise_expert in self._loaded and self._loaded[noise_expert].streamed != place.streamed:
            del self._loaded[noise_expert]  # another way than it was loaded for
        if noise_expert not in self._loaded:
            console.log(f"loading the {noise_expert.value} noise expert")
            self._loaded[noise_expert] = self._load(noise_expert, place)
        if self._waits(place):
            self._foresee(noise_expert, place)
        one = self._loaded[noise_expert]
        if one.offloaded:
            assert one.host is not None
            one.host.fetch()
            _move(one.adapter, self.device)
            one.offloaded = False
        times = self._work.get(noise_expert, 0) // self.processes.count  # each has that share of the tokens
        auto = self._compile == "auto" and pays(one.model, self._latents_THW, times, training=False)
        compiles = auto or self._compile == "on"
        compile_blocks(one.model, compiles)
        self.compiled.update({noise_expert} if compiles else ())
        return one.model

    def _waits(self, place: Placement) -> bool:
        """Whether noise experts live in host memory and come to the device for their steps."""
        return place.streamed > 0 or (not place.both and self.device.type == "cuda")

    def _load(self, noise_expert: NoiseExpert, place: Placement) -> _Loaded:
        # What comes and goes is read into host memory and stays there; quantising is the device's work all the same.
        home = torch.device("cpu") if self._waits(place) else self.device
        model = self.base.load(noise_expert, self.dtype, home, self._recipe(), self.device)
        if self.processes.count > 1:
            forward_options(model).spread = ContextParallel(self.processes.rank, self.processes.count)
        one = _Loaded(model, self._attached(model, noise_expert), streamed=place.streamed)
        if self._waits(place):
            own = () if one.adapter is None else one.adapter.own_tensors()
            one.host, one.offloaded = Residence(model, own, self.device, range(place.streamed)), True
        return one

    def _foresee(self, noise_expert: NoiseExpert, place: Placement) -> None:
        """Read the other noise expert while this one samples, where host memory is its place in any case."""
        for other, evaluations in self._work.items():
            if evaluations and other is not noise_expert and other not in self._loaded and other not in self._coming:
                console.log(f"reading the {other.value} noise expert beside it")
                self._coming[other] = self._reader.submit(self._load, other, place)

    def scope(self, noise_expert: NoiseExpert, gates_1G: Tensor) -> AbstractContextManager[object]:
        """Hold the adapters' gates around evaluations of a loaded noise expert."""
        adapter = self._loaded[noise_expert].adapter
        return nullcontext() if adapter is None else adapter.holder.scope(gates_1G)

    def make_room(self) -> None:
        """Leave the device to the text encoder or the decoder, unless everything stays."""
        if not self._plan.both:
            self._park(besides=None)

    def _park(self, besides: NoiseExpert | None) -> None:
        for noise_expert in self.resident():
            if noise_expert is besides:
                continue
            one = self._loaded[noise_expert]
            if one.host is None and self.device.type == "cpu":
                del self._loaded[noise_expert]
                continue
            if one.host is None:
                own = () if one.adapter is None else one.adapter.own_tensors()
                one.host = Residence(one.model, own, self.device)
            one.host.offload()
            _move(one.adapter, torch.device("cpu"))
            one.offloaded = True

    def _attached(self, model: WanTransformer3DModel, noise_expert: NoiseExpert) -> Adapter | None:
        groups = self.adapters.groups(noise_expert)
        return attach(model, groups, gates_required=True) if groups else None


def _move(adapter: Adapter | None, device: torch.device) -> None:
    """An adapter's rows are small and come and go with it: moved plainly."""
    for tensor in () if adapter is None else adapter.own_tensors():
        tensor.data = tensor.data.to(device)
