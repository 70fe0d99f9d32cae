"""Generate videos: loads the parts of a model on first use, attaches adapters, and makes one video per request.

Shapes: B samples (1 here), C channels, T frames, H height, W width, L text tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lapwan import __version__, console
from lapwan.caching.collate import to_device
from lapwan.distributed import Processes
from lapwan.errors import UserError
from lapwan.files import atomic_file
from lapwan.losses.flow import add_noise
from lapwan.memory.generation import Memory
from lapwan.memory.streaming import ModelOffload, offload_by_hooks
from lapwan.models.base import Base
from lapwan.models.device import hardware
from lapwan.models.fingerprints import text_encoder_fingerprint, vae_fingerprint
from lapwan.models.spec import ModelSpec
from lapwan.names import Precision
from lapwan.report.contact_sheet import contact_sheet
from lapwan.sampling.adapters import AdapterSet
from lapwan.sampling.denoise import Conditions, Guidance, denoise
from lapwan.sampling.expert_mix import Mix, alpha_vector, choose_mix
from lapwan.sampling.noise_experts import NoiseExperts
from lapwan.sampling.request import Request, check_request, grid_of
from lapwan.sampling.result import Video
from lapwan.sampling.scheduler import Grid, Step
from lapwan.sampling.start_image import (
    clip_tensor,
    first_last_condition,
    frames_fingerprint,
    image_fingerprint,
    image_tensor,
)
from lapwan.wan.image_condition import image_condition
from lapwan.wan.text import TextEncoder, encode_text, load_text_encoder, pad_text
from lapwan.wan.transformer.compile import Compile
from lapwan.wan.transformer.first_block_cache import FirstBlockCache
from lapwan.wan.vae import decode, encode, load_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


class Generator:
    """A model with its adapters, ready for requests. On a GPU the text encoder is offloaded between prompts.

    Args:
        dtype: of the transformers; VAE and text features keep their own.
        memory: see `NoiseExperts`.
        precision: quantises the transformers' blocks; `text_precision` the text encoder.
        processes: generate each video together: the first encodes the prompts, all share the tokens, and each ends up
            with the whole video.
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
    ) -> None:
        base = base if isinstance(base, Base) else Base(base)
        self.spec, self.device, self.dtype = base.spec, torch.device(device), dtype
        self.noise_experts = NoiseExperts(
            base, adapters or AdapterSet(), self.device, dtype, memory, compile, precision, text_precision, processes)
        self._text_precision = text_precision
        self._text: TextEncoder | None = None
        self._text_offload: ModelOffload | None = None
        self._vae: AutoencoderKLWan | None = None
        self._features: dict[str, Tensor] = {}

    @property
    def adapters(self) -> AdapterSet:
        """The adapters in use."""
        return self.noise_experts.adapters

    def use(self, base: Base, adapters: AdapterSet) -> None:
        """Switch to other adapters of the same model. Loaded weights stay, unless LoRAs are merged into them."""
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
        """The mix of experts for a request; None without a mixture. `grid` None: the request's."""
        if self.adapters.mixture is None:
            return None
        grid = grid or grid_of(self.spec, request)
        return choose_mix(
            self.adapters.mixture, request.prompt, request.hint, lambda: self.text_features(request.prompt),
            [step.sigma for step in grid.steps],
        )

    def latents(self, request: Request) -> Tensor:
        """The sampled latents of a request [1, C, T, H, W], normalised, fp32.

        Raises:
            UserError: what `check_request` refuses; latents that overflowed in `dtype`.
        """
        grid = self.begin(request)
        return self._sample(request, grid, self.route(request, grid))

    def generate(self, request: Request, preview: Path | None = None) -> Video:
        """One video.

        Args:
            preview: a .png, rewritten after each step with three frames of the current estimate.

        Raises:
            UserError: what `check_request` refuses; latents that overflowed in `dtype`.
        """
        grid = self.begin(request)
        mix = self.route(request, grid)
        if mix is not None:
            console.log(f"gates by {mix.source}:\n" + "\n".join(f"  {line}" for line in mix.bars()))
        facts = self._facts(request, grid, mix)
        latents = self._sample(request, grid, mix, preview)
        facts["compiled"] = [e.value for e in self.spec.noise_experts if e in self.noise_experts.compiled]
        console.log("decoding")
        self.noise_experts.free_device()
        with torch.no_grad():
            pixels = decode(self.vae(), latents)
        frames = to_frames(pixels)
        facts["frames"] = frames_fingerprint(frames)
        return Video(frames, request.fps, latents.cpu().contiguous(), facts=facts)

    def begin(self, request: Request, videos: int = 1) -> Grid:
        """Check a request, plan the memory for `videos` at a time, and return the grid.

        Raises:
            UserError: what `check_request` refuses.
        """
        check_request(self.spec, request)
        grid = grid_of(self.spec, request)
        guidance = Guidance(request.guidance, request.guidance_interval)
        self.noise_experts.plan(request.num_frames, request.size, len(grid.steps), guidance.needed(grid), videos)
        evaluations = {e: sum(1 + (guidance.at(step) > 1) for step in grid.steps if step.noise_expert is e)
                       for e in self.spec.noise_experts}
        self.noise_experts.expect(evaluations, self.spec.latent_shape(request.num_frames, *request.size)[1:])
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

    def _conditions(self, request: Request, negative: bool) -> Conditions:
        def text(prompt: str) -> Tensor:
            return pad_text([self.text_features(prompt)]).to(self.device)

        texts = text(request.prompt), text(request.negative_prompt) if negative else None
        if request.image is None:
            return Conditions(*texts)
        first = image_tensor(request.image, request.size).to(self.device)
        with torch.no_grad():
            if self.spec.task == "ti2v":
                return Conditions(*texts, first_BC1HW=encode(self.vae(), first.unsqueeze(2)))
            if request.last_image is None:
                return Conditions(*texts, image_condition(self.vae(), first, request.num_frames))
            last = image_tensor(request.last_image, request.size).to(self.device)
            return Conditions(*texts, first_last_condition(self.vae(), first, last, request.num_frames))

    def _sample(self, request: Request, grid: Grid, mix: Mix | None, preview: Path | None = None) -> Tensor:
        guidance = Guidance(request.guidance, request.guidance_interval)
        conditions = self._conditions(request, guidance.needed(grid))

        def scope(step: Step) -> AbstractContextManager[object]:
            return self.noise_experts.scope(step.noise_expert, self._gates(request, step, mix))

        with console.progress("sampling", len(grid.steps)) as bar:

            def on_step(step: Step, x0_BCTHW: Tensor) -> None:
                bar.advance(1, noise_expert=step.noise_expert.value, sigma=step.sigma)
                if preview is not None:
                    self._write_preview(preview, x0_BCTHW)

            start = self._start(request, grid)
            caches = {e: FirstBlockCache(tolerance) for e, tolerance in request.first_block_cache.items()}
            latents = denoise(grid, start, conditions, guidance, self.noise_experts.backbone, scope, on_step,
                              self.noise_experts.batched_guidance, caches)
        for noise_expert, cache in caches.items():
            console.log(f"{noise_expert.value} noise expert: {cache}")
        self.noise_experts.compiling.log()
        if not bool(torch.isfinite(latents).all()):
            raise UserError(f"the latents are not finite in {_name(self.dtype)}; use --dtype "
                            f"{'bf16' if self.dtype == torch.float16 else 'fp32'}")
        return latents

    def _write_preview(self, path: Path, x0_BCTHW: Tensor) -> None:
        """First, middle and last latent frame, each decoded as one image: cheap, and close enough for a preview."""
        last = x0_BCTHW.shape[2] - 1
        images = [to_frames(decode(self.vae(), x0_BCTHW[:, :, t : t + 1])) for t in sorted({0, last // 2, last})]
        with atomic_file(path) as temporary:
            contact_sheet([np.concatenate(images)], len(images)).save(temporary)

    def _gates(self, request: Request, step: Step, mix: Mix | None) -> Tensor:
        mixture = self.adapters.mixture
        gates_1G = self.adapters.gates(
            step.noise_expert, step.sigma, None if mix is None else mix.at(step.sigma),
            1.0 if request.alpha_base is None else request.alpha_base,
            None if mixture is None else alpha_vector(mixture, request.alpha_expert),
        )
        return to_device(gates_1G, self.device)  # without waiting for the previous step

    def _facts(self, request: Request, grid: Grid, mix: Mix | None) -> dict[str, Any]:
        """What the settings do not contain: fingerprints, the gates of every step, versions."""
        import diffusers

        facts: dict[str, Any] = {
            "model": {e.value: self.noise_experts.base.fingerprint(e) for e in self.spec.noise_experts},
            "vae": vae_fingerprint(self.spec), "text_encoder": text_encoder_fingerprint(self.spec),
            "steps": {e.value: grid.count(e) for e in self.spec.noise_experts},
            "versions": {"lapwan": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "device": str(self.device), "dtype": _name(self.dtype), "hardware": hardware(self.device),
        }
        if self.noise_experts.processes.count > 1:
            facts["processes"] = self.noise_experts.processes.count
        if Guidance(request.guidance, request.guidance_interval).needed(grid):
            facts["guidance"] = "one batch" if self.noise_experts.batched_guidance else "two passes"
        for name, precision in (("precision", self.noise_experts.precision), ("text_precision", self._text_precision)):
            if precision is not None:
                facts[name] = precision.value
        if loras := lora_facts(self.adapters):
            facts["lora"] = loras
        for name, image in (("image", request.image), ("last_image", request.last_image)):
            if image is not None:
                facts[name] = image_fingerprint(image)
        if request.video_THWC is not None:
            facts["video"] = frames_fingerprint(request.video_THWC)
        if mix is not None:
            columns = {e: [group.name for group in self.adapters.groups(e)] for e in self.spec.noise_experts}
            gates = {f"{step.sigma:.4f}": _named(columns[step.noise_expert], self._gates(request, step, mix)[0])
                     for step in grid.steps}
            facts["mixture"] = self.adapters.mixture_fingerprint()
            facts["moe"] = {"by": mix.source, "mix": _named(mix.families, mix.mix_1E[0]), "gates": gates}
        return facts


def _named(names: Sequence[str], values_G: Tensor) -> dict[str, float]:
    """Values by name, rounded to six digits."""
    return {name: round(value, 6) for name, value in zip(names, values_G.tolist(), strict=True)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lora_facts(adapters: AdapterSet) -> list[dict[str, Any]]:
    """Noise expert, file name, strength and fingerprint of every LoRA."""
    uses = [(e, use) for e, loras in adapters.loras.items() for use in loras] + list(adapters.mixture_base.items())
    return [
        {"noise_expert": e.value, "file": use.path.name, "strength": use.strength, "fingerprint": use.fingerprint}
        for e, use in uses
    ]


def to_frames(pixels_BCTHW: Tensor) -> np.ndarray:
    """[-1, 1] pixels [1, 3, T, H, W] -> uint8 frames [T, H, W, 3]: round(127.5·(x + 1)), clamped."""
    scaled = ((pixels_BCTHW[0].float().clamp(-1, 1) + 1.0) * 127.5).round()
    return scaled.permute(1, 2, 3, 0).to("cpu", torch.uint8).numpy()
