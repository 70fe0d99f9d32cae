"""A request for one video: its options with the model's defaults filled in, and their checks.

How to add an option of a video: see `lapwan.settings.generate`. Here it is a field of `Request` with the same name,
which the generator reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lapwan.errors import UserError
from lapwan.models.spec import ModelSpec
from lapwan.names import NEGATIVE_PROMPT, NoiseExpert
from lapwan.sampling.scheduler import Grid, SamplerName, make_grid
from lapwan.settings.generate import VideoSettings

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

DEFAULT_START_SIGMA = 0.8  # of video-to-video


@dataclass(frozen=True)
class Request:
    """One video.

    Args:
        size: (height, width) in pixels.
        guidance: strength by noise expert; 1: none.
        image: the first frame, of any size; `last_image`: the last.
        video_THWC: uint8 frames to start from (video-to-video), noised to `start_sigma`.
        flow_shift: None: the model's.
        boundary: sigma at and above which the high noise expert is used; None: the model's.
        sigmas: `steps` falling sigmas instead of the sampler's grid.
        hint: a family, alias or mix of the mixture's taxonomy.
        alpha_expert: one number, or one by family.
        guidance_interval: (low, high), the sigmas with guidance.
        first_block_cache: tolerated relative error of a step that skips its blocks, by noise expert (absent: exact).
    """

    prompt: str
    num_frames: int
    size: tuple[int, int]
    steps: int
    guidance: Mapping[NoiseExpert, float]
    fps: int
    negative_prompt: str = NEGATIVE_PROMPT
    image: Image.Image | None = None
    last_image: Image.Image | None = None
    video_THWC: np.ndarray | None = None
    start_sigma: float = 1.0
    flow_shift: float | None = None
    boundary: float | None = None
    sigmas: tuple[float, ...] | None = None
    sampler: SamplerName = "unipc"
    seed: int = 42
    hint: str | None = None
    alpha_base: float | None = None
    alpha_expert: float | Mapping[str, float] | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    first_block_cache: Mapping[NoiseExpert, float] = field(default_factory=dict)


def make_request(
    spec: ModelSpec, settings: VideoSettings, image: Image.Image | None = None, last_image: Image.Image | None = None
) -> Request:
    """The request of a video: its options under the same names, and defaults for those that are not given.

    Args:
        spec: the model.
        settings: the options as given; None: not given.
        image: the first frame, of any size, for an image-to-video model.
        last_image: the last frame, of any size.

    Raises:
        UserError: guidance or a first-block cache for a noise expert that the model lacks, or a start sigma without a
            video.
    """
    if settings.start_sigma is not None and settings.video is None:
        raise UserError("--start-sigma is the noise level added to a starting video; give one with --video FILE")
    defaults, given = spec.defaults, _given(settings)
    options: dict[str, Any] = {
        "num_frames": defaults.num_frames, "size": default_size(spec, image), "prompt": "",
        "steps": len(settings.sigmas or ()) or defaults.steps,
        "start_sigma": 1.0 if settings.video is None else DEFAULT_START_SIGMA, **given,
        "image": image, "last_image": last_image, "fps": defaults.fps, "hint": settings.instrument_hint,
        "guidance": complete_guidance(spec, settings.guidance),
        "first_block_cache": by_noise_expert(spec, "first_block_cache", settings.first_block_cache),
    }
    return Request(**options)


def _given(settings: VideoSettings) -> dict[str, Any]:
    named = {option.name: getattr(settings, option.name, None) for option in fields(Request)}
    return {name: value for name, value in named.items() if value is not None}


def completed(settings: VideoSettings, spec: ModelSpec, request: Request) -> VideoSettings:
    """The settings that repeat a request, whatever the model's defaults become.

    Args:
        settings: those from which the request was made.
        spec: the model.
        request: as `make_request` returns it.
    """
    video = VideoSettings(**{name: getattr(settings, name) for name in VideoSettings.model_fields})
    return video.model_copy(update={
        "num_frames": request.num_frames, "size": request.size, "steps": request.steps,
        "guidance": dict(request.guidance), "negative_prompt": request.negative_prompt,
        "flow_shift": request.flow_shift or (spec.flow_shift if request.sigmas is None else None),
        "boundary": spec.boundary if request.boundary is None else request.boundary,
        "start_sigma": request.start_sigma if settings.video is not None else None,
    })


def grid_of(spec: ModelSpec, request: Request) -> Grid:
    """The sigma grid of a request, with its solver.

    Args:
        spec: the model, whose flow shift and boundary hold where the request has none.
        request: the video.

    Raises:
        UserError: no step is left below the start sigma.
    """
    return make_grid(
        spec, request.sampler, request.steps, request.flow_shift, request.start_sigma, request.boundary,
        request.sigmas)


def complete_guidance(spec: ModelSpec, given: float | Mapping[NoiseExpert, float] | None) -> dict[NoiseExpert, float]:
    """Guidance for each noise expert of the model: the given value, else the model's default.

    Args:
        spec: the model.
        given: one strength for all noise experts, or one for each; None: the defaults.

    Raises:
        UserError: below 1, or for a noise expert that the model lacks.
    """
    values = by_noise_expert(spec, "guidance", given)
    guidance = {e: values.get(e, float(spec.defaults.guidance[e])) for e in spec.noise_experts}
    for noise_expert, value in guidance.items():
        if not (math.isfinite(value) and value >= 1.0):
            raise UserError(f"guidance {value:g} for the {noise_expert.value} noise expert: must be 1 (none) or more")
    return guidance


def by_noise_expert(
    spec: ModelSpec, option: str, given: float | Mapping[NoiseExpert, float] | None
) -> dict[NoiseExpert, float]:
    """An option's values by noise expert: a single number applies to all, None to none.

    Args:
        spec: the model.
        option: its name, for the message.
        given: the value or values.

    Raises:
        UserError: a value for a noise expert that the model lacks.
    """
    if given is None:
        return {}
    if isinstance(given, int | float):
        return dict.fromkeys(spec.noise_experts, float(given))
    for noise_expert in given:
        if noise_expert not in spec.noise_experts:
            raise UserError(f"{option} is given for the {noise_expert.value} noise expert, which {spec.path} lacks")
    return {noise_expert: float(value) for noise_expert, value in given.items()}


def default_size(spec: ModelSpec, image: Image.Image | None) -> tuple[int, int]:
    """(height, width): the model's default; with an image, its aspect ratio at the default area, as in Wan's script.

    Args:
        spec: the model.
        image: the first frame, or None.

    Returns:
        Height and width in pixels, multiples of `spec.pixel_multiple`.
    """
    if image is None:
        return spec.defaults.size
    area, aspect, multiple = math.prod(spec.defaults.size), image.height / image.width, spec.pixel_multiple
    height = max(multiple, round(math.sqrt(area * aspect)) // multiple * multiple)
    width = max(multiple, round(math.sqrt(area / aspect)) // multiple * multiple)
    return height, width


def check_request(spec: ModelSpec, request: Request) -> None:
    """Check a request against the model.

    Args:
        spec: the model.
        request: as `make_request` returns it.

    Raises:
        UserError: an empty prompt, an image for a text-to-video model or none for an image-to-video model, or frames,
            size, steps, shift or sigmas that the model cannot use.
    """
    if not request.prompt.strip():
        raise UserError("the prompt is empty; say what the video should show")
    if spec.requires_image and request.image is None:
        raise UserError(f"{spec.path} is an image-to-video model; give the first frame with --image FILE")
    if not spec.takes_image and request.image is not None:
        raise UserError(f"{spec.path} is a text-to-video model and takes no image; leave --image out, "
                        "or use an image-to-video model")
    if request.last_image is not None and (request.image is None or request.num_frames < 2):
        raise UserError("a last frame needs a first one (--image) and more than one frame")
    if request.last_image is not None and not spec.takes_last_image:
        raise UserError(f"{spec.path} ({spec.family.title}) takes a first frame only; leave --last-image out")
    spec.check_clip(request.num_frames, *request.size)
    if request.steps < 1:
        raise UserError(f"steps = {request.steps}: must be 1 or more")
    if request.flow_shift is not None and not (math.isfinite(request.flow_shift) and request.flow_shift > 0):
        raise UserError(f"flow shift = {request.flow_shift:g}: must be above 0")
    if request.boundary is not None and len(spec.noise_experts) < 2:
        raise UserError(f"{spec.path} has one transformer for all noise; leave --boundary out")
    if request.sigmas is not None and len(request.sigmas) != request.steps:
        raise UserError(f"{len(request.sigmas)} sigmas are given and {request.steps} steps; leave --steps out")
    if request.sigmas is not None and request.flow_shift is not None:
        raise UserError("--sigmas are the noise levels themselves; leave --flow-shift out")
