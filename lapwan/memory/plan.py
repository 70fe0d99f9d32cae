"""Where weights stay and what is computed again: every way allowed, its bytes and seconds, and the best that fits.

    resident  Σ experts (or the largest, one at a time) of outer + blocks that stay + places of the ring
    peak      resident + adapters + data + work of the largest phase + workspace
    step      max(prefix, streamed bytes / bus) + trained blocks (forward, recomputation, backward) + swap

All arithmetic, no torch: bytes in, a plan out. Units: bytes, seconds, flops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

GIB = 1 << 30
WORKSPACE = 96 << 20  # of the matrix libraries, taken from torch's allocator
SLACK, MARGIN = 0.08, 256 << 20  # what fits: predicted · 1.08 + 256 MiB for gaps between blocks
PLACES = 2  # of a ring
Checkpointing = Literal["off", "op", "block"]
Asked = str | float


@dataclass(frozen=True)
class NoiseExpertBytes:
    """Of one noise expert: its blocks, what is outside of them, and the rows of its adapters with all that goes with
    them (gradients, moments)."""

    blocks: tuple[int, ...]
    outer: int
    adapters: int = 0

    @property
    def weights(self) -> int:
        """All of the base."""
        return self.outer + sum(self.blocks)

    def staying(self, streamed: int) -> int:
        """On the device while it works, with its first `streamed` blocks in a ring of two places."""
        ring = min(PLACES, streamed) * max(self.blocks[:streamed], default=0)
        return self.outer + sum(self.blocks[streamed:]) + ring


@dataclass(frozen=True)
class Placement:
    """Both noise experts on the device, or one at a time; the first `streamed` blocks in host memory."""

    both: bool
    streamed: int = 0


def resident(noise_experts: Sequence[NoiseExpertBytes], placement: Placement) -> int:
    """Base weights and adapters on the device while a noise expert works; adapters of both stay."""
    each = [noise_expert.staying(placement.streamed) for noise_expert in noise_experts]
    return (sum(each) if placement.both else max(each)) + sum(noise_expert.adapters for noise_expert in noise_experts)


@dataclass(frozen=True)
class Rates:
    """Of a device: flops a second of products in the computing dtype and in fp8, of attention, bytes a second of the
    bus from host memory."""

    product: float
    product8: float
    attention: float
    bus: float


@dataclass(frozen=True)
class Flops:
    """Of one pass: products, products in fp8, attention."""

    product: float = 0.0
    product8: float = 0.0
    attention: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """At a device's rates."""
        return self.product / rates.product + self.product8 / rates.product8 + self.attention / rates.attention

    def times(self, factor: float) -> Flops:
        """All of it `factor` times."""
        return Flops(self.product * factor, self.product8 * factor, self.attention * factor)


@dataclass(frozen=True)
class Strategy:
    """One way to run, with what it takes. `whole_blocks`: the first trained blocks that are computed again whole,
    whatever `checkpointing` says of the others. `together`: guidance's two evaluations as one batch."""

    placement: Placement
    work: int
    seconds: float
    checkpointing: Checkpointing = "off"
    whole_blocks: int = 0
    micro_batch: int = 0
    together: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """The way chosen, what it needs of the device (`peak`) and of the host, and why."""

    strategy: Strategy
    peak: int
    host: int
    free: int | None
    asked: Asked
    parts: Mapping[str, int] = field(default_factory=dict)
    host_free: int | None = None

    @property
    def both(self) -> bool:
        """Whether no noise expert ever leaves the device."""
        return self.strategy.placement.both

    @property
    def streamed(self) -> range:
        """Indices of the blocks that stream."""
        return range(self.strategy.placement.streamed)

    @property
    def fits_host(self) -> bool:
        """Whether the host holds what waits there."""
        return self.host_free is None or self.host <= self.host_free

    @property
    def host_words(self) -> str:
        """What of the host's memory it takes, for the line that tells the plan."""
        if not self.host:
            return ""
        lacking = "" if self.fits_host or self.host_free is None else (
            f", WHICH HAS ONLY {self.host_free / GIB:.1f} GiB available")
        return f", {self.host / GIB:.1f} GiB of host memory{lacking}"

    @property
    def fits(self) -> bool:
        """Whether the prediction lies below what is free."""
        return self.free is None or needs(self.peak) <= self.free


# What compiled blocks take of the memory that the same operations take one by one, measured on an H200 with 5 and 40
# blocks at 256x256 and 480x832: they fuse, and their backward computes again what is cheap. By what a step recomputes;
# an evaluation takes the same either way, since its norms and residuals are kernels of their own.
COMPILED: Mapping[Checkpointing, float] = {"off": 0.79, "op": 0.97, "block": 0.75}


# Seconds of a training step over those of its products and attention, measured on an H200 with a LoRA: one by one, and
# compiled. (An evaluation takes what they take.)
STEP_SECONDS: Mapping[bool, float] = {False: 1.55, True: 1.25}
OP_SECONDS = 1.06  # of the trained blocks, cheap operations computed again, over nothing computed again


def host_memory() -> int | None:
    """Bytes the host could still give, as Linux says; None elsewhere."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def needs(peak: int) -> int:
    """What must be free for a predicted peak."""
    return int(peak * (1 + SLACK)) + MARGIN


def choose(
    noise_experts: Sequence[NoiseExpertBytes], strategies: Iterable[Strategy], beside: int, free: int | None, asked: Asked,
    phases: Mapping[str, int] | None = None, host_free: int | None = None,
) -> MemoryPlan:
    """The fastest way that fits the device and the host; of equally fast ones the first. If none does, the fastest that
    fits the device; if none does, the smallest there.

    Args:
        beside: bytes that are there in every phase (data, workspace).
        phases: other phases' bytes beside the weights that must be there with them (reading a prompt, decoding).
        host_free: host memory for what waits there; None: not known.
    """
    plans = [replace(_plan(noise_experts, strategy, beside, free, asked, phases or {}), host_free=host_free) for strategy in strategies]
    fitting = [plan for plan in plans if plan.fits]
    fitting = [plan for plan in fitting if plan.fits_host] or fitting
    if fitting:
        return min(fitting, key=lambda plan: plan.strategy.seconds)
    return min(plans, key=lambda plan: plan.peak)


def _plan(
    noise_experts: Sequence[NoiseExpertBytes], strategy: Strategy, beside: int, free: int | None, asked: Asked, phases: Mapping[str, int]
) -> MemoryPlan:
    weights, adapters = resident(noise_experts, strategy.placement), sum(noise_expert.adapters for noise_expert in noise_experts)
    own = {"weights": weights - adapters, "adapters": adapters, "work": strategy.work, "beside": beside}
    working = sum(own.values())
    # In another phase a noise expert that is not kept for good has left.
    elsewhere = {name: size + beside + (weights if strategy.placement.both else adapters) for name, size in phases.items()}
    peak = max([working, *elsewhere.values()])
    host = 0 if strategy.placement.both and not strategy.placement.streamed else sum(noise_expert.weights for noise_expert in noise_experts)
    return MemoryPlan(strategy, peak, host, free, asked, own)


def placements(count: int, frozen_blocks: int, asked: Asked) -> list[Placement]:
    """What may be tried, the quickest first: both, one at a time, and more and more blocks streamed.

    Args:
        count: noise experts; of a single one there is no other to make room for.
        frozen_blocks: the first blocks, which nothing trains.
        asked: auto or GiB: all; both, one, stream: that.
    """
    streams = [Placement(False, n) for n in range(1, frozen_blocks + 1)]
    if asked == "both":
        return [Placement(True)]
    if asked == "one":
        return [Placement(False)]
    if asked == "stream":
        return streams[-1:] or [Placement(False)]
    return [Placement(True), *([Placement(False)]), *streams]


def free_of(free: int | None, asked: Asked) -> int | None:
    """What the plan may use: what is free, and no more than was asked for."""
    if not isinstance(asked, float):
        return free
    limit = int(asked * GIB)
    return limit if free is None else min(free, limit)
