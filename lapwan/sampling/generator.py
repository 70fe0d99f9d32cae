"""Generate videos: loads the parts of a model on first use, attaches adapters, and samples requests in batches.

One video is a batch of one. Noise, text, image condition and gates are computed per request, then stacked.
Shapes: B requests, G gate columns, C channels, T frames, H height, W width, L text tokens, D text features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lapwan import console
from lapwan.caching.collate import to_device
from lapwan.distributed import Processes
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.losses.flow import add_noise
from lapwan.memory.generation import Memory
from lapwan.memory.streaming import ModelOffload, offload_by_hooks
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.names import Precision
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.denoise import Conditions, Guidance, denoise
from lapwan.sampling.expert_mix import Mix, alpha_vector, choose_mix
from lapwan.sampling.facts import dtype_name, video_facts
from lapwan.sampling.noise_experts import NoiseExperts
from lapwan.sampling.request import Request, check_request, grid_of
from lapwan.sampling.result import Video
from lapwan.sampling.scheduler import Grid, Step
from lapwan.sampling.start_image import (
    clip_tensor,
    frames_fingerprint,
    image_fingerprint,
    image_tensor,
)
from lapwan.wan.image_condition import image_condition
from lapwan.wan.text import TextEncoder, encode_text, load_text_encoder, pad_text
from lapwan.wan.transformer.compile import Compile
from lapwan.wan.transformer.first_block_cache import FirstBlockCache
from lapwan.wan.vae import decode, encode, load_vae, to_frames

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

_CACHED_CONDITIONS = 512
_DECODE_BATCH = 16  # videos decoded at a time


class Generator:
    """A model with its adapters, ready for requests. On a GPU the text encoder is offloaded between prompts.

    Args:
        base: the model, with the LoRAs to merge into its weights.
        adapters: what acts beside the weights; None: nothing.
        device: of the computation.
        dtype: of the transformers; VAE and text features keep their own.
        memory: see `NoiseExperts`.
        compile: run the transformers' blocks through torch.compile; see `NoiseExperts`.
        precision: quantises the transformers' blocks; `text_precision` the text encoder.
        processes: generate each video together: the first encodes the prompts, all share the tokens, and each ends up
            with the whole video.
        cache_conditions: keep image conditions in host memory, for studies in which the same first frames recur.
        noise_experts: those of a training, for its previews; None: the base's, loaded on first use.
    """

    def __init__(
        self,
        base: Base | ModelSpec,
        adapters: AdapterSet | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        memory: Memory = "auto",
        compile: Compile = "auto",
        precision: Precision | None = None,
        text_precision: Precision | None = None,
        processes: Processes | None = None,
        cache_conditions: bool = False,
        noise_experts: NoiseExperts | None = None,
    ) -> None:
        base = base if isinstance(base, Base) else Base(base)
        self.spec, self.device, self.dtype = base.spec, torch.device(device), dtype
        self.noise_experts = noise_experts or NoiseExperts(
            base, adapters or AdapterSet(), self.device, dtype, memory, compile, precision, text_precision, processes)
        self._text_precision = text_precision
        self._text: TextEncoder | None = None
        self._text_offload: ModelOffload | None = None
        self._vae: AutoencoderKLWan | None = None
        self._features: dict[str, Tensor] = {}
        self._cache_conditions = cache_conditions
        self._cached: OrderedDict[tuple[object, ...], Conditions] = OrderedDict()

    @property
    def adapters(self) -> AdapterSet:
        """The adapters in use."""
        return self.noise_experts.adapters

    def use(self, base: Base, adapters: AdapterSet) -> None:
        """Switch to other adapters of the same model. Loaded weights stay, unless LoRAs are merged into them.

        Args:
            base: the same model, with the LoRAs to merge into its weights.
            adapters: what acts beside the weights.
        """
        self.noise_experts.use(base, adapters)

    def text_features(self, prompt: str) -> Tensor:
        """umT5 features of a prompt, unpadded [n, D]; cached."""
        if prompt not in self._features:
            processes = self.noise_experts.processes
            features = self._encode(prompt) if processes.first else None
            if processes.count > 1:
                features = processes.from_first(None if features is None else features.cpu())
            assert features is not None
            self._features[prompt] = features.to(self.device)
        return self._features[prompt]

    def _encode(self, prompt: str) -> Tensor:
        if self._text is None:
            self._text = self._load_text()
        self.noise_experts.free_device()
        if self._text_offload is not None:
            self._text_offload.onload()
        features = encode_text(self._text, [prompt])[0]
        if self._text_offload is not None:
            self._text_offload.offload()
        return features

    def _load_text(self) -> TextEncoder:
        console.log("loading the text encoder")
        encoder = load_text_encoder(self.spec, precision=self._text_precision)
        if self.device.type != "cpu" or self.noise_experts.text_streams:
            blocks = range(len(encoder.model.encoder.block)) if self.noise_experts.text_streams else ()
            self._text_offload = offload_by_hooks(encoder.model, self.device, blocks, "encoder.block")
        return encoder

    def vae(self) -> AutoencoderKLWan:
        """The VAE, in fp32."""
        if self._vae is None:
            console.log("loading the VAE")
            self._vae = load_vae(self.spec, device=self.device)
        return self._vae

    def route(self, request: Request, grid: Grid | None = None) -> Mix | None:
        """The mix of experts for a request; None without a mixture. `grid` None: the request's.

        Args:
            request: the video.
            grid: its sigma grid; None: made from the request.
        """
        if self.adapters.mixture is None:
            return None
        grid = grid or grid_of(self.spec, request)
        return choose_mix(
            self.adapters.mixture, request.prompt, request.hint, lambda: self.text_features(request.prompt),
            [step.sigma for step in grid.steps],
        )

    def latents(self, *requests: Request) -> Tensor:
        """The sampled latents of requests that may share a batch [B, C, T, H, W], normalised, fp32.

        Raises:
            ValueError: no requests, or requests that cannot share a batch.
            UserError: what `check_request` refuses; latents that overflowed in `dtype`.
        """
        grid = self.begin(*requests)
        return self._sample(requests, grid, [self.route(request, grid) for request in requests])

    def generate(self, request: Request, preview: Path | None = None) -> Video:
        """One video; see `generate_videos`.

        Args:
            request: the video.
            preview: as in `generate_videos`.

        Raises:
            UserError: as `generate_videos`.
        """
        return self.generate_videos([request], preview)[0]

    def generate_videos(
        self, requests: Sequence[Request], preview: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Video]:
        """The videos of requests that may share a batch, in order.

        Args:
            requests: of one size, grid and guidance.
            preview: a .png, rewritten after each step with three frames of the first video's current estimate.
            on_step: called with the steps done and all steps after each; what it raises ends the sampling.

        Raises:
            ValueError: no requests, or requests that cannot share a batch.
            UserError: what `check_request` refuses; latents that overflowed in `dtype`.
        """
        grid = self.begin(*requests)
        mixes = [self.route(request, grid) for request in requests]
        for mix in mixes:
            if mix is not None:
                console.log(f"gates by {mix.source}:\n" + "\n".join(f"  {line}" for line in mix.bars()))
        facts = [video_facts(self.noise_experts, self._text_precision, request, grid, mix,
                             partial(self._gates, request, mix))
                 for request, mix in zip(requests, mixes, strict=True)]
        latents = self._sample(requests, grid, mixes, preview, on_step)
        compiled = [e.value for e in self.spec.noise_experts if e in self.noise_experts.compiled]
        console.log("decoding")
        videos = []
        for request, known, frames, x0 in zip(requests, facts, self._frames(latents), latents.cpu(), strict=True):
            known |= {"compiled": compiled, "frames": frames_fingerprint(frames)}
            if len(requests) > 1:
                known["batch"] = len(requests)
            videos.append(Video(frames, request.fps, x0[None].contiguous(), facts=known))
        return videos

    def generate_batch(
        self, requests: Sequence[Request], on_step: Callable[[int, int], None] | None = None
    ) -> Iterator[np.ndarray]:
        """Frames uint8 [T, H, W, 3] of each request, in order, as they are decoded: those that each has alone.

        Args:
            requests: of one size, grid and guidance.
            on_step: as in `generate_videos`.

        Raises:
            ValueError: no requests, or requests that cannot share a batch.
            UserError: what `check_request` refuses; latents that overflowed; the GPU is out of memory.
        """
        try:
            grid = self.begin(*requests)
            mixes = [self.route(request, grid) for request in requests]
            yield from self._frames(self._sample(requests, grid, mixes, on_step=on_step))
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU is out of memory with {len(requests)} videos at a time: set a smaller batch_size "
                            f"({str(error).splitlines()[0]})") from None

    def _frames(self, latents_BCTHW: Tensor) -> Iterator[np.ndarray]:
        self.noise_experts.free_device()
        for part in torch.split(latents_BCTHW, _DECODE_BATCH):
            with torch.no_grad():
                pixels_BCTHW = decode(self.vae(), part)
            yield from (to_frames(video[None]) for video in pixels_BCTHW)

    def begin(self, *requests: Request) -> Grid:
        """Check requests that share a batch, plan its memory, and return the grid.

        Raises:
            ValueError: no requests, or requests that cannot share a batch.
            UserError: what `check_request` refuses.
        """
        first = requests[0] if requests else None
        if first is None or any(_shared(request) != _shared(first) for request in requests):
            raise ValueError("a batch needs requests of one size, grid and guidance")
        if len(requests) > 1 and first.first_block_cache:
            raise ValueError("a first-block cache decides for one video: generate them one at a time")
        for request in requests:
            check_request(self.spec, request)
        grid = grid_of(self.spec, first)
        guidance = Guidance(first.guidance, first.guidance_interval)
        self.noise_experts.plan(first.num_frames, first.size, len(grid.steps), guidance.needed(grid), len(requests))
        evaluations = {e: sum(1 + (guidance.at(step) > 1) for step in grid.steps if step.noise_expert is e)
                       for e in self.spec.noise_experts}
        self.noise_experts.expect(evaluations, self.spec.latent_shape(first.num_frames, *first.size)[1:])
        return grid

    def _start(self, request: Request, grid: Grid) -> Tensor:
        """x at the grid's first sigma: noise, or x_σ = σ·ε + (1 − σ)·x0 of the video to start from."""
        # On the CPU, as diffusers with a CPU generator: a seed gives the same noise on every machine.
        shape = self.spec.latent_shape(request.num_frames, *request.size)
        noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(request.seed), dtype=torch.float32)
        noise = noise.to(self.device)
        if request.video_THWC is None:
            return noise
        console.log("encoding the video to start from")
        with torch.no_grad():
            x0 = encode(self.vae(), clip_tensor(request.video_THWC).to(self.device))
        return add_noise(x0, noise, torch.tensor([grid.steps[0].sigma], device=self.device))

    def _conditions(self, request: Request, guided: bool) -> Conditions:
        if not self._cache_conditions or request.image is None:
            return self._new_conditions(request, guided)
        last = None if request.last_image is None else image_fingerprint(request.last_image)
        key = (request.prompt, request.negative_prompt, guided, request.size, request.num_frames,
               image_fingerprint(request.image), last)
        if key not in self._cached:
            self._cached[key] = self._new_conditions(request, guided).to(torch.device("cpu"))
            if len(self._cached) > _CACHED_CONDITIONS:
                self._cached.popitem(last=False)
        self._cached.move_to_end(key)
        return self._cached[key].to(self.device)

    def _new_conditions(self, request: Request, guided: bool) -> Conditions:
        def text(prompt: str) -> Tensor:
            return pad_text([self.text_features(prompt)]).to(self.device)

        texts = text(request.prompt), text(request.negative_prompt) if guided else None
        if request.image is None:
            return Conditions(*texts)
        first = image_tensor(request.image, request.size).to(self.device)
        with torch.no_grad():
            if self.spec.clean_first_frame:
                return Conditions(*texts, first_BC1HW=encode(self.vae(), first.unsqueeze(2)))
            last = None
            if request.last_image is not None:
                last = image_tensor(request.last_image, request.size).to(self.device)
            return Conditions(*texts, image_condition(self.vae(), first, request.num_frames, last))

    def _sample(
        self, requests: Sequence[Request], grid: Grid, mixes: Sequence[Mix | None], preview: Path | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        first = requests[0]
        guidance = Guidance(first.guidance, first.guidance_interval)
        conditions = Conditions.stack([self._conditions(request, guidance.needed(grid)) for request in requests])
        gates_BG = {  # a guided batch repeats them itself
            (step.noise_expert, step.sigma): torch.cat(
                [self._gates(request, mix, step) for request, mix in zip(requests, mixes, strict=True)])
            for step in grid.steps}
        scope = self.noise_experts.step_scope(gates_BG)
        with console.progress("sampling", len(grid.steps)) as bar:
            done = 0

            def after_step(step: Step, x0_BCTHW: Tensor) -> None:
                nonlocal done
                done += 1
                bar.advance(1, noise_expert=step.noise_expert.value, sigma=step.sigma)
                if preview is not None:
                    self._write_preview(preview, x0_BCTHW[:1])
                if on_step is not None:
                    on_step(done, len(grid.steps))

            start = torch.cat([self._start(request, grid) for request in requests])
            caches = {e: FirstBlockCache(tolerance) for e, tolerance in first.first_block_cache.items()}
            latents = denoise(grid, start, conditions, guidance, self.noise_experts.backbone, scope, after_step,
                              self.noise_experts.batched_guidance, caches)
        for noise_expert, cache in caches.items():
            console.log(f"{self.spec.title_of(noise_expert)}: {cache}")
        self.noise_experts.compiling.log()
        if not bool(torch.isfinite(latents).all()):
            # bf16 has fp32's range: what overflows in one does in the other.
            remedy = "use --dtype bf16" if self.dtype is torch.float16 else (
                "the model or an adapter at this strength gives too large values: lower the strength, or check the "
                "files with lapwan inspect-weights")
            raise UserError(f"the latents are not finite in {dtype_name(self.dtype)}; {remedy}")
        return latents

    def _write_preview(self, path: Path, x0_BCTHW: Tensor) -> None:
        """First, middle and last latent frame, each decoded as one image: cheap, and close enough for a preview."""
        last = x0_BCTHW.shape[2] - 1
        images = [to_frames(decode(self.vae(), x0_BCTHW[:, :, t : t + 1])) for t in sorted({0, last // 2, last})]
        with atomic_file(path) as temporary:
            contact_sheet([np.concatenate(images)], len(images)).save(temporary)

    def _gates(self, request: Request, mix: Mix | None, step: Step) -> Tensor:
        mixture = self.adapters.mixture
        gates_1G = self.adapters.gates(
            step.noise_expert, step.sigma, None if mix is None else mix.at(step.sigma),
            1.0 if request.alpha_base is None else request.alpha_base,
            None if mixture is None else alpha_vector(mixture, request.alpha_expert),
        )
        return to_device(gates_1G, self.device)  # without waiting for the previous step


def _shared(request: Request) -> Request:
    """The request without the fields that may differ within a batch."""
    return replace(request, prompt="", image=None, last_image=None, video_THWC=None, seed=0, hint=None, alpha_base=None,
                   alpha_expert=None)
