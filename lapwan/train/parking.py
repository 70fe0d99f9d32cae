"""Both noise experts on the device, or one at a time: what a run needs, from shapes, and the idle one's wait.

Activations of a trained block take about 53·width bytes a token in bf16 (272 kB at A14B's width of 5120, with LoRA on
every Linear), and 2·width with activation checkpointing; blocks before the first trained one keep none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lapwan.lora.attach import Adapter
from lapwan.names import NoiseExpert, split_block
from lapwan.sampling.memory import HostCopy, Memory, Need, describe, forward_bytes, free_bytes, keep_both, weight_bytes
from lapwan.settings.train import TrainSettings
from lapwan.train.build import RunData, targets_of
from lapwan.wan.base import Base
from lapwan.wan.device import pick_dtype
from lapwan.wan.folder import ModelSpec

_PLAIN, _CHECKPOINTED = 53, 2  # bytes a token and unit of width, in bf16
_STATE = 16  # bytes a trained number: fp32 itself, its gradient, two moments


@dataclass(frozen=True)
class TrainingMemory:
    """Whether both noise experts stay, and the line that says why."""

    both: bool
    line: str


def plan_memory(settings: TrainSettings, base: Base, data: RunData, device: torch.device) -> TrainingMemory:
    """Decide from the model's shapes, the largest clips, and what the device has free."""
    spec, dtype = base.spec, pick_dtype(settings.dtype, device)
    frames, height, width = max((item.bucket for item in data.items), key=math.prod)
    work = settings.batch_size * forward_bytes(spec, dtype, frames, (height, width))
    ranks = {e: targets_of(own.targets, base.num_layers) for e, own in data.experts.items()}
    blocks = max(base.num_layers - min((place[0] for path in own if (place := split_block(path))), default=0)
                 for own in ranks.values())
    per_token = _CHECKPOINTED if settings.activation_checkpointing else _PLAIN
    tokens = settings.batch_size * _tokens(spec, (frames, height, width))
    inner = _width(spec)
    activations = int(blocks * per_token * inner * tokens * dtype.itemsize / 2)
    trained = _STATE * sum(2 * inner * rank for own in ranks.values() for rank in own.values())
    need = Need([weight_bytes(spec, e, dtype) for e in data.experts], work + activations + trained, 0)
    free = free_bytes(device)
    both = len(data.experts) < 2 or keep_both(settings.memory, need, free)
    asked: Memory = "both" if len(data.experts) < 2 else settings.memory
    return TrainingMemory(both, describe(both, asked, need, free, device))


def _tokens(spec: ModelSpec, bucket: tuple[int, int, int]) -> int:
    _, frames, height, width = spec.latent_shape(*bucket)
    patch = spec.pixel_multiple // spec.spatial_stride
    return frames * (height // patch) * (width // patch)


def _width(spec: ModelSpec) -> int:
    config = json.loads((spec.component(spec.experts[0]) / "config.json").read_text(encoding="utf-8"))
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


class Parking:
    """One noise expert at a time on the device; the frozen weights of the others wait in pinned host memory.

    What is trained stays on the device: it is small, and optimisers hold on to it. With `both` nothing ever moves.
    """

    def __init__(self, device: torch.device, both: bool = True) -> None:
        self.device, self.both = device, both
        self._copies: dict[NoiseExpert, HostCopy] = {}
        self._here: NoiseExpert | None = None

    @property
    def load_on(self) -> torch.device:
        """Where to load a noise expert before `add`."""
        return self.device if self.both else torch.device("cpu")

    def add(self, adapters: Mapping[NoiseExpert, Adapter]) -> None:
        """Take in noise experts that lie on `load_on`."""
        if self.both:
            return
        for expert, adapter in adapters.items():
            own = adapter.own_tensors()
            rows = {id(tensor) for tensor in own}
            every = (*adapter.transformer.parameters(), *adapter.transformer.buffers())
            self._copies[expert] = HostCopy((t for t in every if id(t) not in rows), self.device.type == "cuda")
            self._copies[expert].park()
            for tensor in own:
                tensor.data = tensor.data.to(self.device)

    def turn(self, expert: NoiseExpert) -> None:
        """This noise expert's weights are on the device from here on, the others' are not."""
        if self.both or expert is self._here or expert not in self._copies:
            return
        for other, copy in self._copies.items():
            if other is not expert:
                copy.park()
        self._copies[expert].fetch(self.device)
        self._here = expert
