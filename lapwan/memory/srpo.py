"""What preference alignment needs of a GPU's memory, part by part, and which measures make it fit.

The backward pass runs reward → VAE → transformer. While it does, this is there at once:

    weights + training state + the transformer's graph + max(the rewards' graph, the VAE's work)

Without gradients are rollouts, with guidance on both sides at once, and looks at held-out prompts, which may be larger
than what is trained: where one of them takes more than the graphs, it takes their place.

The transformer's graph and the VAE's work are not guessed: the code itself runs on tensors without values, and what is
alive at once is added up (`wan.simulate`). All in bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from lapwan.errors import UserError
from lapwan.memory.generation import free_bytes
from lapwan.memory.shapes import ClipShape, GroupShape, NoiseExpertShape
from lapwan.memory.trace import measure
from lapwan.models.base import Base, targets_of
from lapwan.models.device import pick_dtype
from lapwan.models.spec import read_spec, tensor_shapes, weight_files
from lapwan.names import NoiseExpert
from lapwan.rewards.build import reward_bytes
from lapwan.settings.memory import precision_of
from lapwan.settings.srpo import SrpoSettings
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.vae_gradient import decode_frames, frame_choice

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_GIB, _GB = 1 << 30, 10**9
_CONTEXT = 3 * _GIB // 2  # what CUDA itself takes, and fragmentation
GPUS = (24, 40, 80, 96, 141)  # GB


@dataclass(frozen=True)
class MemoryParts:
    """Bytes by what they are for; `graphs` of the transformer, activations kept and recomputed."""

    weights: Mapping[NoiseExpert, int]
    state: int
    models: int  # rewards and VAE themselves
    judging: int  # the rewards' graph, or the VAE's work where that is more
    graphs: Mapping[bool, int]
    sampling: int = 0  # the most that a rollout or a look at held-out prompts takes

    def peak(self, both: bool, checkpointing: bool) -> int:
        """The most that is there at once, without CUDA's own."""
        weights = sum(self.weights.values()) if both else max(self.weights.values())
        return weights + self.state + self.models + max(self.judging + self.graphs[checkpointing], self.sampling)

    def measures(self, movable: bool) -> Iterator[tuple[bool, bool]]:
        """(both on the device, checkpointing), what costs least first."""
        for checkpointing in (False, True):
            yield True, checkpointing
            if movable and len(self.weights) > 1:
                yield False, checkpointing


@dataclass(frozen=True)
class SrpoMemory:
    """The decision for this run and the lines that say why; `peak` is in bytes."""

    both: bool
    checkpointing: bool
    peak: int
    line: str
    table: tuple[str, ...]


def plan_memory(
    settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert], loaded: Sequence[NoiseExpert],
    bucket: tuple[int, int, int], device: torch.device, processes: int = 1, free: int | None = None,
) -> SrpoMemory:
    """Decide from shapes and from what the device has free.

    Args:
        experts: the trained noise experts; `loaded`: all that take part.
        bucket: (frames, height, width) of what is trained.
        free: bytes to make do with; absent: what the device has.

    Raises:
        UserError: not even with every measure does it fit.
    """
    parts = parts_of(settings, base, noise_experts, loaded, bucket, pick_dtype(settings.dtype, _gpu(device)), processes)
    movable = settings.memory != "both" and settings.train == "lora"
    free = free_bytes(device) if free is None or device.type == "cpu" else free
    allowed = [strategy for strategy in parts.measures(movable) if _asked(settings, strategy, len(loaded))]
    table = tuple(_row(size, parts, allowed) for size in GPUS)
    if free is None:
        checkpointing = settings.activation_checkpointing is True
        both = settings.memory != "one" or len(loaded) < 2
        kept = "everything stays" if both else "one noise expert at a time, as asked,"
        return SrpoMemory(both, checkpointing, parts.peak(both, checkpointing), f"memory: {kept} on {device}", table)
    fitting = next((strategy for strategy in allowed if parts.peak(*strategy) + _CONTEXT <= free), None)
    if fitting is None:
        least = min(parts.peak(*strategy) for strategy in allowed)
        raise UserError(f"the run needs {_show(least + _CONTEXT)} on {device}, which has {_show(free)} free "
                        f"({_detail(parts)}); lower batch_size (now {settings.batch_size}) for accumulate, or size, "
                        f"num_frames, preference.frames{_hints(settings)}")
    peak = parts.peak(*fitting)
    line = f"memory: {_strategy(parts, fitting)}: {_show(peak)} of {_show(free)} free ({_detail(parts)})"
    return SrpoMemory(*fitting, peak, line, table)


def _gpu(device: torch.device) -> torch.device:
    """The plan is of a GPU, also where this machine has none."""
    return device if device.type == "cuda" else torch.device("cuda")


def _asked(settings: SrpoSettings, strategy: tuple[bool, bool], loaded: int) -> bool:
    both, checkpointing = strategy
    if loaded > 1 and settings.memory != "auto" and both != (settings.memory == "both") and settings.train == "lora":
        return False
    return settings.activation_checkpointing == "auto" or checkpointing == settings.activation_checkpointing


def _row(size: int, parts: MemoryParts, allowed: Sequence[tuple[bool, bool]]) -> str:
    room = size * _GB - _CONTEXT
    for strategy in allowed:
        if parts.peak(*strategy) <= room:
            return f"  {size:>3} GB: {_show(parts.peak(*strategy))}, {_strategy(parts, strategy)}"
    least = min(allowed, key=lambda strategy: parts.peak(*strategy))
    return f"  {size:>3} GB: does not fit, needs {_show(parts.peak(*least) + _CONTEXT)} with {_strategy(parts, least)}"


def _strategy(parts: MemoryParts, strategy: tuple[bool, bool]) -> str:
    both, checkpointing = strategy
    if len(parts.weights) < 2:
        kept = "one noise expert"
    else:
        kept = "both noise experts on the device" if both else "the idle noise expert parked in host memory"
    return f"{kept}, activations {'recomputed' if checkpointing else 'kept'}"


def _show(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _detail(parts: MemoryParts) -> str:
    weights = " + ".join(f"{size / _GIB:.1f}" for size in parts.weights.values())
    return (f"weights {weights}, training state {parts.state / _GIB:.1f}, rewards and VAE {parts.models / _GIB:.1f}, "
            f"judging {parts.judging / _GIB:.1f}, activations {parts.graphs[False] / _GIB:.1f} kept or "
            f"{parts.graphs[True] / _GIB:.1f} recomputed, or sampling {parts.sampling / _GIB:.1f}")


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
    bucket: tuple[int, int, int], dtype: torch.dtype, processes: int = 1,
) -> MemoryParts:
    """The plan's numbers for transformers in `dtype`; a full fine-tune's weights and state are split on `processes`."""
    spec = base.spec
    recipe = recipe_of(settings)
    weights = {e: NoiseExpertShape(spec, e, dtype, recipe).bytes().weights for e in loaded}
    state = int(_numbers(settings, base, noise_experts) * state_bytes(settings, dtype))
    if settings.train == "full" and processes > 1:
        weights, state = {e: size // processes for e, size in weights.items()}, state // processes
    frames, height, width = bucket
    wanted = frame_choice(frames, settings.preference.frames)
    rewards = reward_bytes(settings.rewards, "cuda", 0)
    graph = reward_bytes(settings.rewards, "cuda", settings.batch_size * len(wanted)) - rewards
    vae, work = vae_bytes(spec.path / "vae", getattr(torch, settings.vae_dtype), settings.batch_size,
                          spec.latent_shape(*bucket), tuple(wanted))
    clip = ClipShape(settings.batch_size, frames, height, width)
    ranks = _ranks(settings, base)
    graphs = {kept: transformer_bytes(spec.path, noise_experts[0], dtype, recipe, ranks, clip, kept)
              for kept in (False, True)}
    return MemoryParts(weights, state, rewards + vae, max(graph, work), graphs,
                 sampling_bytes(settings, base, noise_experts[0], bucket, dtype))


def sampling_bytes(
    settings: SrpoSettings, base: Base, noise_expert: NoiseExpert, bucket: tuple[int, int, int], dtype: torch.dtype
) -> int:
    """The most that rollouts and looks at held-out prompts take beside what stays; no gradients."""
    spec, held, own = base.spec, settings.held_out, settings.rollout
    shape = NoiseExpertShape(spec, noise_expert, dtype, recipe_of(settings), [GroupShape(dict(_ranks(settings, base)), True)])

    def evaluation(of: tuple[int, int, int], guidance: float) -> int:
        return shape.forward_work(ClipShape(settings.batch_size * (2 if guidance > 1 else 1), *of))

    found = [] if own.offline else [evaluation(bucket, own.guidance)]
    if held.count:
        shown = (held.num_frames or bucket[0], *(held.size or bucket[1:]))
        found.append(evaluation(shown, held.guidance or own.guidance))
        if shown != (1, *bucket[1:]):  # a still of the trained size is less than the same with its gradient
            found.append(decoding_bytes(spec.path / "vae", getattr(torch, settings.vae_dtype),
                                        spec.latent_shape(*shown)))
    return max(found, default=0)


def recipe_of(settings: SrpoSettings) -> Recipe | None:
    """How a LoRA's frozen base is quantised, all its blocks alike; None for a plain dtype."""
    precision = precision_of(settings.dtype)
    return None if precision is None else Recipe(precision)


def _ranks(settings: SrpoSettings, base: Base) -> tuple[tuple[str, int], ...]:
    """Rank by module; of a full fine-tune 1 everywhere: what its weights' gradients keep is what such a LoRA keeps."""
    if settings.train == "lora":
        return tuple(sorted(targets_of(settings.targets, base.num_layers).items()))
    names = tensor_shapes(weight_files(base.spec.component(base.spec.noise_experts[0])))
    return tuple((n.removesuffix(".weight"), 1) for n, shape in sorted(names.items())
                 if n.startswith("blocks.") and n.endswith(".weight") and len(shape) == 2)


@lru_cache(maxsize=32)
def transformer_bytes(
    folder: Path, noise_expert: NoiseExpert, dtype: torch.dtype, recipe: Recipe | None, ranks: tuple[tuple[str, int], ...],
    clip: ClipShape, checkpointing: bool,
) -> int:
    """What a forward with gradient and its backward take beside the weights, or an evaluation of a rollout if more."""
    kind: Literal["block", "off"] = "block" if checkpointing else "off"
    shape = NoiseExpertShape(read_spec(folder), noise_expert, dtype, recipe, [GroupShape(dict(ranks), True)])
    return max(shape.training_work(clip, kind).total, shape.forward_work(clip))


def state_bytes(settings: SrpoSettings, dtype: torch.dtype) -> int:
    """Bytes a trained number on the device, besides a full fine-tune's own weights: gradient, copies, moments, mean.

    LoRA numbers are fp32 (or bf16 masters) and counted whole, without the gradient, which the transformer's work has.
    """
    bf16, full = settings.master_weights == "bf16", settings.train == "full"
    own = dtype.itemsize if full else (2 if bf16 else 4)  # full: the gradient
    copy = 0 if bf16 or not full or dtype == torch.float32 else 4
    moments = 2 * (2 if bf16 else 4)
    mean = 0 if settings.ema_decay is None else 4
    return own + mean + (0 if settings.optimizer_on_cpu else copy + moments)


def _numbers(settings: SrpoSettings, base: Base, noise_experts: Sequence[NoiseExpert]) -> int:
    """Numbers that are trained."""
    shapes = {e: tensor_shapes(weight_files(base.spec.component(e))) for e in noise_experts}
    if settings.train == "full":
        return sum(math.prod(s) for own in shapes.values() for s in own.values())
    ranks = targets_of(settings.targets, base.num_layers)
    return sum(rank * sum(own[f"{path}.weight"]) for own in shapes.values() for path, rank in ranks.items())


@lru_cache(maxsize=16)
def vae_bytes(
    folder: Path, dtype: torch.dtype, batch: int, latent_shape: tuple[int, int, int, int], wanted: tuple[int, ...]
) -> tuple[int, int]:
    """(the VAE's weights, what decoding the judged frames with their gradient takes beside them)."""
    vae = _empty_vae(folder, dtype)
    with torch.device("meta"):
        latents = torch.empty(batch, *latent_shape, requires_grad=True)
        work = measure(lambda: torch.autograd.backward(decode_frames(vae, latents, wanted).square().mean())).peak
    return sum(p.nbytes for p in vae.parameters()), work


@lru_cache(maxsize=16)
def decoding_bytes(folder: Path, dtype: torch.dtype, latent_shape: tuple[int, int, int, int]) -> int:
    """What decoding all frames of one clip takes beside the VAE's weights, without gradients."""
    vae = _empty_vae(folder, dtype)
    frames = (latent_shape[1] - 1) * vae.config.scale_factor_temporal + 1
    with torch.device("meta"), torch.no_grad():
        latents = torch.empty(1, *latent_shape)
        return measure(lambda: decode_frames(vae, latents, range(frames))).peak


def _empty_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config).requires_grad_(False).eval()
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(dtype)
    return vae
