"""The memory plan of a generation: what stays on the device while it samples, reads prompts and decodes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lapwan.checkpoints.container import read_header
from lapwan.lora.attach import Group
from lapwan.memory.plan import GIB, PLACES, WORKSPACE, MemoryPlan, Rates, Strategy, choose, free_of, placements
from lapwan.memory.shapes import ClipShape, GroupShape, NoiseExpertShape
from lapwan.models.original_layout import read_tensors, t5_to_transformers
from lapwan.models.spec import ModelSpec, original_file, tensor_shapes, weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.quantise.linears import KINDS
from lapwan.wan.quantise.load import Recipe

__all__ = ["Memory", "describe", "forward_bytes", "free_bytes", "plan_generation", "text_encoder_bytes",
           "weight_bytes"]

Memory = Literal["auto", "both", "one", "stream"] | float

# Beside A14B's bf16 weights diffusers' own forward takes 2.1 GiB at 256x256 and 10.4 GiB at 480x832 (81 frames, H200):
# at most 40 values of the transformer's width a token.
_VALUES_A_TOKEN = 40
# The VAE's decoding works frame by frame: measured on an H200 in fp32, 1.0 GiB at 256x256 and 4.7 at 480x832.
_DECODED_BYTES = 12_600  # a pixel of one frame, at Wan2.1's decoder width
_DECODER_WIDTH = 96
_WORDS = 128  # rows of a text whose keys and values are kept: Wan's negative prompt has 126


def weight_bytes(spec: ModelSpec, noise_expert: NoiseExpert, dtype: torch.dtype) -> int:
    """A transformer's size in `dtype`, from the headers of its files."""
    shapes = tensor_shapes(weight_files(spec.component(noise_expert)))
    return dtype.itemsize * sum(math.prod(shape) for shape in shapes.values())


def forward_bytes(spec: ModelSpec, dtype: torch.dtype, num_frames: int, size: tuple[int, int]) -> int:
    """An upper bound of what a forward pass takes beside the weights: 40 · width · itemsize · tokens, and a GiB."""
    _, frames, height, width = spec.latent_shape(num_frames, *size)
    patch = spec.pixel_multiple // spec.spatial_stride
    tokens = frames * (height // patch) * (width // patch)
    features = tensor_shapes(weight_files(spec.component(spec.noise_experts[0])))["patch_embedding.weight"][0]
    return _VALUES_A_TOKEN * features * dtype.itemsize * tokens + GIB


def _text_sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of each tensor, without reading it."""
    if (original := original_file(folder)) is not None and original.suffix != ".safetensors":
        tensors = read_tensors(original)
        return {t5_to_transformers(name): (tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    files = [original] if original is not None else weight_files(folder)
    infos = [info for file in files for info in read_header(file).tensors.values()]
    return {t5_to_transformers(info.name): (info.shape, info.size) for info in infos}


def text_encoder_bytes(spec: ModelSpec, precision: Precision | None = None, streamed: bool = False) -> int:
    """The text encoder on a device: all of it, or what lies outside its blocks and two of them."""
    outer, blocks = 0, dict[str, int]()
    for name, (shape, size) in _text_sizes(spec.path / "text_encoder").items():
        if not name.startswith("encoder.block."):
            outer += 0 if name == "encoder.embed_tokens.weight" else size
            continue
        number = name.split(".")[2]
        if precision is not None and len(shape) == 2 and "relative" not in name:
            size = int(math.prod(shape) * KINDS[precision].bits / 8)
        blocks[number] = blocks.get(number, 0) + size
    return outer + (PLACES * max(blocks.values(), default=0) if streamed else sum(blocks.values()))


def decode_bytes(spec: ModelSpec, num_frames: int, size: tuple[int, int]) -> int:
    """Of the VAE in fp32 and its decoding: work by the frame's pixels and the decoder's width, and the frames
    themselves, made and joined."""
    folder, pixels = spec.path / "vae", size[0] * size[1]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = config.get("decoder_base_dim") or config.get("base_dim") or _DECODER_WIDTH
    original = original_file(folder)
    weights = original.stat().st_size if original is not None else sum(
        4 * math.prod(info.shape) for file in weight_files(folder) for info in read_header(file).tensors.values())
    return weights + _DECODED_BYTES * pixels * int(width) // _DECODER_WIDTH + 2 * 12 * num_frames * pixels


def free_bytes(device: torch.device) -> int | None:
    """What torch could still get on a CUDA device, blocks it holds without use included; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


@dataclass(frozen=True)
class Asking:
    """A generation, as far as its memory goes. `batch` videos at once, `guided`: any step evaluates twice, `processes`
    share each sequence's tokens."""

    num_frames: int
    size: tuple[int, int]
    steps: int = 40
    batch: int = 1
    guided: bool = True
    processes: int = 1


def shapes_of(groups: Sequence[Group]) -> list[GroupShape]:
    """The shapes of LoRAs that are attached without being trained."""
    return [GroupShape({path: entry.down.shape[0] for path, entry in group.state.entries.items()}, False)
            for group in groups]


def plan_generation(
    spec: ModelSpec, groups: Mapping[NoiseExpert, Sequence[Group]], dtype: torch.dtype, recipe: Recipe | None,
    asking: Asking, memory: Memory, free: int | None, rates: Rates | None, text_bytes: int,
    host_free: int | None = None,
) -> MemoryPlan:
    """The quickest way that fits, of: both noise experts or one, more and more blocks streamed, guidance in one batch
    or in two.

    Args:
        free: bytes the device could give, weights already there included; None on a CPU, where everything stays.
        rates: None where nothing is free to be planned with.
        text_bytes: of the text encoder on the device.
    """
    asked, free = memory, free_of(free, memory)
    if free is None or rates is None:
        own = placements(len(spec.noise_experts), spec.num_layers, "both" if asked == "auto" else asked)[0]
        return MemoryPlan(Strategy(own, 0, 0.0), 0, 0, None, asked)
    shapes = {e: NoiseExpertShape(spec, e, dtype, recipe, shapes_of(groups.get(e, ()))) for e in spec.noise_experts}
    each = [shape.bytes() for shape in shapes.values()]
    phases = {"text": text_bytes, "decode": decode_bytes(spec, asking.num_frames, asking.size)}
    strategies = []
    for together in (True, False) if asking.guided else (True,):
        clip = ClipShape(asking.batch * (2 if asking.guided and together else 1), asking.num_frames, *asking.size)
        work = max(shape.forward_work(clip, asking.processes) for shape in shapes.values())
        first = next(iter(shapes.values()))
        work += first.text_bytes(clip.batch * _WORDS)
        flops = first.flops(clip, range(spec.num_layers)).times(1 / asking.processes)
        once = flops.seconds(rates)
        passes = 2 if asking.guided and not together else 1
        for place in placements(len(each), spec.num_layers, asked):
            copied = max(sum(one.blocks[: place.streamed]) for one in each) / rates.bus
            swaps = 0.0 if place.both else sum(one.weights for one in each) / rates.bus / asking.steps
            # Together is a little quicker even where nothing streams: products with more rows.
            seconds = passes * max(once * (1.0 if passes == 1 else 1.02), copied) + swaps
            strategies.append(Strategy(place, work, seconds, together=together))
    return choose(each, strategies, WORKSPACE, free, asked, phases, host_free)


def describe(plan: MemoryPlan, device: torch.device, count: int) -> str:
    """The decision and its numbers, as one line."""
    place = plan.strategy.placement
    if place.streamed:
        what = f"{place.streamed} blocks of the noise expert at work stream from host memory to {device}"
    elif count > 1:
        what = f"both noise experts stay on {device}" if place.both else f"one noise expert on {device} at a time"
    elif place.both:
        what = f"the transformer stays on {device}"
    else:
        what = f"the transformer leaves {device} to the text encoder"
    why = {"auto": "auto"}.get(str(plan.asked), "as asked")
    if isinstance(plan.asked, float):
        why = f"within {plan.asked:g} GiB"
    if not plan.parts:
        return f"memory: {what} ({why})"
    own = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.parts.items() if size >= GIB / 20)
    has = "" if plan.free is None else f" of {plan.free / GIB:.1f}"
    alone = "" if plan.strategy.together else "; guidance in two passes"
    return (f"memory: {what} ({why}): predicted peak {plan.peak / GIB:.1f}{has} GiB ({own}){plan.host_words}; "
            f"{plan.strategy.seconds:.2f} s a step predicted{alone}")
