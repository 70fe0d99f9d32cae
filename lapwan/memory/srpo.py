"""The memory plan of srpo: what alignment needs on a GPU, part by part, and the first strategy that fits.

The backward runs reward → VAE → transformer. At its peak these are alive at once:

    weights + training state + the transformer's graph + max(the rewards' graph, the VAE's activations)

Rollouts (with guidance in one batch) and evaluations of held-out prompts run without gradients, but may be larger than
the training samples: if one of them takes more than the graphs, it decides the peak.

The transformer's graph and the VAE's activations are traced: the real code runs on meta tensors (`memory.trace`). Sizes
are in bytes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lapwan.console import PlanPart, PlanRow, PlanTable
from lapwan.errors import UserError
from lapwan.files import cache_root, write_text
from lapwan.memory import trace
from lapwan.memory.cost import ClipShape, GroupShape, NoiseExpertShape
from lapwan.memory.plan import GIB
from lapwan.memory.trace import trace_memory
from lapwan.models.base import Base, target_ranks
from lapwan.models.configs import component_config
from lapwan.models.device import free_bytes, pick_dtype
from lapwan.models.spec import tensor_shapes, weight_files
from lapwan.names import NoiseExpert
from lapwan.rewards.base import RewardKinds, select_frames
from lapwan.rewards.build import reward_bytes
from lapwan.settings.memory import precision_of
from lapwan.settings.srpo import SrpoSettings
from lapwan.wan import vae as wan_vae
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.vae import decode_frames

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_GB = 10**9
_CONTEXT = 3 * GIB // 2  # CUDA's context, and fragmentation
GPUS = (24, 40, 80, 96, 141)  # GB


@dataclass(frozen=True)
class MemoryParts:
    """Bytes by what they are for. `graphs`: the transformer's, by whether activations are recomputed."""

    weights: Mapping[NoiseExpert, int]
    state: int
    models: int  # weights of rewards and VAE
    scoring: int  # the rewards' graph, or the VAE's activations if they are larger
    graphs: Mapping[bool, int]
    sampling: int = 0  # the largest of a rollout and an evaluation of held-out prompts

    def peak(self, both: bool, checkpointing: bool) -> int:
        """Peak bytes without CUDA's context."""
        weights = sum(self.weights.values()) if both else max(self.weights.values())
        return weights + self.state + self.models + max(self.scoring + self.graphs[checkpointing], self.sampling)

    def strategies(self, can_offload: bool) -> Iterator[tuple[bool, bool]]:
        """(both on the device, checkpointing), fastest first."""
        for checkpointing in (False, True):
            yield True, checkpointing
            if can_offload and len(self.weights) > 1:
                yield False, checkpointing


@dataclass(frozen=True)
class SrpoMemory:
    """The decision for this run, in one line and for a screen; `by_gpu`: the peak by size of GPU, where predicted."""

    both: bool
    checkpointing: bool
    peak: int
    line: str
    rows: tuple[PlanPart, ...]
    by_gpu: tuple[PlanTable, ...] = ()


def plan_srpo(
    settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert], loaded: Sequence[NoiseExpert],
    bucket: tuple[int, int, int], rewards: RewardKinds, device: torch.device, processes: int = 1,
    free: int | None = None, predict: bool = True,
) -> SrpoMemory:
    """Choose a strategy from the model's shapes and the free memory of the device.

    Args:
        noise_experts: the trained ones; `loaded`: all that take part.
        bucket: (frames, height, width) of the training samples.
        rewards: the kinds that the settings may name.
        free: bytes the run may use; None: what the device has free.
        predict: predict memory on a CPU too, where nothing depends on it (for `--dry-run`).

    Raises:
        UserError: no allowed strategy fits.
    """
    free = free_bytes(device) if free is None or device.type == "cpu" else free
    checkpointing = settings.activation_checkpointing is True
    both = settings.memory != "one" or len(loaded) < 2
    kept = "everything stays" if both else "one noise expert at a time, as asked,"
    row = PlanRow("memory", f"{kept} on {device}")
    if free is None and not predict:
        return SrpoMemory(both, checkpointing, 0, f"memory: {row.text}", (row,))
    dtype = pick_dtype(settings.dtype, _gpu(device))
    parts = parts_of(settings, base, noise_experts, loaded, bucket, rewards, dtype, processes)
    can_offload = settings.memory != "both" and settings.train == "lora"
    allowed = [strategy for strategy in parts.strategies(can_offload) if _allowed(settings, strategy, len(loaded))]
    table = _by_gpu(parts, allowed)
    if free is None:
        return SrpoMemory(both, checkpointing, parts.peak(both, checkpointing), f"memory: {row.text}", (row,), (table,))
    fitting = next((strategy for strategy in allowed if parts.peak(*strategy) + _CONTEXT <= free), None)
    if fitting is None:
        least = min(parts.peak(*strategy) for strategy in allowed)
        raise UserError(f"the run needs {_gib(least + _CONTEXT)} on {device}, which has {_gib(free)} free "
                        f"({_detail(parts)}); lower batch_size (now {settings.batch_size}) and raise accumulate, or "
                        f"lower size, num_frames or preference.frames{_hints(settings)}")
    peak = parts.peak(*fitting)
    line = f"memory: {_describe(parts, fitting)}: {_gib(peak)} of {_gib(free)} free ({_detail(parts)})"
    rows = (PlanRow("memory", f"{_describe(parts, fitting)} on {device}"), _parts_table(parts, fitting, device, free))
    return SrpoMemory(*fitting, peak, line, rows, (table,))


def _gpu(device: torch.device) -> torch.device:
    """The device to plan for: a GPU, even if this machine has none."""
    return device if device.type == "cuda" else torch.device("cuda")


def _allowed(settings: SrpoSettings, strategy: tuple[bool, bool], loaded: int) -> bool:
    both, checkpointing = strategy
    if loaded > 1 and settings.memory != "auto" and both != (settings.memory == "both") and settings.train == "lora":
        return False
    return settings.activation_checkpointing == "auto" or checkpointing == settings.activation_checkpointing


def _by_gpu(parts: MemoryParts, allowed: Sequence[tuple[bool, bool]]) -> PlanTable:
    """The predicted peak and strategy on GPUs of common sizes; neighbours with the same are one row."""
    sizes: dict[tuple[str, str], list[int]] = {}
    for size in GPUS:
        fitting = [strategy for strategy in allowed if parts.peak(*strategy) <= size * _GB - _CONTEXT]
        if fitting:
            cells = (_gib(parts.peak(*fitting[0])), _describe(parts, fitting[0]))
        else:
            least = min(allowed, key=lambda strategy: parts.peak(*strategy))
            cells = (_gib(parts.peak(*least)), f"does not fit, even with {_describe(parts, least)}")
        sizes.setdefault(cells, []).append(size)
    rows = tuple((f"{same[0]} GB" if len(same) == 1 else f"{same[0]} to {same[-1]} GB", *cells)
                 for cells, same in sizes.items())
    return PlanTable(("GPU", "predicted peak", "weights and activations"), rows)


def _parts_table(parts: MemoryParts, strategy: tuple[bool, bool], device: torch.device, free: int) -> PlanTable:
    """What the peak on the device is made of."""
    both, checkpointing = strategy
    weights = sum(parts.weights.values()) if both else max(parts.weights.values())
    step = parts.scoring + parts.graphs[checkpointing]
    work = ("scoring and activations", step) if step >= parts.sampling else ("sampling", parts.sampling)
    figures = {"weights": weights, "training state": parts.state, "rewards, VAE": parts.models, work[0]: work[1],
               "predicted peak": parts.peak(*strategy), "free": free}
    return PlanTable(("GiB", *figures), ((str(device), *(f"{size / GIB:.2f}" for size in figures.values())),))


def _describe(parts: MemoryParts, strategy: tuple[bool, bool]) -> str:
    both, checkpointing = strategy
    if len(parts.weights) < 2:
        kept = "one noise expert"
    else:
        kept = "both noise experts on the device" if both else "the idle noise expert offloaded to host memory"
    return f"{kept}, activations {'recomputed' if checkpointing else 'kept'}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _detail(parts: MemoryParts) -> str:
    weights = " + ".join(f"{size / GIB:.1f}" for size in parts.weights.values())
    return (f"weights {weights}, training state {parts.state / GIB:.1f}, rewards and VAE {parts.models / GIB:.1f}, "
            f"scoring {parts.scoring / GIB:.1f}, activations {parts.graphs[False] / GIB:.1f} kept or "
            f"{parts.graphs[True] / GIB:.1f} recomputed, or sampling {parts.sampling / GIB:.1f}")


def _hints(settings: SrpoSettings) -> str:
    hints = []
    if settings.train == "full" and not settings.optimizer_on_cpu:
        hints.append("set optimizer_on_cpu = true")
    if settings.train == "full" and settings.master_weights == "fp32":
        hints.append("set master_weights = \"bf16\"")
    if settings.train == "full":
        hints.append("train = \"lora\", or start with accelerate launch on several GPUs")
    if settings.train == "lora" and precision_of(settings.dtype) is None:
        hints.append("set dtype = \"nf4\" (or fp8, int8)")
    if settings.memory == "both":
        hints.append("set memory = \"auto\"")
    if settings.activation_checkpointing is False:
        hints.append("set activation_checkpointing = \"auto\"")
    return "".join(f", or {hint}" for hint in hints)


def parts_of(
    settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert], loaded: Sequence[NoiseExpert],
    bucket: tuple[int, int, int], kinds: RewardKinds, dtype: torch.dtype, processes: int = 1,
) -> MemoryParts:
    """The plan's sizes for transformers in `dtype`. A full fine-tune is sharded over `processes`."""
    spec = base.spec
    recipe = frozen_recipe(settings)
    weights = {e: NoiseExpertShape(spec, e, dtype, recipe).bytes().weights for e in loaded}
    state = int(_trained_parameters(settings, base, noise_experts) * state_bytes(settings, dtype))
    if settings.train == "full" and processes > 1:
        weights, state = {e: size // processes for e, size in weights.items()}, state // processes
    frames, height, width = bucket
    scored = select_frames(frames, settings.preference.frames)
    rewards = reward_bytes(settings.rewards, "cuda", 0, kinds)
    graph = reward_bytes(settings.rewards, "cuda", settings.batch_size * len(scored), kinds) - rewards
    vae, activations = vae_bytes(spec.path / "vae", getattr(torch, settings.vae_dtype), settings.batch_size,
                                 spec.latent_shape(*bucket), tuple(scored))
    clip = ClipShape(settings.batch_size, frames, height, width)
    shape = NoiseExpertShape(spec, noise_experts[0], dtype, recipe, [GroupShape(_ranks(settings, base), True)])
    step = shape.step_memory(clip, ["off", "block"])
    forward = shape.forward_memory(clip)  # which may take more: on a GPU it runs other kernels
    graphs = {recomputed: max(step.peak("block" if recomputed else "off"), forward) for recomputed in (False, True)}
    return MemoryParts(weights, state, rewards + vae, max(graph, activations), graphs,
                       sampling_bytes(settings, base, noise_experts[0], bucket, dtype))


def sampling_bytes(
    settings: SrpoSettings, base: Base, noise_expert: NoiseExpert, bucket: tuple[int, int, int], dtype: torch.dtype
) -> int:
    """Peak bytes of a rollout or an evaluation of held-out prompts beside the weights; no gradients."""
    spec, held_out, rollout = base.spec, settings.held_out, settings.rollout
    adapters = [GroupShape(_ranks(settings, base), True)]
    shape = NoiseExpertShape(spec, noise_expert, dtype, frozen_recipe(settings), adapters)

    def evaluation(size: tuple[int, int, int], guidance: float) -> int:
        return shape.forward_memory(ClipShape(settings.batch_size * (2 if guidance > 1 else 1), *size))

    peaks = [] if rollout.offline else [evaluation(bucket, rollout.guidance)]
    if held_out.count:
        shown = (held_out.num_frames or bucket[0], *(held_out.size or bucket[1:]))
        peaks.append(evaluation(shown, held_out.guidance or rollout.guidance))
        if shown != (1, *bucket[1:]):  # decoding one frame of the training size takes less than with its gradient
            peaks.append(decoding_bytes(spec.path / "vae", getattr(torch, settings.vae_dtype),
                                        spec.latent_shape(*shown)))
    return max(peaks, default=0)


def frozen_recipe(settings: SrpoSettings) -> Recipe | None:
    """How a LoRA's frozen base is quantised, the same for all blocks; None for a plain dtype."""
    precision = precision_of(settings.dtype)
    return None if precision is None else Recipe(precision)


def _ranks(settings: SrpoSettings, base: Base) -> dict[str, int]:
    """Rank by module. 1 everywhere for a full fine-tune, whose gradients need the same activations."""
    if settings.train == "lora":
        return target_ranks(settings.targets, base.num_layers)
    names = tensor_shapes(weight_files(base.spec.component(base.spec.noise_experts[0])))
    return {name.removesuffix(".weight"): 1 for name, shape in names.items()
            if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2}


def state_bytes(settings: SrpoSettings, dtype: torch.dtype) -> int:
    """Bytes on the device per trained parameter: gradient, fp32 copy, moments, EMA.

    A full fine-tune's weights are not included. LoRA parameters are, as fp32 (or bf16 masters); their gradients
    count as the transformer's activations.
    """
    bf16, full = settings.master_weights == "bf16", settings.train == "full"
    base = dtype.itemsize if full else (2 if bf16 else 4)  # full: the gradient; LoRA: the parameter
    copy = 0 if bf16 or not full or dtype == torch.float32 else 4
    moments = 2 * (2 if bf16 else 4)
    ema = 0 if settings.ema_decay is None else 4
    return base + ema + (0 if settings.optimizer_on_cpu else copy + moments)


def _trained_parameters(settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert]) -> int:
    """How many parameters are trained."""
    shapes = {e: tensor_shapes(weight_files(base.spec.component(e))) for e in noise_experts}
    if settings.train == "full":
        return sum(math.prod(s) for tensors in shapes.values() for s in tensors.values())
    ranks = target_ranks(settings.targets, base.num_layers)
    return sum(rank * sum(tensors[f"{path}.weight"]) for tensors in shapes.values() for path, rank in ranks.items())


def vae_bytes(
    folder: Path, dtype: torch.dtype, batch: int, latent_shape: tuple[int, int, int, int], frames: tuple[int, ...]
) -> tuple[int, int]:
    """(the VAE's weights, activations of decoding the scored frames with gradient)."""

    def traced() -> list[int]:
        vae = _empty_vae(folder, dtype)
        with torch.device("meta"):
            latents = torch.empty(batch, *latent_shape, requires_grad=True)

            def decode_and_backward() -> None:
                torch.autograd.backward(decode_frames(vae, latents, frames).square().mean())

            return [sum(p.nbytes for p in vae.parameters()), trace_memory(decode_and_backward).peak]

    weights, activations = _remembered(
        traced, "with gradient", component_config(folder), dtype, batch, latent_shape, frames)
    return weights, activations


def decoding_bytes(folder: Path, dtype: torch.dtype, latent_shape: tuple[int, int, int, int]) -> int:
    """Activations of decoding all frames of one clip, without gradients."""

    def traced() -> list[int]:
        vae = _empty_vae(folder, dtype)
        frames = (latent_shape[1] - 1) * vae.config.scale_factor_temporal + 1
        with torch.device("meta"), torch.no_grad():
            latents = torch.empty(1, *latent_shape)
            return [trace_memory(lambda: decode_frames(vae, latents, range(frames))).peak]

    return _remembered(traced, "all frames", component_config(folder), dtype, latent_shape)[0]


def _empty_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(component_config(folder)).requires_grad_(False).eval()
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
    return vae


def _remembered(compute: Callable[[], list[int]], *key: Any) -> list[int]:
    """The numbers that `compute` returns, from the file that an earlier call wrote if there is one.

    Args:
        key: what they depend on, besides the code they are traced through.
    """
    versions = (torch.__version__, metadata.version("diffusers"))
    sources = [inspect.getsource(module) for module in (trace, wan_vae)]
    digest = hashlib.sha256(repr((key, versions, sources)).encode()).hexdigest()[:24]
    file = cache_root() / "memory" / f"{digest}.json"
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(sizes, list) and all(type(size) is int for size in sizes):
            return sizes
    except (OSError, ValueError):
        pass  # not there, or unreadable
    sizes = compute()
    with suppress(OSError):  # the file only saves the next plan time
        write_text(file, json.dumps(sizes))
    return sizes
