"""`lapwan generate`: a prompt, and an image for image-to-video, to a video file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lapwan import console
from lapwan.commands.model import TINY, resolve
from lapwan.errors import UserError
from lapwan.files import claim_output
from lapwan.sampling.adapters import AdapterSet, read_adapters
from lapwan.sampling.generator import Generator
from lapwan.sampling.grid import make_grid
from lapwan.sampling.image import open_image
from lapwan.sampling.request import OFFICIAL_NEGATIVE_PROMPT, Request, check_request, complete_guidance, default_size
from lapwan.sampling.routing import alpha_vector, choose_mix
from lapwan.sampling.video import check_video_path
from lapwan.settings.base import to_toml
from lapwan.settings.generate import GenerateSettings
from lapwan.settings.run import RunOptions
from lapwan.wan.folder import ModelSpec

if TYPE_CHECKING:
    from PIL import Image


def run(settings: GenerateSettings, options: RunOptions) -> None:
    """Check everything against headers, then load, sample and write."""
    check_mixture_options(settings)
    image = None if settings.image is None else open_image(settings.image)
    # Only `tiny` leaves the task open; a folder of the wrong task gets the clearer message of check_request.
    spec = resolve(settings.model, ("t2v" if image is None else "i2v") if settings.model == TINY else None)
    request = make_request(spec, settings, image)
    settings = resolved(settings, spec, request)
    check_request(spec, request)
    claim_output(settings.output, options.overwrite)
    check_video_path(settings.output, request.num_frames, request.size)
    device, dtype = choose_device(settings.device, settings.dtype)
    adapters = read_adapters(spec, settings.lora, settings.moe)
    check_mixture_values(adapters, request)
    grid = make_grid(spec, request.sampler, request.steps, request.flow_shift)
    height, width = request.size
    console.log(f"{spec.task} at {height}x{width}, {request.num_frames} frames at {request.fps} fps; {grid}")
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        return
    video = Generator(spec, adapters, device, dtype).generate(request)
    video = replace(video, settings=settings.model_dump(mode="json", exclude_none=True))
    path = video.save(settings.output, overwrite=options.overwrite)
    console.results.print(str(path), markup=False)


def check_mixture_options(settings: GenerateSettings) -> None:
    """Refuse a mixture's options without a mixture: they would do nothing."""
    if settings.moe is None:
        for name in ("instrument_hint", "alpha_base", "alpha_expert"):
            if getattr(settings, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} acts on a mixture; give one with --moe FILE")


def check_mixture_values(adapters: AdapterSet, request: Request) -> None:
    """Refuse a hint or a family that the mixture's taxonomy does not know; warn where α_base has nothing to act on."""
    mixture = adapters.mixture
    if mixture is None:
        return
    alpha_vector(mixture, request.alpha_expert)
    if request.hint is not None:
        choose_mix(mixture, request.prompt, request.hint, lambda: torch.empty(0))
    if request.alpha_base is not None and not mixture.base_lora:
        console.warn(f"alpha-base {request.alpha_base:g} has no effect: this mixture was trained without a base LoRA")


def resolved(settings: GenerateSettings, spec: ModelSpec, request: Request) -> GenerateSettings:
    """The settings with what the model filled in: what is printed, and stored with the video."""
    return settings.model_copy(update={
        "num_frames": request.num_frames, "size": request.size, "steps": request.steps,
        "guidance": dict(request.guidance), "negative_prompt": request.negative_prompt,
        "flow_shift": spec.flow_shift if request.flow_shift is None else request.flow_shift,
    })


def make_request(spec: ModelSpec, settings: GenerateSettings, image: Image.Image | None) -> Request:
    """The settings with the model's own values where nothing is said."""
    negative = settings.negative_prompt
    return Request(
        prompt=settings.prompt,
        negative_prompt=OFFICIAL_NEGATIVE_PROMPT if negative is None else negative,
        image=image,
        num_frames=settings.num_frames or spec.defaults.num_frames,
        size=settings.size or default_size(spec, image),
        steps=settings.steps or spec.defaults.steps,
        guidance=complete_guidance(spec, settings.guidance),
        fps=spec.defaults.fps,
        flow_shift=settings.flow_shift,
        sampler=settings.sampler,
        seed=settings.seed,
        hint=settings.instrument_hint,
        alpha_base=settings.alpha_base,
        alpha_expert=settings.alpha_expert,
    )


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """`auto` is the GPU if there is one, in bf16; else the CPU in fp32.

    Raises:
        UserError: a GPU that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype)
    return chosen, kind or (torch.bfloat16 if chosen.type == "cuda" else torch.float32)
