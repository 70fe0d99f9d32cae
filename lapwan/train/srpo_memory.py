"""What preference alignment needs of a GPU's memory, part by part, and which measures make it fit.

The backward pass runs reward → VAE → transformer, and while it does, all of this is there at once:

    weights + training state + rewards (weights, graph) + VAE (weights, one frame's graph) + the transformer's graph

The VAE's graph is counted, not guessed: its decoder runs once without data, and what autograd would keep is added up.
The transformer's is `parking`'s figure a token and block. All in bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.names import NoiseExpert, split_block
from lapwan.rewards.build import reward_bytes
from lapwan.sampling.memory import forward_bytes, free_bytes, weight_bytes
from lapwan.settings.srpo import SrpoSettings
from lapwan.train.build import targets_of
from lapwan.wan.base import Base
from lapwan.wan.device import pick_dtype
from lapwan.wan.folder import tensor_shapes, weight_files
from lapwan.wan.vae_gradient import frame_choice

_GIB, _GB = 1 << 30, 10**9
_PLAIN, _CHECKPOINTED = 53, 2  # bytes a token and unit of width that a block's graph keeps, in bf16
_CONTEXT = 3 * _GIB // 2  # what CUDA itself takes, and fragmentation
GPUS = (24, 40, 80, 96, 141)  # GB


@dataclass(frozen=True)
class Parts:
    """Bytes by what they are for. `moved` are the weights of noise experts that can wait in host memory."""

    weights: Mapping[NoiseExpert, int]
    trained: frozenset[NoiseExpert]
    state: int
    rewards: int
    vae: int
    graph: int
    recomputed: int  # one block's graph, there at once where the others are recomputed
    graph_checkpointed: int

    def peak(self, both: bool, checkpointing: bool) -> int:
        """The most that is there at once, without CUDA's own."""
        weights = sum(self.weights.values()) if both else max(self.weights.values())
        graph = self.graph_checkpointed + self.recomputed if checkpointing else self.graph
        return weights + self.state + self.rewards + self.vae + graph

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
    settings: SrpoSettings, base: Base, experts: Sequence[NoiseExpert], loaded: Sequence[NoiseExpert],
    bucket: tuple[int, int, int], device: torch.device, processes: int = 1,
) -> SrpoMemory:
    """Decide from shapes and from what the device has free.

    Args:
        experts: the trained noise experts; `loaded`: all that take part.
        bucket: (frames, height, width) of what is trained.

    Raises:
        UserError: not even with every measure does it fit.
    """
    parts = parts_of(settings, base, experts, loaded, bucket, pick_dtype(settings.dtype, _gpu(device)), processes)
    movable = settings.memory != "both" and settings.train == "lora"
    free = free_bytes(device)
    allowed = [way for way in parts.measures(movable) if _asked(settings, way, len(loaded))]
    table = tuple(_row(size, parts, allowed) for size in GPUS)
    if free is None:
        checkpointing = settings.activation_checkpointing is True
        return SrpoMemory(True, checkpointing, parts.peak(True, checkpointing),
                          f"memory: everything stays on {device}", table)
    fitting = next((way for way in allowed if parts.peak(*way) + _CONTEXT <= free), None)
    if fitting is None:
        least = min(parts.peak(*way) for way in allowed)
        raise UserError(f"the run needs {_show(least + _CONTEXT)} on {device}, which has {_show(free)} free "
                        f"({_detail(parts)}); lower batch_size (now {settings.batch_size}) for accumulate, or size, "
                        f"num_frames, preference.frames{_hints(settings)}")
    peak = parts.peak(*fitting)
    line = f"memory: {_way(parts, fitting)}: {_show(peak)} of {_show(free)} free ({_detail(parts)})"
    return SrpoMemory(*fitting, peak, line, table)


def _gpu(device: torch.device) -> torch.device:
    """The plan is of a GPU, also where this machine has none."""
    return device if device.type == "cuda" else torch.device("cuda")


def _asked(settings: SrpoSettings, way: tuple[bool, bool], loaded: int) -> bool:
    both, checkpointing = way
    if loaded > 1 and settings.memory != "auto" and both != (settings.memory == "both") and settings.train == "lora":
        return False
    return settings.activation_checkpointing == "auto" or checkpointing == settings.activation_checkpointing


def _row(size: int, parts: Parts, allowed: Sequence[tuple[bool, bool]]) -> str:
    room = size * _GB - _CONTEXT
    for way in allowed:
        if parts.peak(*way) <= room:
            return f"  {size:>3} GB: {_show(parts.peak(*way))}, {_way(parts, way)}"
    least = min(allowed, key=lambda way: parts.peak(*way))
    return f"  {size:>3} GB: does not fit, needs {_show(parts.peak(*least) + _CONTEXT)} with {_way(parts, least)}"


def _way(parts: Parts, way: tuple[bool, bool]) -> str:
    both, checkpointing = way
    if len(parts.weights) < 2:
        kept = "one noise expert"
    else:
        kept = "both noise experts on the device" if both else "the idle noise expert parked in host memory"
    return f"{kept}, activations {'recomputed' if checkpointing else 'kept'}"


def _show(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _detail(parts: Parts) -> str:
    weights = " + ".join(f"{size / _GIB:.1f}" for size in parts.weights.values())
    return (f"weights {weights}, training state {parts.state / _GIB:.1f}, rewards {parts.rewards / _GIB:.1f}, VAE "
            f"{parts.vae / _GIB:.1f}, activations {parts.graph / _GIB:.1f} kept or "
            f"{(parts.graph_checkpointed + parts.recomputed) / _GIB:.1f} recomputed")


def _hints(settings: SrpoSettings) -> str:
    hints = []
    if settings.train == "full" and not settings.optimiser_on_cpu:
        hints.append("set optimiser_on_cpu = true")
    if settings.train == "full" and settings.master_weights == "fp32":
        hints.append("set master_weights = \"bf16\"")
    if settings.train == "full":
        hints.append("train = \"lora\", or start with accelerate launch on several GPUs")
    if settings.memory == "both":
        hints.append("set memory = \"auto\"")
    if settings.activation_checkpointing is False:
        hints.append("set activation_checkpointing = \"auto\"")
    return "".join(f", or {hint}" for hint in hints)


def parts_of(
    settings: SrpoSettings, base: Base, experts: Sequence[NoiseExpert], loaded: Sequence[NoiseExpert],
    bucket: tuple[int, int, int], dtype: torch.dtype, processes: int = 1,
) -> Parts:
    """The plan's numbers for transformers in `dtype`; a full fine-tune's weights and state are split on `processes`."""
    spec = base.spec
    weights = {e: weight_bytes(spec, e, dtype) for e in loaded}
    numbers, blocks = _trained(settings, base, experts)
    state = int(numbers * state_bytes(settings, dtype))
    if settings.train == "full" and processes > 1:
        weights, state = {e: size // processes for e, size in weights.items()}, state // processes
    frames, height, width = bucket
    wanted = frame_choice(frames, settings.preference.frames)
    rewards = reward_bytes(settings.rewards, "cuda", settings.batch_size * len(wanted))
    vae = vae_bytes(spec.path / "vae", getattr(torch, settings.vae_dtype), settings.batch_size,
                    spec.latent_shape(*bucket), tuple(wanted))
    inner = tensor_shapes(weight_files(spec.component(spec.experts[0])))["patch_embedding.weight"][0]
    _, t, h, w = spec.latent_shape(*bucket)
    patch = spec.pixel_multiple // spec.spatial_stride
    unit = settings.batch_size * t * (h // patch) * (w // patch) * inner * dtype.itemsize // 2
    rollout = 0 if settings.rollout.offline else forward_bytes(spec, dtype, frames, (height, width)) - _GIB
    graph = max(blocks * _PLAIN * unit, rollout)
    return Parts(weights, frozenset(experts), state, rewards, vae, graph, _PLAIN * unit,
                 max(blocks * _CHECKPOINTED * unit, rollout))


def state_bytes(settings: SrpoSettings, dtype: torch.dtype) -> int:
    """Bytes a trained number on the device, besides a full fine-tune's own weights: gradient, copies, moments, mean.

    LoRA numbers are fp32 (or bf16 masters) and counted whole; they are not among the model's weights.
    """
    bf16, full = settings.master_weights == "bf16", settings.train == "full"
    own = 0 if full else (2 if bf16 else 4)
    gradient = dtype.itemsize if full else (2 if bf16 else 4)
    copy = 0 if bf16 or not full or dtype == torch.float32 else 4
    moments = 2 * (2 if bf16 else 4)
    mean = 0 if settings.ema_decay is None else 4
    return own + gradient + mean + (0 if settings.optimiser_on_cpu else copy + moments)


def _trained(settings: SrpoSettings, base: Base, experts: Sequence[NoiseExpert]) -> tuple[int, int]:
    """(numbers that are trained, blocks from the first trained one on)."""
    shapes = {e: tensor_shapes(weight_files(base.spec.component(e))) for e in experts}
    if settings.train == "full":
        return sum(math.prod(s) for own in shapes.values() for s in own.values()), base.num_layers
    ranks = targets_of(settings.targets, base.num_layers)
    first = min((place[0] for path in ranks if (place := split_block(path))), default=0)
    numbers = sum(rank * sum(own[f"{path}.weight"]) for own in shapes.values() for path, rank in ranks.items())
    return numbers, base.num_layers - first


def saved_bytes(run: Callable[[], Tensor]) -> tuple[int, int]:
    """(bytes autograd keeps of a forward, the largest tensor's), each storage once, from a run without data."""
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    sizes = [storage.nbytes() for storage in storages.values()]
    return sum(sizes), max(sizes, default=0)


@lru_cache(maxsize=16)
def vae_bytes(
    folder: Path, dtype: torch.dtype, batch: int, latent_shape: tuple[int, int, int, int], wanted: tuple[int, ...]
) -> int:
    """The VAE's weights, and the graph of decoding one latent frame with what its neighbours left in its caches."""
    from diffusers import AutoencoderKLWan

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config).to(dtype).requires_grad_(False)
        channels, _, height, width = latent_shape
        one = torch.empty(batch, channels, 1, height, width, dtype=dtype, requires_grad=True)
    if list(wanted) == [0]:
        kept, largest = saved_bytes(lambda: vae.decoder(vae.post_quant_conv(one), first_chunk=True))
        caches = 0
    else:
        cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        for _ in range(2):  # the second frame's convolutions have caches, and its pictures are four
            vae.decoder(one.detach(), feat_cache=cache, feat_idx=[0], first_chunk=cache[0] is None)
        kept, largest = saved_bytes(
            lambda: vae.decoder(vae.post_quant_conv(one), feat_cache=list(cache), feat_idx=[0]))
        latent_frames = -(-wanted[-1] // vae.config.scale_factor_temporal) + 1
        caches = latent_frames * sum(c.nbytes for c in cache if isinstance(c, Tensor))
    weights = sum(p.nbytes for p in vae.parameters())
    return weights + kept + caches + 3 * largest  # gradients of a layer's input, output and convolution workspace

