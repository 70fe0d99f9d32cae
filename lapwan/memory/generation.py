"""The memory plan of a generation: what stays on the device while it encodes prompts, samples and decodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lapwan.checkpoints.weights import read_weights
from lapwan.console import PlanPart, PlanRow, duration_text
from lapwan.lora.attach import Group
from lapwan.memory.cost import ClipShape, GroupShape, NoiseExpertShape
from lapwan.memory.plan import (
    RING_SLOTS,
    WORKSPACE,
    MemoryPlan,
    Strategy,
    Throughput,
    choose,
    memory_budget,
    memory_table,
    memory_warnings,
    placements,
)
from lapwan.models.configs import component_config
from lapwan.models.original_layout import t5_to_transformers, tensor_infos
from lapwan.models.spec import ModelSpec, component_files, original_file, weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.quantise.linears import LINEAR_CLASSES
from lapwan.wan.quantise.load import Recipe

Memory = Literal["auto", "both", "one", "stream"] | float

# The VAE decodes frame by frame. Bytes per pixel of one frame, at this width of the decoder. Wan2.1's: measured on an
# H200 in fp32, 1.0 GiB at 256x256 and 4.7 at 480x832. Wan2.2's (residual, patches of 2x2 pixels): traced at the same
# sizes and scaled by what Wan2.1's took relative to its trace.
_DECODED_BYTES, _DECODER_WIDTH = 12_600, 96
_DECODED_BYTES_RESIDUAL, _DECODER_WIDTH_RESIDUAL = 14_000, 256
_TEXT_ROWS = 128  # text tokens whose keys and values are cached: Wan's negative prompt has 126


def _text_encoder_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes in memory of each tensor, from headers."""
    tensors = (item for file in component_files(folder) for item in tensor_infos(file).items())
    return {t5_to_transformers(name): info for name, info in tensors}


def text_encoder_bytes(spec: ModelSpec, precision: Precision | None = None, streamed: bool = False) -> int:
    """The text encoder on the device; `streamed`: its weights outside the blocks and the slots of the ring."""
    outer, blocks = 0, dict[str, int]()
    for name, (shape, size) in _text_encoder_tensors(spec.path / "text_encoder").items():
        if not name.startswith("encoder.block."):
            outer += 0 if name == "encoder.embed_tokens.weight" else size
            continue
        number = name.split(".")[2]
        if precision is not None and len(shape) == 2 and "relative" not in name:
            size = int(math.prod(shape) * LINEAR_CLASSES[precision].bits / 8)
        blocks[number] = blocks.get(number, 0) + size
    return outer + (RING_SLOTS * max(blocks.values(), default=0) if streamed else sum(blocks.values()))


def decode_bytes(spec: ModelSpec, num_frames: int, size: tuple[int, int]) -> int:
    """The VAE in fp32, its activations (by pixels of a frame and decoder width), and the frames twice: decoded and
    concatenated."""
    folder, pixels = spec.path / "vae", size[0] * size[1]
    config = component_config(folder)
    per_pixel, usual = (_DECODED_BYTES_RESIDUAL, _DECODER_WIDTH_RESIDUAL) if config.get("is_residual") else (
        _DECODED_BYTES, _DECODER_WIDTH)
    width = config.get("decoder_base_dim") or config.get("base_dim") or usual
    original = original_file(folder)
    weights = original.stat().st_size if original is not None else sum(
        4 * math.prod(info.shape) for file in weight_files(folder) for info in read_weights(file).tensors.values())
    return weights + per_pixel * pixels * int(width) // usual + 2 * 12 * num_frames * pixels


@dataclass(frozen=True)
class GenerationWorkload:
    """What determines the memory of a generation.

    Args:
        size: (height, width) in pixels.
        batch: videos at a time.
        guided: whether any step uses classifier-free guidance.
        processes: that share each sequence's tokens.
    """

    num_frames: int
    size: tuple[int, int]
    steps: int = 40
    batch: int = 1
    guided: bool = True
    processes: int = 1


def shapes_of(groups: Sequence[Group]) -> list[GroupShape]:
    """The shapes of attached LoRAs that are not trained."""
    return [GroupShape({path: pair.rank for path, pair in group.state.low_rank(group.name).items()}, False)
            for group in groups]


def plan_generation(
    spec: ModelSpec, groups: Mapping[NoiseExpert, Sequence[Group]], dtype: torch.dtype, recipe: Recipe | None,
    workload: GenerationWorkload, memory: Memory, free: int | None, rates: Throughput | None, text_bytes: int,
    host_free: int | None = None,
) -> MemoryPlan:
    """The fastest strategy that fits: both noise experts or one, none to all blocks streamed, guidance in one batch or
    in two passes.

    Args:
        free: bytes available on the device, already loaded weights included; None on a CPU, where nothing moves.
        rates: the device's throughput; None where `free` is.
        text_bytes: the text encoder on the device.
        host_free: available host memory; None: unknown.
    """
    free = memory_budget(free, memory)
    if free is None or rates is None:
        placement = placements(spec.num_layers, "both" if memory == "auto" else memory)[0]
        return MemoryPlan(Strategy(placement, 0, 0.0), 0, 0, None, memory)
    shapes = {e: NoiseExpertShape(spec, e, dtype, recipe, shapes_of(groups.get(e, ()))) for e in spec.noise_experts}
    sizes = [shape.bytes() for shape in shapes.values()]
    phases = {"text": text_bytes, "decode": decode_bytes(spec, workload.num_frames, workload.size)}
    strategies = []
    for batched in (True, False) if workload.guided else (True,):
        samples = workload.batch * (2 if workload.guided and batched else 1)
        clip = ClipShape(samples, workload.num_frames, *workload.size)
        activations = max(shape.forward_memory(clip, workload.processes) for shape in shapes.values())
        first = next(iter(shapes.values()))
        activations += first.text_cache_bytes(clip.batch * _TEXT_ROWS)
        flops = first.flops(clip, range(spec.num_layers)).times(1 / workload.processes)
        evaluation = flops.seconds(rates)
        passes = 2 if workload.guided and not batched else 1
        for placement in placements(spec.num_layers, memory):
            copies = max(sum(size.blocks[: placement.streamed]) for size in sizes) / rates.bus
            swaps = 0.0 if placement.both else sum(size.weights for size in sizes) / rates.bus / workload.steps
            # One batch is a little faster even where nothing streams: matrix products with more rows.
            seconds = passes * max(evaluation * (1.0 if passes == 1 else 1.02), copies) + swaps
            strategies.append(Strategy(placement, activations, seconds, batched_guidance=batched))
    return choose(sizes, strategies, WORKSPACE, free, memory, phases, host_free)


def generation_rows(plan: MemoryPlan, device: torch.device, count: int, steps: int) -> list[PlanPart]:
    """The decision and its figures for a screen.

    Args:
        count: noise experts of the model.
        steps: of the denoising loop.
    """
    placement = plan.strategy.placement
    if placement.streamed:
        what = f"{placement.streamed} blocks of the active noise expert stream from host memory to {device}"
    elif count > 1:
        what = f"both noise experts stay on {device}" if placement.both else f"one noise expert on {device} at a time"
    elif placement.both:
        what = f"the transformer stays on {device}"
    else:
        what = f"the transformer leaves {device} while prompts are encoded and frames decoded"
    why = {"auto": "auto"}.get(str(plan.requested), "as asked")
    if isinstance(plan.requested, float):
        why = f"within {plan.requested:g} GiB"
    passes = "" if plan.strategy.batched_guidance else "; guidance in two passes"
    if plan.peak > sum(plan.parts.values()):
        passes += "; the peak is in reading the prompt or decoding the frames"
    rows: list[PlanPart] = [PlanRow("memory", f"{what} ({why}){passes}"), *memory_table(plan, str(device))]
    if plan.parts:
        seconds = plan.strategy.seconds
        rows.append(PlanRow("time", f"{seconds:.2f} s a step, {duration_text(steps * seconds)} for all {steps} "
                                    "(predicted)"))
    return [*rows, *memory_warnings(plan, str(device))]
