"""The memory plan of a training run: what stays, what streams, what is computed again, how batches are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lapwan.checkpoints.wan_keys import split_block
from lapwan.memory.generation import free_bytes
from lapwan.memory.plan import (
    COMPILED,
    GIB,
    OP_SECONDS,
    STEP_SECONDS,
    WORKSPACE,
    Checkpointing,
    MemoryPlan,
    NoiseExpertBytes,
    Placement,
    Rates,
    Strategy,
    choose,
    free_of,
    host_memory,
    needs,
    placements,
)
from lapwan.memory.shapes import ClipShape, GroupShape, NoiseExpertShape, tokens_of, width_of
from lapwan.memory.throughput import rates_of
from lapwan.models.base import Base
from lapwan.models.device import limit_memory, pick_dtype
from lapwan.names import NoiseExpert, Precision
from lapwan.settings.memory import precision_of
from lapwan.settings.train import TrainSettings
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.transformer.compile import worth
from lapwan.wan.transformer.options import forward_options

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

_NUMBERS = 3  # fp32 numbers kept for a trained one: itself and two moments


@dataclass(frozen=True)
class TrainingMemory:
    """The plan, what quantises each noise expert, whether the clips stay on the device, and the line that says it."""

    plan: MemoryPlan
    recipes: Mapping[NoiseExpert, Recipe | None]
    keep_data: bool
    line: str

    @property
    def both(self) -> bool:
        """Whether no noise expert ever leaves the device."""
        return self.plan.both

    def load(
        self, settings: TrainSettings, base: Base, noise_expert: NoiseExpert, home: torch.device, device: torch.device
    ) -> WanTransformer3DModel:
        """A noise expert as planned, on `home`; quantising is `device`'s work. A cap in GiB holds from here on."""
        if isinstance(settings.memory, float):
            limit_memory(device, settings.memory)
        transformer = base.load(noise_expert, pick_dtype(settings.dtype, device), home, self.recipes[noise_expert], device)
        path, strategy = forward_options(transformer), self.plan.strategy
        path.checkpointing, path.whole_blocks = strategy.checkpointing, strategy.whole_blocks
        return transformer

    @property
    def micro_batch(self) -> int | None:
        """Clips at a time where a batch does not fit whole."""
        return self.plan.strategy.micro_batch or None


Groups = Mapping[NoiseExpert, Sequence[GroupShape]]
ModuleRanks = Mapping[str, int]  # by module path


@dataclass(frozen=True)
class Workload:
    """What a run asks of the device.

    Args:
        bucket: frames, height and width in pixels of the largest clip.
        clip_bytes: all clips, once read.
        steps: the fewest optimizer steps of a noise expert.
        trained: what is trained on each noise expert: one LoRA, or a mixture's experts.
        frozen: a LoRA beside it that is not trained.
    """

    bucket: tuple[int, int, int]
    clip_bytes: int
    steps: int
    trained: Mapping[NoiseExpert, Sequence[ModuleRanks]]
    frozen: Mapping[NoiseExpert, ModuleRanks] = field(default_factory=dict)


def recipe_of(settings: TrainSettings, base: Base, trained: set[int]) -> Recipe | None:
    """How a noise expert's base is quantised; `trained` are the blocks something is trained in.

    By itself, a real fp8 base keeps trained blocks plain where they are at most half: their backward is no faster in
    fp8, and what is trained then sees its own block unrounded.
    """
    precision = precision_of(settings.dtype)
    if precision is None:
        return None
    few = precision is Precision.FP8 and 2 * len(trained) <= base.num_layers
    plain = settings.trained_blocks == "plain" or (settings.trained_blocks == "auto" and few)
    return Recipe(precision, frozenset(trained) if plain else frozenset())


def plan_training(
    settings: TrainSettings, base: Base, work: Workload, device: torch.device, look: bool = False, processes: int = 1
) -> TrainingMemory:
    """Decide from the model's shapes, the largest clips, and what the device has free.

    Args:
        look: predict also where nothing hangs on it (a CPU), for a plan that is only shown.
        processes: share each clip's tokens.
    """
    dtype, asked = pick_dtype(settings.dtype, device), settings.memory
    groups: dict[NoiseExpert, list[GroupShape]] = {}
    recipes = {}
    for noise_expert, each_ranks in work.trained.items():
        beside = work.frozen.get(noise_expert)
        groups[noise_expert] = [GroupShape(beside, False)] if beside else []
        groups[noise_expert] += [GroupShape(ranks, True) for ranks in each_ranks]
        blocks = {place[0] for ranks in each_ranks for path in ranks if (place := split_block(path)) is not None}
        recipes[noise_expert] = recipe_of(settings, base, blocks)
    free = free_of(free_bytes(device), asked)
    if free is None and not look:
        plan = _without_numbers(settings, base, groups)
        return TrainingMemory(plan, recipes, True, _line(plan, device, len(groups), settings.batch_size))
    shapes = {e: NoiseExpertShape(base.spec, e, dtype, recipes[e], own, len(own) > 1) for e, own in groups.items()}
    each = [shape.bytes(_NUMBERS + (settings.ema_decay is not None)) for shape in shapes.values()]
    compiled = _compiles(settings, base, work, device, processes)
    strategies = list(_strategies(settings, list(shapes.values()), each, work.bucket, rates_of(device, dtype), compiled, processes))
    idle = sum(shape.gradients for shape in shapes.values()) - max(shape.gradients for shape in shapes.values())
    plan = choose(each, strategies, WORKSPACE + idle, free, asked, host_free=host_memory())
    keep = free is None or needs(plan.peak + work.clip_bytes) <= free
    return TrainingMemory(plan, recipes, keep, _line(plan, device, len(groups), settings.batch_size))


def _compiles(
    settings: TrainSettings, base: Base, work: Workload, device: torch.device, processes: int
) -> bool:
    """Whether the blocks will be compiled: as asked, else where the run is long enough."""
    if settings.compile != "auto" or device.type != "cuda":
        return settings.compile == "on"
    tokens = tokens_of(base.spec, work.bucket) // processes
    return worth(width_of(base.spec), tokens, work.steps * settings.accumulate * settings.batch_size, training=True)


def _without_numbers(settings: TrainSettings, base: Base, groups: Groups) -> MemoryPlan:
    prefix = _prefix(groups, base.num_layers)
    [place, *_] = placements(len(groups), prefix, "both" if settings.memory == "auto" else settings.memory)
    kind: Checkpointing = "off" if settings.activation_checkpointing == "auto" else settings.activation_checkpointing
    return MemoryPlan(Strategy(_possible(place, len(groups)), 0, 0.0, kind), 0, 0, None, settings.memory)


def _prefix(groups: Groups, num_layers: int) -> int:
    """Blocks before the first one that needs a graph (something in it is trained, or gated), for every noise expert."""
    paths = [path for own in groups.values() for group in own if group.trainable or len(own) > 1
             for path in group.ranks]
    return min((place[0] if (place := split_block(path)) else 0 for path in paths), default=num_layers)


def _possible(place: Placement, count: int) -> Placement:
    """A single noise expert has no other to make room for."""
    return Placement(True) if count == 1 and not place.streamed else place


def _strategies(
    settings: TrainSettings, shapes: Sequence[NoiseExpertShape], each: Sequence[NoiseExpertBytes], bucket: tuple[int, int, int],
    rates: Rates, compiled: bool, processes: int,
) -> list[Strategy]:
    prefix = min(shape.first_trained for shape in shapes)
    places = list(dict.fromkeys(_possible(p, len(each)) for p in placements(len(each), prefix, settings.memory)))
    slower, strategies, micro = STEP_SECONDS[compiled], [], settings.batch_size
    while micro:
        clip, parts = ClipShape(micro, *bucket), math.ceil(settings.batch_size / micro)
        for again in _recomputations(settings, shapes, clip, compiled, processes):
            before, own = (part.times(1 / processes).seconds(rates) for part in shapes[0].step_flops(clip, again.share))
            for place in places:
                copied = max(sum(one.blocks[: place.streamed]) for one in each) / rates.bus
                swap = 0.0 if place.both else sum(one.weights for one in each) / rates.bus / settings.turn / 2
                once = max(slower * before, copied) + slower * own * again.slower
                seconds = parts * settings.accumulate * once + swap
                strategies.append(Strategy(place, again.work, seconds, again.kind, again.whole_blocks,
                                0 if micro == settings.batch_size else micro))
        micro //= 2
    return strategies


@dataclass(frozen=True)
class _Recomputation:
    """What a backward computes again, and what that takes: work beside the weights, the share of the trained blocks'
    forward, and the time of what is cheap."""

    kind: Checkpointing
    whole_blocks: int
    work: int
    share: float
    slower: float = 1.0


def _recomputations(
    settings: TrainSettings, shapes: Sequence[NoiseExpertShape], clip: ClipShape, compiled: bool, processes: int
) -> list[_Recomputation]:
    """What was asked for; else nothing, cheap operations, and of either the first trained blocks whole, up to all."""
    asked = settings.activation_checkpointing
    kinds: list[Checkpointing] = ["off", "op", "block"] if asked == "auto" else [asked]
    works = {kind: [shape.training_work(clip, kind, processes).times(COMPILED[kind] if compiled else 1.0)
                    for shape in shapes] for kind in kinds}
    most = max(len(work.each) for work in works[kinds[0]])
    found = []
    for kind, own in works.items():
        for whole in range(max(1, most) if asked == "auto" and kind != "block" else 1):
            work = max(one.with_whole(all_whole, whole)
                       for one, all_whole in zip(own, works.get("block", own), strict=True))
            share = 1.0 if kind == "block" else whole / most if most else 0.0
            cheap = 1.0 + (OP_SECONDS - 1.0) * (1.0 - share) if kind == "op" else 1.0
            found.append(_Recomputation(kind, whole, work, share, cheap))
    return found


def _line(plan: MemoryPlan, device: torch.device, count: int, batch_size: int) -> str:
    place, strategy = plan.strategy.placement, plan.strategy
    what = "everything stays" if count == 1 else "both noise experts stay"
    if place.streamed:
        what = f"the first {place.streamed} blocks stream from host memory"
    elif not place.both:
        what = "one noise expert at a time"
    details = [f"{what} on {device}" if not place.streamed else f"{what} to {device}"]
    if strategy.checkpointing == "block":
        details.append("whole blocks are computed again")
    elif strategy.whole_blocks:
        cheap = " whole, of the others cheap operations" if strategy.checkpointing == "op" else ""
        details.append(f"the first {strategy.whole_blocks} trained blocks are computed again{cheap}")
    elif strategy.checkpointing == "op":
        details.append("cheap operations are computed again")
    if strategy.micro_batch:
        details.append(f"a batch of {batch_size} runs as {strategy.micro_batch} at a time, with the same result")
    line = "memory: " + "; ".join(details)
    if plan.parts:
        own = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.parts.items())
        has = "" if plan.free is None else f" of {plan.free / GIB:.1f}"
        line += f"; predicted peak {plan.peak / GIB:.2f}{has} GiB ({own}){plan.host_words}, {strategy.seconds:.3g} s a step"
    if not plan.fits:
        line += "; THIS DOES NOT FIT"
    return line
