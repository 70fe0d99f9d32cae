"""The memory plan of train-lora and train-moe: offloading, streaming, activation checkpointing and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lapwan import console
from lapwan.checkpoints.wan_keys import split_block
from lapwan.console import PlanPart, PlanRow, duration_text
from lapwan.memory.cost import TRAINED_COPIES, ClipShape, GroupShape, NoiseExpertShape, tokens_of, width_of
from lapwan.memory.offload import NoiseExpertOffload
from lapwan.memory.plan import (
    COMPILED_ACTIVATIONS,
    GIB,
    OP_OVERHEAD,
    STEP_OVERHEAD,
    WORKSPACE,
    MemoryPlan,
    NoiseExpertBytes,
    Placement,
    Strategy,
    Throughput,
    available_host_memory,
    choose,
    memory_budget,
    memory_table,
    memory_warnings,
    placements,
    required_bytes,
)
from lapwan.memory.throughput import measure_throughput
from lapwan.models.base import Base
from lapwan.models.device import free_bytes, limit_memory, pick_dtype
from lapwan.names import Checkpointing, NoiseExpert, Precision
from lapwan.settings.memory import precision_of
from lapwan.settings.train import TrainSettings
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer.compile import compiling_saves
from lapwan.wan.transformer.forward import ForwardOptions


@dataclass(frozen=True)
class TrainingMemory:
    """The plan, how each noise expert is quantised, whether the clips stay on the device, and the plan in words."""

    plan: MemoryPlan
    recipes: Mapping[NoiseExpert, Recipe | None]
    keep_data: bool
    summary: str
    device: str

    @property
    def line(self) -> str:
        """The plan and its predicted peak in one line."""
        line, plan = f"memory: {self.summary}", self.plan
        if plan.parts:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.parts.items())
            free = "" if plan.free is None else f" of {plan.free / GIB:.1f}"
            line += (f"; predicted peak {plan.peak / GIB:.2f}{free} GiB ({parts}){plan.host_summary}, "
                     f"{plan.strategy.seconds:.3g} s a step")
        return line if plan.fits else f"{line}; THIS DOES NOT FIT"

    def rows(self, steps: int) -> list[PlanPart]:
        """The plan for a screen; `steps`: optimizer steps of the run."""
        parts: list[PlanPart] = [PlanRow("memory", self.summary), *memory_table(self.plan, self.device)]
        if self.plan.parts:
            seconds = self.plan.strategy.seconds
            parts.append(PlanRow("time", f"{seconds:.3g} s a step, {duration_text(steps * seconds)} for all {steps} "
                                         "(predicted)"))
        return [*parts, *memory_warnings(self.plan, self.device)]

    @property
    def both(self) -> bool:
        """Whether no noise expert ever leaves the device."""
        return self.plan.both

    def load(
        self, settings: TrainSettings, base: Base, noise_expert: NoiseExpert, offload: NoiseExpertOffload
    ) -> WanBackbone:
        """Load a noise expert as planned, quantised on the device, to where `offload` keeps it. A cap in GiB applies
        from here on."""
        if isinstance(settings.memory, float):
            limit_memory(offload.device, settings.memory)
        console.log(f"loading the {base.spec.title_of(noise_expert)}")
        dtype, recipe = pick_dtype(settings.dtype, offload.device), self.recipes[noise_expert]
        strategy = self.plan.strategy
        options = ForwardOptions(checkpointing=strategy.checkpointing, whole_blocks=strategy.whole_blocks)
        return base.load(
            noise_expert, dtype, offload.load_device, recipe, offload.device, options, offload.to_host)

    @property
    def micro_batch(self) -> int | None:
        """Clips at a time if the whole batch does not fit, else None."""
        return self.plan.strategy.micro_batch or None


Groups = Mapping[NoiseExpert, Sequence[GroupShape]]
ModuleRanks = Mapping[str, int]  # by module path


@dataclass(frozen=True)
class Workload:
    """What determines the memory of a run.

    Args:
        bucket: (frames, height, width) in pixels of the largest clip.
        clip_bytes: all cached clips in memory.
        steps: the fewest optimizer steps of a noise expert.
        trained: the trained LoRAs of each noise expert: one, or a mixture's experts.
        frozen: an attached LoRA that is not trained.
    """

    bucket: tuple[int, int, int]
    clip_bytes: int
    steps: int
    trained: Mapping[NoiseExpert, Sequence[ModuleRanks]]
    frozen: Mapping[NoiseExpert, ModuleRanks] = field(default_factory=dict)


def training_recipe(settings: TrainSettings, base: Base, trained: set[int]) -> Recipe | None:
    """How a noise expert's base is quantised; `trained`: indices of the blocks with trained parameters.

    With `trained_blocks = "auto"`, an fp8 base keeps trained blocks unquantised if they are at most half of all: their
    backward is no faster in fp8, and the adapters train on unrounded weights.
    """
    precision = precision_of(settings.dtype)
    if precision is None:
        return None
    few = precision is Precision.FP8 and 2 * len(trained) <= base.num_layers
    plain = settings.trained_blocks == "plain" or (settings.trained_blocks == "auto" and few)
    return Recipe(precision, frozenset(trained) if plain else frozenset())


def plan_training(
    settings: TrainSettings, base: Base, work: Workload, device: torch.device, predict: bool = False, processes: int = 1
) -> TrainingMemory:
    """Choose a strategy from the model's shapes, the largest clip, and the free memory of device and host.

    Args:
        predict: predict memory and time on a CPU too, where nothing depends on it (for `--dry-run`).
        processes: that share each clip's tokens.
    """
    free = memory_budget(free_bytes(device), settings.memory)
    groups, recipes = _groups(work), _recipes(settings, base, work)
    if free is None and not predict:
        plan = _unpredicted(settings, base, groups)
        summary = _summary(plan, device, len(groups), settings.batch_size)
        return TrainingMemory(plan, recipes, True, summary, str(device))
    dtype = pick_dtype(settings.dtype, device)
    plan = predict_training(settings, base, work, dtype, free, measure_throughput(device, dtype),
                            _compiles(settings, base, work, device, processes), available_host_memory(), processes)
    keep = free is None or required_bytes(plan.peak + work.clip_bytes) <= free
    return TrainingMemory(plan, recipes, keep, _summary(plan, device, len(groups), settings.batch_size), str(device))


def predict_training(
    settings: TrainSettings, base: Base, work: Workload, dtype: torch.dtype, free: int | None, rates: Throughput,
    compiled: bool, host_free: int | None, processes: int = 1,
) -> MemoryPlan:
    """The fastest strategy for any device, this machine's or another.

    Args:
        dtype: of what is not quantised.
        free: bytes the plan may use; None: any.
        rates: the device's throughput.
        host_free: available host memory; None: unknown.
        processes: that share each clip's tokens.
    """
    recipes = _recipes(settings, base, work)
    shapes = [NoiseExpertShape(base.spec, e, dtype, recipes[e], loras, len(loras) > 1)
              for e, loras in _groups(work).items()]
    sizes = [shape.bytes(TRAINED_COPIES + (settings.ema_decay is not None)) for shape in shapes]
    return _Candidates(settings, shapes, sizes, work.bucket, rates, compiled, processes).choose(free, host_free)


def _groups(work: Workload) -> dict[NoiseExpert, list[GroupShape]]:
    groups = {}
    for noise_expert, loras in work.trained.items():
        frozen = work.frozen.get(noise_expert)
        groups[noise_expert] = [*([GroupShape(frozen, False)] if frozen else []),
                                *(GroupShape(ranks, True) for ranks in loras)]
    return groups


def _recipes(settings: TrainSettings, base: Base, work: Workload) -> dict[NoiseExpert, Recipe | None]:
    return {noise_expert: training_recipe(settings, base, {
        block[0] for ranks in loras for path in ranks if (block := split_block(path)) is not None})
        for noise_expert, loras in work.trained.items()}


def _compiles(
    settings: TrainSettings, base: Base, work: Workload, device: torch.device, processes: int
) -> bool:
    """Whether the blocks will be compiled: as the setting says, or with "auto" if the run is long enough."""
    if settings.compile != "auto" or device.type != "cuda":
        return settings.compile == "on"
    tokens = tokens_of(base.spec, work.bucket) // processes
    evaluations = work.steps * settings.accumulate * settings.batch_size
    return compiling_saves(width_of(base.spec), tokens, evaluations, training=True)


def _unpredicted(settings: TrainSettings, base: Base, groups: Groups) -> MemoryPlan:
    """The plan on a CPU: as requested, without numbers."""
    prefix = _prefix(groups, base.num_layers)
    [placement, *_] = placements(prefix, "both" if settings.memory == "auto" else settings.memory)
    kind: Checkpointing = "off" if settings.activation_checkpointing == "auto" else settings.activation_checkpointing
    return MemoryPlan(Strategy(_simplified(placement, len(groups)), 0, 0.0, kind), 0, 0, None, settings.memory)


def _prefix(groups: Groups, num_layers: int) -> int:
    """The number of blocks before the first that needs a graph (trained or gated), in any noise expert."""
    paths = [path for loras in groups.values() for group in loras if group.trainable or len(loras) > 1
             for path in group.ranks]
    return min((block[0] if (block := split_block(path)) else 0 for path in paths), default=num_layers)


def _simplified(placement: Placement, count: int) -> Placement:
    """A single noise expert is not swapped with another: one at a time is the same as both."""
    return Placement(True) if count == 1 and not placement.streamed else placement


@dataclass(frozen=True)
class _Candidates:
    """The strategies of a run, and the choice between them."""

    settings: TrainSettings
    shapes: Sequence[NoiseExpertShape]
    sizes: Sequence[NoiseExpertBytes]
    bucket: tuple[int, int, int]
    rates: Throughput
    compiled: bool
    processes: int

    def choose(self, free: int | None, host_free: int | None) -> MemoryPlan:
        """The fastest strategy that fits, in micro-batches only if the fastest of all does not: they save no time."""
        gradients = [shape.gradients for shape in self.shapes]
        fixed = WORKSPACE + sum(gradients) - max(gradients)  # those of the active noise expert count as activations
        strategies, micro_batch = self.strategies(self.settings.batch_size), self.settings.batch_size
        fastest = min(strategy.seconds for strategy in strategies)
        while True:
            plan = choose(self.sizes, strategies, fixed, free, self.settings.memory, host_free=host_free)
            micro_batch //= 2
            if not micro_batch or (plan.fits and plan.fits_host and plan.strategy.seconds <= fastest):
                return plan
            strategies += self.strategies(micro_batch)

    def strategies(self, micro_batch: int) -> list[Strategy]:
        """Every placement with everything that can be recomputed, for batches run `micro_batch` clips at a time."""
        settings, sizes, strategies = self.settings, self.sizes, []
        prefix = min(shape.first_trained for shape in self.shapes)
        candidates = [_simplified(placement, len(sizes)) for placement in placements(prefix, settings.memory)]
        clip, parts = ClipShape(micro_batch, *self.bucket), math.ceil(settings.batch_size / micro_batch)
        overhead = STEP_OVERHEAD[self.compiled]
        for recomputation in _recomputations(settings, self.shapes, clip, self.compiled, self.processes):
            frozen, trained = (part.times(1 / self.processes).seconds(self.rates)
                               for part in self.shapes[0].step_flops(clip, recomputation.share))
            for placement in dict.fromkeys(candidates):
                copies = max(sum(size.blocks[: placement.streamed]) for size in sizes) / self.rates.bus
                swap = sum(size.weights for size in sizes) / self.rates.bus / settings.turn / 2
                seconds = max(overhead * frozen, copies) + overhead * trained * recomputation.overhead
                strategies.append(Strategy(
                    placement, recomputation.activations,
                    parts * settings.accumulate * seconds + (0.0 if placement.both else swap),
                    recomputation.kind, recomputation.whole_blocks,
                    0 if micro_batch == settings.batch_size else micro_batch))
        return strategies


@dataclass(frozen=True)
class _Recomputation:
    """What a backward recomputes, and its cost.

    Args:
        whole_blocks: the first trained blocks, recomputed whole.
        activations: bytes beside the weights.
        share: of the trained blocks' forward that is computed twice.
        overhead: relative time of recomputing cheap operations.
    """

    kind: Checkpointing
    whole_blocks: int
    activations: int
    share: float
    overhead: float = 1.0


def _recomputations(
    settings: TrainSettings, shapes: Sequence[NoiseExpertShape], clip: ClipShape, compiled: bool, processes: int
) -> list[_Recomputation]:
    """As the setting says; with "auto" none, cheap operations, and with either the first 1 to all trained blocks."""
    requested = settings.activation_checkpointing
    kinds: list[Checkpointing] = ["off", "op", "block"] if requested == "auto" else [requested]
    steps = [shape.step_memory(clip, kinds, processes) for shape in shapes]
    trained = max(len(step.blocks) for step in steps)
    recomputations = []
    for kind in kinds:
        for whole in range(max(1, trained) if requested == "auto" and kind != "block" else 1):
            activations = max(step.peak(kind, whole, COMPILED_ACTIVATIONS if compiled else None) for step in steps)
            share = 1.0 if kind == "block" else whole / trained if trained else 0.0
            overhead = 1.0 + (OP_OVERHEAD - 1.0) * (1.0 - share) if kind == "op" else 1.0
            recomputations.append(_Recomputation(kind, whole, activations, share, overhead))
    return recomputations


def _summary(plan: MemoryPlan, device: torch.device, count: int, batch_size: int) -> str:
    """Where weights are, what is recomputed, and whether a batch is split."""
    placement, strategy = plan.strategy.placement, plan.strategy
    what = f"everything stays on {device}" if count == 1 else f"both noise experts stay on {device}"
    if placement.streamed:
        what = f"the first {placement.streamed} blocks stream from host memory to {device}"
    elif not placement.both:
        what = f"one noise expert at a time on {device}"
    details = [what]
    if strategy.checkpointing == "block":
        details.append("whole blocks are recomputed")
    elif strategy.whole_blocks:
        cheap = ", and cheap operations of the others" if strategy.checkpointing == "op" else ""
        details.append(f"the first {strategy.whole_blocks} trained blocks are recomputed{cheap}")
    elif strategy.checkpointing == "op":
        details.append("cheap operations are recomputed")
    if strategy.micro_batch:
        details.append(f"a batch of {batch_size} runs in micro-batches of {strategy.micro_batch}, with the same result")
    return "; ".join(details)
