"""Several videos in one forward pass, with the results each has alone: for evaluation of small models.

Noise, text, image condition and gates are computed per request as for a single video, then stacked.
Shapes: B requests, C channels, T frames, H height, W width, G gate columns.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapwan import console
from lapwan.errors import UserError
from lapwan.sampling.denoise import Conditions, Guidance, denoise
from lapwan.sampling.generator import Generator, to_frames
from lapwan.sampling.request import Request, check_request
from lapwan.sampling.scheduler import Step
from lapwan.sampling.start_image import image_fingerprint
from lapwan.wan.vae import decode

_CACHED_CONDITIONS = 512  # image conditions in host memory: the same first frames recur with every adapter
_DECODE_BATCH = 16  # videos decoded at a time


class BatchGenerator(Generator):
    """A generator for batches of requests that differ only in prompt, images, seed and the gates of the adapters."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._cached: OrderedDict[tuple[object, ...], Conditions] = OrderedDict()

    def generate_batch(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Frames uint8 [T, H, W, 3] of each request, in order.

        Raises:
            ValueError: no requests, or requests that cannot share a batch.
            UserError: what `check_request` refuses; latents that overflowed; the GPU is out of memory.
        """
        try:
            latents = self.batch_latents(requests)
            self.noise_experts.free_device()
            with torch.no_grad():
                parts = [decode(self.vae(), part) for part in torch.split(latents, _DECODE_BATCH)]
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU is out of memory with {len(requests)} videos at a time: set a smaller batch_size "
                            f"({str(error).splitlines()[0]})") from None
        return [to_frames(video[None]) for part in parts for video in part]

    def batch_latents(self, requests: Sequence[Request]) -> Tensor:
        """The sampled latents [B, C, T, H, W], normalised, fp32."""
        first = requests[0] if requests else None
        if first is None or any(_shared(request) != _shared(first) for request in requests):
            raise ValueError("a batch needs requests of one size, grid and guidance")
        grid = self.begin(first, len(requests))
        for request in requests[1:]:
            check_request(self.spec, request)
        mixes = [self.route(request, grid) for request in requests]
        guidance = Guidance(first.guidance, first.guidance_interval)
        guided = guidance.needed(grid)
        conditions = _stacked([self._cached_conditions(request, guided) for request in requests])
        start = torch.cat([self._start(request, grid) for request in requests])

        def scope(step: Step) -> AbstractContextManager[object]:
            rows = [self._gates(request, step, mix) for request, mix in zip(requests, mixes, strict=True)]
            return self.noise_experts.scope(step.noise_expert, torch.cat(rows))  # a guided batch repeats them itself

        with console.progress("sampling", len(grid.steps)) as bar:
            latents = denoise(grid, start, conditions, guidance, self.noise_experts.backbone, scope,
                              lambda step, x0: bar.advance(1, noise_expert=step.noise_expert.value, sigma=step.sigma),
                              batched_guidance=self.noise_experts.batched_guidance)
        if not bool(torch.isfinite(latents).all()):
            raise UserError(f"the latents are not finite in {str(self.dtype).removeprefix('torch.')}; use --dtype "
                            f"{'bf16' if self.dtype == torch.float16 else 'fp32'}")
        return latents

    def _cached_conditions(self, request: Request, guided: bool) -> Conditions:
        """A request's conditions. Those with an image are cached in host memory, since encoding it is slow."""
        if request.image is None:
            return self._conditions(request, guided)
        cached = self._cached
        last = None if request.last_image is None else image_fingerprint(request.last_image)
        key = (request.prompt, request.negative_prompt, guided, request.size, request.num_frames,
               image_fingerprint(request.image), last)
        if key not in cached:
            cached[key] = _moved(self._conditions(request, guided), torch.device("cpu"))
            if len(cached) > _CACHED_CONDITIONS:
                cached.popitem(last=False)
        cached.move_to_end(key)
        return _moved(cached[key], self.device)


def _shared(request: Request) -> Request:
    """The request without the fields that may differ within a batch."""
    return replace(request, prompt="", image=None, last_image=None, video_THWC=None, seed=0, hint=None, alpha_base=None,
                   alpha_expert=None)


def _fields(conditions: Conditions) -> dict[str, Tensor | None]:
    return {name: getattr(conditions, name) for name in Conditions.__dataclass_fields__}


def _moved(conditions: Conditions, device: torch.device) -> Conditions:
    return replace(conditions, **{n: v.to(device) for n, v in _fields(conditions).items() if v is not None})


def _stacked(conditions: Sequence[Conditions]) -> Conditions:
    """One `Conditions` with B rows.

    Raises:
        ValueError: some requests have an image (or a last frame) and some have none.
    """
    joined: dict[str, Any] = {}
    for name in Conditions.__dataclass_fields__:
        present = [value for item in conditions if (value := _fields(item)[name]) is not None]
        if present and len(present) != len(conditions):
            raise ValueError("some requests of the batch have an image and some have none")
        joined[name] = torch.cat(present) if present else None
    return replace(conditions[0], **joined)
