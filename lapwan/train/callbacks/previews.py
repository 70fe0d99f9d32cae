"""Previews: videos sampled through both noise experts, high then low, with the current weights.

A noise expert that is not trained is loaded for the first preview and kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapwan import console
from lapwan.data.labels import resolve_hint
from lapwan.data.taxonomy import Taxonomy
from lapwan.errors import UserError
from lapwan.memory.plan import MemoryPlan
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.generator import Generator
from lapwan.sampling.noise_experts import NoiseExperts
from lapwan.sampling.request import Request, check_request, complete_guidance
from lapwan.sampling.result import Video
from lapwan.sampling.start_image import open_image
from lapwan.settings.callbacks import PreviewSettings
from lapwan.train.callbacks.base import Callback, Evaluation
from lapwan.train.objective import Objective
from lapwan.wan.backbone import WanBackbone

_UNSAFE = re.compile(r"[^\w.-]+")


def preview_requests(
    settings: PreviewSettings, spec: ModelSpec, bucket: tuple[int, int, int], taxonomy: Taxonomy | None = None
) -> list[Request]:
    """One request for each prompt, and one more for each of its hints.

    Args:
        bucket: (frames, height, width) of the clips, the default length and size.
        taxonomy: of the mixture that is trained, for hints.

    Raises:
        UserError: a request that the model cannot generate, or a hint that names no family.
    """
    frames, height, width = bucket
    images, last_images = ([open_image(path) for path in paths] or [None] * len(settings.prompts)
                           for paths in (settings.images, settings.last_images))
    requests = [
        Request(
            prompt, settings.num_frames or frames, settings.size or (height, width),
            settings.steps or spec.defaults.steps, complete_guidance(spec, settings.guidance), spec.defaults.fps,
            image=image, last_image=last, seed=settings.seed,
        )
        for prompt, image, last in zip(settings.prompts, images, last_images, strict=True)
    ]
    for request in requests:
        if spec.requires_image and request.image is None:
            raise UserError("previews of an image-to-video model need a first frame: set preview.images, one per "
                            "prompt")
        check_request(spec, request)
    hints = () if taxonomy is None else taxonomy.keys if settings.hints == "families" else settings.hints
    for hint in hints:
        assert taxonomy is not None
        resolve_hint(hint, taxonomy)
    return [variant for request in requests for variant in (request, *(replace(request, hint=h) for h in hints))]


def preview_names(requests: Sequence[Request]) -> dict[str, Request]:
    """Requests by the name in their files: `0`, `1` by prompt; hints follow theirs as `0_hook`."""
    names: dict[str, Request] = {}
    index = -1
    for request in requests:
        index += request.hint is None
        names[f"{index}" if request.hint is None else f"{index}_{_UNSAFE.sub('_', request.hint)}"] = request
    return names


class _InTraining(NoiseExperts):
    """The noise experts in training with their adapters; a noise expert that is not trained is loaded and kept."""

    def __init__(
        self, base: Base, adapter_set: AdapterSet, device: torch.device, dtype: torch.dtype,
        objective: Objective, onload: Callable[[NoiseExpert], None],
    ) -> None:
        super().__init__(base, adapter_set, device, dtype, memory="both")
        self._objective, self._onload = objective, onload

    def plan(
        self, num_frames: int, size: tuple[int, int], steps: int = 40, guided: bool = True, batch: int = 1
    ) -> MemoryPlan:
        """What stays on the device is decided by the plan of the training."""
        return self._plan

    def free_device(self) -> None:
        """Nothing of the training is offloaded for a preview."""

    def backbone(self, noise_expert: NoiseExpert) -> WanBackbone:
        if noise_expert in self._objective.backbones:
            self._onload(noise_expert)
            return self._objective.backbones[noise_expert]
        return super().backbone(noise_expert)

    def scope(self, noise_expert: NoiseExpert, gates_1G: Tensor) -> AbstractContextManager[object]:
        """The gates of a mixture; a plain LoRA in training has gate 1."""
        if noise_expert not in self._objective.adapters:
            return super().scope(noise_expert, gates_1G)
        holder = self._objective.adapters[noise_expert].holder
        return holder.scope(gates_1G) if holder.required else nullcontext()


class PreviewGenerator(Generator):
    """A generator over the noise experts in training."""

    def __init__(
        self, base: Base, adapter_set: AdapterSet, device: torch.device, dtype: torch.dtype,
        objective: Objective, onload: Callable[[NoiseExpert], None],
    ) -> None:
        super().__init__(base, adapter_set, device, dtype, noise_experts=_InTraining(
            base, adapter_set, device, dtype, objective, onload))

    def encode(self, requests: Sequence[Request]) -> None:
        """Encode the prompts of all requests that will be generated, and drop the text encoder."""
        for request in requests:
            self.text_features(request.prompt)
            if max(request.guidance.values()) > 1:
                self.text_features(request.negative_prompt)
        self._text = None


def save_sample(video: Video, folder: Path, step: int, name: str, board: Any, tag: str) -> Path:
    """Write a sample of a run as an MP4 (a PNG for one frame), and a strip of it to TensorBoard."""
    suffix = "png" if len(video.frames) == 1 else "mp4"
    path = video.save(folder / f"step_{step:06d}_{name}.{suffix}", overwrite=True)
    board.add_image(f"{tag}/{name}", np.asarray(contact_sheet([video.frames])), step, dataformats="HWC")
    return path


class Previews(Callback):
    """An MP4 (a PNG for one frame) of each prompt in `previews/`, a strip of it in TensorBoard.

    There is no state: each preview has a fixed seed.
    """

    name = "preview"

    def __init__(self, generator: PreviewGenerator, requests: Sequence[Request], folder: Path, every: int) -> None:
        self.every = every
        self._generator, self._requests, self._folder = generator, list(requests), folder

    def on_start(self, board: Any) -> None:
        """Encode the prompts."""
        console.detail("encoding the previews' prompts")
        self._generator.encode(self._requests)

    @torch.no_grad()
    def on_step(self, step: int, board: Any) -> Evaluation:
        mixture = self._generator.adapters.mixture
        if mixture is None:
            return self._sample(step, board)
        # Sampling routes on the CPU; moving the mixture there and back keeps its parameters bit for bit.
        device = next(mixture.parameters()).device
        mixture.to("cpu")
        try:
            return self._sample(step, board)
        finally:
            mixture.to(device)

    def _sample(self, step: int, board: Any) -> Evaluation:
        for name, request in preview_names(self._requests).items():
            video = self._generator.generate(request)
            path = save_sample(video, self._folder, step, name, board, "preview")
            console.detail(f"preview {path}")
        return Evaluation({})
