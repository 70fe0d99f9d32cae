"""The choice of a memory strategy: each candidate's bytes and seconds, and the fastest one that fits.

    resident  Σ noise experts (or the largest, one at a time) of outer + resident blocks + slots of the block ring
    peak      resident + adapters + activations of the largest phase + fixed (workspace, data)
    step      max(prefix, streamed bytes / bus) + trained blocks (forward, recomputation, backward) + swap

Arithmetic only, no torch: sizes in, a plan out. `training` and `generation` list the candidates.
Units: bytes, seconds, flops.
How to add a strategy: a field of `Strategy` (or `Placement`), its bytes in `resident` or `_evaluate`, and its
candidates with their seconds in `training._Candidates` or `generation.plan_generation`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapwan.console import PlanRow, PlanTable
from lapwan.names import Checkpointing

GIB = 1 << 30
WORKSPACE = 96 << 20  # of cuBLAS and its like, taken from torch's allocator
SLACK, MARGIN = 0.08, 256 << 20  # a plan fits if predicted · 1.08 + 256 MiB is free: fragmentation
RING_SLOTS = 2  # blocks of a `BlockRing` on the device: one computes while the next is copied
Requested = str | float


@dataclass(frozen=True)
class NoiseExpertBytes:
    """The size of one noise expert: its blocks, the weights outside them, and its adapters with their gradients and
    optimizer state."""

    blocks: tuple[int, ...]
    outer: int
    adapters: int = 0

    @property
    def weights(self) -> int:
        """All base weights."""
        return self.outer + sum(self.blocks)

    def resident(self, streamed: int) -> int:
        """Base weights on the device while it runs, with its first `streamed` blocks in a ring."""
        ring = min(RING_SLOTS, streamed) * max(self.blocks[:streamed], default=0)
        return self.outer + sum(self.blocks[streamed:]) + ring


@dataclass(frozen=True)
class Placement:
    """Both noise experts on the device, or one at a time; the first `streamed` blocks in host memory."""

    both: bool
    streamed: int = 0


def resident(noise_experts: Sequence[NoiseExpertBytes], placement: Placement) -> int:
    """Base weights and adapters on the device while a noise expert runs. Adapters of both are never offloaded."""
    each = [noise_expert.resident(placement.streamed) for noise_expert in noise_experts]
    return (sum(each) if placement.both else max(each)) + sum(noise_expert.adapters for noise_expert in noise_experts)


@dataclass(frozen=True)
class Throughput:
    """Of a device: flops a second of matrix products in the compute dtype and in fp8, and of attention; bytes a second
    from host memory over the bus."""

    matmul: float
    matmul_fp8: float
    attention: float
    bus: float


@dataclass(frozen=True)
class Flops:
    """Of one pass: matrix products in the compute dtype, in fp8, and attention."""

    matmul: float = 0.0
    matmul_fp8: float = 0.0
    attention: float = 0.0

    def seconds(self, rates: Throughput) -> float:
        """The time it takes at a device's throughput."""
        return self.matmul / rates.matmul + self.matmul_fp8 / rates.matmul_fp8 + self.attention / rates.attention

    def times(self, factor: float) -> Flops:
        """Every count multiplied by `factor`."""
        return Flops(self.matmul * factor, self.matmul_fp8 * factor, self.attention * factor)


@dataclass(frozen=True)
class Strategy:
    """A candidate: where weights are, what is recomputed, how batches are split, and its cost.

    Args:
        activations: bytes beside weights and adapters at the peak of a step (gradients of activations included).
        seconds: predicted time of a step.
        whole_blocks: the first trained blocks, recomputed whole whatever `checkpointing` is for the others.
        micro_batch: clips at a time; 0: the whole batch.
        batched_guidance: both evaluations of classifier-free guidance as one batch.
    """

    placement: Placement
    activations: int
    seconds: float
    checkpointing: Checkpointing = "off"
    whole_blocks: int = 0
    micro_batch: int = 0
    batched_guidance: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """The chosen strategy, its predicted peak on the device, and the host memory it needs.

    Args:
        free: bytes the plan may use on the device; None where nothing was predicted.
        requested: the `memory` setting.
        parts: the predicted bytes of the main phase by what they are for.
    """

    strategy: Strategy
    peak: int
    host: int
    free: int | None
    requested: Requested
    parts: Mapping[str, int] = field(default_factory=dict)
    host_free: int | None = None

    @property
    def both(self) -> bool:
        """Whether no noise expert ever leaves the device."""
        return self.strategy.placement.both

    @property
    def streamed(self) -> range:
        """Indices of the streamed blocks."""
        return range(self.strategy.placement.streamed)

    @property
    def fits_host(self) -> bool:
        """Whether the host has memory for the offloaded weights."""
        return self.host_free is None or self.host <= self.host_free

    @property
    def host_summary(self) -> str:
        """The host memory it needs, as the end of a log line; empty if none."""
        if not self.host:
            return ""
        lacking = "" if self.fits_host or self.host_free is None else (
            f", WHICH HAS ONLY {self.host_free / GIB:.1f} GiB available")
        return f", {self.host / GIB:.1f} GiB of host memory{lacking}"

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is below the free memory, slack included."""
        return self.free is None or required_bytes(self.peak) <= self.free


def memory_table(plan: MemoryPlan, device: str) -> list[PlanTable]:
    """The predicted GiB on the device by what they are for, and on the host; nothing where none were predicted."""
    if not plan.parts:
        return []
    headings = ("GiB", *plan.parts, "predicted peak", "free")
    rows = [(device, *map(_gib, plan.parts.values()), _gib(plan.peak), _gib(plan.free))]
    if plan.host:
        rest = [""] * (len(plan.parts) - 1)
        rows.append(("host", _gib(plan.host), *rest, _gib(plan.host), _gib(plan.host_free)))
    if plan.free is None:  # of a dry run without a GPU
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    return [PlanTable(headings, tuple(rows))]


def memory_warnings(plan: MemoryPlan, device: str) -> list[PlanRow]:
    """What does not fit."""
    rows = []
    if not plan.fits and plan.free is not None:
        rows.append(PlanRow("warning", f"memory: this does not fit: with what is lost to fragmentation it takes "
                                       f"{_gib(required_bytes(plan.peak))} GiB of {device}, which has "
                                       f"{_gib(plan.free)} GiB free", warning=True))
    if not plan.fits_host and plan.host_free is not None:
        rows.append(PlanRow("warning", f"memory: the host needs {_gib(plan.host)} GiB and has only "
                                       f"{_gib(plan.host_free)} GiB available", warning=True))
    return rows


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / GIB:.2f}"


# Activation memory of compiled blocks relative to eager ones, by what is recomputed. Measured on an H200 with 5 and 40
# blocks at 256x256 and 480x832: operations fuse, and the compiled backward recomputes cheap ones. Evaluations take the
# same either way, since norms and residuals already run as fused kernels.
COMPILED_ACTIVATIONS: Mapping[Checkpointing, float] = {"off": 0.79, "op": 0.97, "block": 0.75}


# Time of a training step relative to that of its matrix products and attention, by whether it is compiled. Measured on
# an H200 with a LoRA. (An evaluation takes as long as its products and attention.)
STEP_OVERHEAD: Mapping[bool, float] = {False: 1.55, True: 1.25}
OP_OVERHEAD = 1.06  # time of trained blocks with cheap operations recomputed, relative to no recomputation


def available_host_memory() -> int | None:
    """MemAvailable of Linux in bytes; None elsewhere."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    return None if match is None else 1024 * int(match[1])


def required_bytes(peak: int) -> int:
    """What must be free for a predicted peak: 1.08 · peak + 256 MiB."""
    return int(peak * (1 + SLACK)) + MARGIN


def choose(
    noise_experts: Sequence[NoiseExpertBytes], strategies: Iterable[Strategy], fixed: int, free: int | None,
    requested: Requested, phases: Mapping[str, int] | None = None, host_free: int | None = None,
) -> MemoryPlan:
    """The fastest strategy that fits the device and the host; the first of equally fast ones.

    If none fits both, the fastest that fits the device. If none fits the device, the one with the smallest peak.

    Args:
        fixed: bytes present in every phase (workspace, idle gradients).
        phases: bytes beside the weights of other phases (encoding a prompt, decoding), by name.
        host_free: available host memory; None: unknown.
    """
    plans = [replace(_evaluate(noise_experts, strategy, fixed, free, requested, phases or {}), host_free=host_free)
             for strategy in strategies]
    fitting = [plan for plan in plans if plan.fits]
    fitting = [plan for plan in fitting if plan.fits_host] or fitting
    if fitting:
        return min(fitting, key=lambda plan: plan.strategy.seconds)
    return min(plans, key=lambda plan: plan.peak)


def _evaluate(
    noise_experts: Sequence[NoiseExpertBytes], strategy: Strategy, fixed: int, free: int | None,
    requested: Requested, phases: Mapping[str, int],
) -> MemoryPlan:
    both, streamed = strategy.placement.both, strategy.placement.streamed
    weights = resident(noise_experts, strategy.placement)
    adapters = sum(noise_expert.adapters for noise_expert in noise_experts)
    parts = {"weights": weights - adapters, "adapters": adapters, "activations": strategy.activations, "other": fixed}
    # In the other phases only adapters remain, unless both noise experts stay on the device.
    others = [size + fixed + (weights if both else adapters) for size in phases.values()]
    peak = max([sum(parts.values()), *others])
    host = 0 if both and not streamed else sum(noise_expert.weights for noise_expert in noise_experts)
    return MemoryPlan(strategy, peak, host, free, requested, parts)


def placements(frozen_blocks: int, requested: Requested) -> list[Placement]:
    """The placements to try, fastest first: both, one at a time, then more and more streamed blocks.

    Args:
        frozen_blocks: the first blocks, in which nothing is trained.
        requested: auto or GiB: all of them; both, one or stream: that one.
    """
    streams = [Placement(False, n) for n in range(1, frozen_blocks + 1)]
    if requested == "both":
        return [Placement(True)]
    if requested == "one":
        return [Placement(False)]
    if requested == "stream":
        return streams[-1:] or [Placement(False)]
    return [Placement(True), Placement(False), *streams]


def memory_budget(free: int | None, requested: Requested) -> int | None:
    """Bytes the plan may use: the free memory, capped at the GiB that were requested."""
    if not isinstance(requested, float):
        return free
    limit = int(requested * GIB)
    return limit if free is None else min(free, limit)
