"""The transformers of a generation with their adapters: loaded on first use, offloaded and streamed as planned."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lapwan import console
from lapwan.distributed import Processes
from lapwan.lora.attach import Adapter, attach
from lapwan.memory.cost import heads_of
from lapwan.memory.generation import (
    GenerationWorkload,
    Memory,
    generation_rows,
    plan_generation,
    text_encoder_bytes,
)
from lapwan.memory.plan import MemoryPlan, Placement, Strategy, available_host_memory, memory_budget, required_bytes
from lapwan.memory.streaming import HostPool, ModelOffload, offload_backbone, tensors_of
from lapwan.memory.throughput import measure_throughput
from lapwan.models.base import Base
from lapwan.models.device import free_bytes, limit_memory
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.denoise import Scope
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer.compile import Compile, CompileReport, worth_compiling
from lapwan.wan.transformer.context_parallel import ContextParallel, check_heads
from lapwan.wan.transformer.forward import ForwardOptions


@dataclass
class _Loaded:
    """A noise expert in memory; `offload` once it has been in host memory."""

    backbone: WanBackbone
    adapter: Adapter | None = None
    offload: ModelOffload | None = None
    offloaded: bool = False
    streamed: int = 0


class NoiseExperts:
    """The noise experts of a model, each loaded at its first step; one without steps is never read.

    If the plan keeps one at a time on the device, the other one (and the text encoder) is offloaded to pinned host
    memory, and blocks of the active one may stream from there. On a CPU the idle one is released and read again.
    Results do not depend on it. Several `processes` share the tokens of each video, each with all weights, and make the
    same plan.
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
        placement = Placement(memory in ("auto", "both"), base.spec.num_layers if memory == "stream" else 0)
        self._plan = MemoryPlan(Strategy(placement, 0, 0.0), 0, 0, None, memory)
        self._plans: dict[GenerationWorkload, MemoryPlan] = {}
        self.text_streams = False
        self._logged: Placement | None = None
        self._compile = compile
        self._evaluations: dict[NoiseExpert, int] = {}
        self._latents_THW: tuple[int, ...] = (0, 0, 0)
        self.compiling = CompileReport()
        self._loading: dict[NoiseExpert, Future[_Loaded]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self.compiled: set[NoiseExpert] = set()  # in the current video

    def use(self, base: Base, adapters: AdapterSet) -> None:
        """Switch to other adapters of the same model. Loaded weights stay, unless LoRAs are merged into them."""
        if adapters is self.adapters:
            return
        self.finish_loading()
        for loaded in self._loaded.values():
            if loaded.adapter is not None:
                loaded.adapter.detach()
        if base.loras != self.base.loras:
            self._loaded.clear()
        self.base, self.adapters = base, adapters
        self._plans.clear()
        for noise_expert, loaded in self._loaded.items():
            loaded.adapter = self._attach(loaded.backbone, noise_expert)
            if not loaded.offloaded:  # rows are created next to the weights: of streamed blocks, in host memory
                _move(loaded.adapter, self.device)

    def finish_loading(self) -> None:
        """Wait for the weights that are being read for later steps."""
        for noise_expert in list(self._loading):
            self._loaded[noise_expert] = self._loading.pop(noise_expert).result()

    @property
    def batched_guidance(self) -> bool:
        """Whether the two evaluations of guidance run as one batch."""
        return self._plan.strategy.batched_guidance

    def plan(
        self, num_frames: int, size: tuple[int, int], steps: int = 40, guided: bool = True, batch: int = 1
    ) -> MemoryPlan:
        """The memory plan of a video, logged when it changes."""
        workload = GenerationWorkload(num_frames, size, steps, batch, guided, self.processes.count)
        free = free_bytes(self.device)
        if free is not None:
            free = min(self.processes.gather(free + self._device_bytes()))
        if isinstance(self.memory, float) and self.device.type == "cuda":
            limit_memory(self.device, self.memory)
        # Free memory changes a little all the time: a plan is kept as long as it fits.
        if workload not in self._plans or (free is not None and required_bytes(self._plans[workload].peak) > free):
            self._plans[workload] = self._choose(workload, free)
        self._plan = self._plans[workload]
        rows = generation_rows(self._plan, self.device, len(self.base.spec.noise_experts), steps)
        if (self._plan.parts or not self._plan.both) and self._logged != self._plan.strategy.placement:
            console.show_plan(rows)
        self._logged = self._plan.strategy.placement
        return self._plan

    def _choose(self, workload: GenerationWorkload, free: int | None) -> MemoryPlan:
        spec, limit = self.base.spec, memory_budget(free, self.memory)
        whole = text_encoder_bytes(spec, self._text_precision)
        self.text_streams = self.memory == "stream" or (limit is not None and required_bytes(whole) > limit)
        text = text_encoder_bytes(spec, self._text_precision, self.text_streams)
        groups = {noise_expert: self.adapters.groups(noise_expert) for noise_expert in spec.noise_experts}
        rates = self.processes.from_first(measure_throughput(self.device, self.dtype)) if limit is not None else None
        return plan_generation(spec, groups, self.dtype, self._recipe(), workload, self.memory, free, rates, text,
                               self._host_free())

    def _host_free(self) -> int | None:
        """Host memory this process can use, weights it already holds there included."""
        free = available_host_memory()
        models = [loaded.backbone.transformer for loaded in self._loaded.values() if loaded.offload is not None]
        held = sum(t.nbytes for model in models for t in tensors_of(model))
        if free is None:
            return None
        return min(self.processes.gather(free // self.processes.count + held))

    def _recipe(self) -> Recipe | None:
        return None if self.precision is None else Recipe(self.precision)

    def _device_bytes(self) -> int:
        """Bytes of loaded transformers on the device."""
        models = [loaded.backbone.transformer for loaded in self._loaded.values()]
        held = sum(t.nbytes for model in models for t in tensors_of(model) if t.device.type == self.device.type)
        offloads = [loaded.offload for loaded in self._loaded.values() if loaded.offload is not None]
        rings = [offload.ring for offload in offloads if offload.on_device]
        return held + sum(ring.ring_bytes for ring in rings if ring is not None)

    def expect(self, evaluations: Mapping[NoiseExpert, int], latents_THW: tuple[int, ...]) -> None:
        """Set the evaluations of the next video by noise expert, which decide whether compiling pays off."""
        self._evaluations, self._latents_THW = dict(evaluations), latents_THW
        self.compiled.clear()

    def resident(self) -> tuple[NoiseExpert, ...]:
        """The noise experts on the device now."""
        return tuple(noise_expert for noise_expert, loaded in self._loaded.items() if not loaded.offloaded)

    def backbone(self, noise_expert: NoiseExpert) -> WanBackbone:
        """A noise expert on the device, with its adapters attached."""
        placement = self._plan.strategy.placement
        if not placement.both:
            self._offload(keep=noise_expert)
        if noise_expert in self._loading:
            self._loaded[noise_expert] = self._loading.pop(noise_expert).result()
        if noise_expert in self._loaded and self._loaded[noise_expert].streamed != placement.streamed:
            del self._loaded[noise_expert]  # it was loaded for another placement
        if noise_expert not in self._loaded:
            console.log(f"loading the {self.base.spec.title_of(noise_expert)}")
            self._loaded[noise_expert] = self._load(noise_expert, placement)
        if self._uses_host(placement):
            self._prefetch(noise_expert, placement)
        loaded = self._loaded[noise_expert]
        if loaded.offloaded:
            assert loaded.offload is not None
            loaded.offload.onload()
            _move(loaded.adapter, self.device)
            loaded.offloaded = False
        evaluations = self._evaluations.get(noise_expert, 0) // self.processes.count
        auto = self._compile == "auto" and worth_compiling(
            loaded.backbone.transformer, self._latents_THW, evaluations, training=False)
        compiles = auto or self._compile == "on"
        loaded.backbone.compile(compiles)
        self.compiled.update({noise_expert} if compiles else ())
        return loaded.backbone

    def _uses_host(self, placement: Placement) -> bool:
        """Whether noise experts are loaded into host memory and moved to the device for their steps."""
        return placement.streamed > 0 or (not placement.both and self.device.type == "cuda")

    def _load(self, noise_expert: NoiseExpert, placement: Placement) -> _Loaded:
        # Offloaded noise experts are loaded into host memory, but quantised on the device.
        load_device = torch.device("cpu") if self._uses_host(placement) else self.device
        processes = self.processes
        options = ForwardOptions(
            context_parallel=ContextParallel(processes.rank, processes.count) if processes.count > 1 else None)
        pool = HostPool(pinned=True) if self._uses_host(placement) and self.device.type == "cuda" else None
        to_host = None if pool is None else pool.copy_of
        backbone = self.base.load(noise_expert, self.dtype, load_device, self._recipe(), self.device, options, to_host)
        loaded = _Loaded(backbone, self._attach(backbone, noise_expert), streamed=placement.streamed)
        if self._uses_host(placement):
            rows = () if loaded.adapter is None else loaded.adapter.adapter_tensors()
            loaded.offload = offload_backbone(backbone, rows, self.device, range(placement.streamed), pool)
            loaded.offloaded = True
        return loaded

    def _prefetch(self, noise_expert: NoiseExpert, placement: Placement) -> None:
        """Read the other noise expert into host memory while this one samples."""
        for other, evaluations in self._evaluations.items():
            if evaluations and other is not noise_expert and other not in (*self._loaded, *self._loading):
                console.log(f"reading the {other.value} noise expert in the background")
                self._loading[other] = self._reader.submit(self._load, other, placement)

    def scope(self, noise_expert: NoiseExpert, gates_1G: Tensor) -> AbstractContextManager[object]:
        """Context that holds the adapters' gates during evaluations of a loaded noise expert."""
        adapter = self._loaded[noise_expert].adapter
        return nullcontext() if adapter is None else adapter.holder.scope(gates_1G)

    def step_scope(self, gates: Mapping[tuple[NoiseExpert, float], Tensor]) -> Scope:
        """`denoise`'s scope of the steps, from their gates by noise expert and sigma."""
        return lambda step: self.scope(step.noise_expert, gates[step.noise_expert, step.sigma])

    def free_device(self) -> None:
        """Offload all noise experts for the text encoder or the decoder, unless the plan keeps them on the device."""
        if not self._plan.both:
            self._offload(keep=None)

    def _offload(self, keep: NoiseExpert | None) -> None:
        for noise_expert in self.resident():
            if noise_expert is keep:
                continue
            loaded = self._loaded[noise_expert]
            if loaded.offload is None and self.device.type == "cpu":
                del self._loaded[noise_expert]
                continue
            if loaded.offload is None:
                rows = () if loaded.adapter is None else loaded.adapter.adapter_tensors()
                loaded.offload = offload_backbone(loaded.backbone, rows, self.device)
            loaded.offload.offload()
            _move(loaded.adapter, torch.device("cpu"))
            loaded.offloaded = True

    def _attach(self, backbone: WanBackbone, noise_expert: NoiseExpert) -> Adapter | None:
        groups = self.adapters.groups(noise_expert)
        return attach(backbone.transformer, groups, gates_required=True) if groups else None


def _move(adapter: Adapter | None, device: torch.device) -> None:
    """Move an adapter's tensors, which are small, without a host copy."""
    for tensor in () if adapter is None else adapter.adapter_tensors():
        tensor.data = tensor.data.to(device)
