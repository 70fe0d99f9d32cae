"""What one video is asked to be, with the model's own defaults filled in and everything checked before any work.

How to add a knob: a field of `Request`, its use in `generator`, a settings field with a Flag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lapwan.errors import UserError
from lapwan.models.spec import ModelSpec, check_frames, check_size
from lapwan.names import NoiseExpert
from lapwan.sampling.sigma_grid import Grid, SamplerName, make_grid

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

DEFAULT_START_SIGMA = 0.8  # of a video that starts from another

# The official default of Wan2.2 (sample_neg_prompt of its shared configuration).
OFFICIAL_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class Request:
    """One video. `guidance` by noise expert, 1 = none; `size` (height, width) in pixels.

    `flow_shift` and `boundary` (sigma from which on the high noise expert serves) None are the model's; `image` is the
    first frame, of any size, `last_image` the last; `sigmas` are instead of the sampler's own grid of `steps`;
    `video_THWC` uint8 frames to start from, noised to `start_sigma`; `hint` a family, alias or mix of the mixture's
    taxonomy; `alpha_expert` one number or one by family; `guidance_interval` the sigmas (low, high) that are guided;
    `first_block_cache` the error a step may make by keeping an earlier step's blocks, by noise expert (absent: none).
    """

    prompt: str
    num_frames: int
    size: tuple[int, int]
    steps: int
    guidance: Mapping[NoiseExpert, float]
    fps: int
    negative_prompt: str = OFFICIAL_NEGATIVE_PROMPT
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


def grid_of(spec: ModelSpec, request: Request) -> Grid:
    """The noise levels of a request, with the solver.

    Raises:
        UserError: no step is left below the sigma to start from.
    """
    return make_grid(
        spec, request.sampler, request.steps, request.flow_shift, request.start_sigma, request.boundary,
        request.sigmas)


def complete_guidance(spec: ModelSpec, asked: float | Mapping[NoiseExpert, float] | None) -> dict[NoiseExpert, float]:
    """Guidance for each noise expert of the model: what is asked for, else the model's own.

    Raises:
        UserError: below 1, or for a noise expert that the model lacks.
    """
    if asked is None or isinstance(asked, int | float):
        found = {e: spec.defaults.guidance[e] if asked is None else float(asked) for e in spec.noise_experts}
    else:
        for noise_expert in asked:
            if noise_expert not in spec.noise_experts:
                raise UserError(f"guidance is given for the {noise_expert.value} noise expert, which {spec.path} lacks")
        found = {e: float(asked.get(e, spec.defaults.guidance[e])) for e in spec.noise_experts}
    for noise_expert, value in found.items():
        if not (math.isfinite(value) and value >= 1.0):
            raise UserError(f"guidance {value:g} for the {noise_expert.value} noise expert: must be 1 (none) or more")
    return found


def default_size(spec: ModelSpec, image: Image.Image | None) -> tuple[int, int]:
    """(height, width): the model's own; with an image its aspect ratio at the model's area, as Wan's script does."""
    if image is None:
        return spec.defaults.size
    area, aspect, multiple = math.prod(spec.defaults.size), image.height / image.width, spec.pixel_multiple
    height = max(multiple, round(math.sqrt(area * aspect)) // multiple * multiple)
    width = max(multiple, round(math.sqrt(area / aspect)) // multiple * multiple)
    return height, width


def check_request(spec: ModelSpec, request: Request) -> None:
    """Refuse what the model cannot make.

    Raises:
        UserError: an image where none is taken or none where one is needed, frames, size, steps, an empty prompt.
    """
    if not request.prompt.strip():
        raise UserError("the prompt is empty; say what the video should show")
    if spec.task == "i2v" and request.image is None:
        raise UserError(f"{spec.path} is an image-to-video model; give the first frame with --image FILE")
    if spec.task == "t2v" and request.image is not None:
        raise UserError(f"{spec.path} is a text-to-video model and takes no image; leave --image out, "
                        "or use an image-to-video model")
    if request.last_image is not None and (request.image is None or request.num_frames < 2):
        raise UserError("a last frame needs a first one (--image) and more than one frame")
    if request.last_image is not None and spec.task == "ti2v":
        raise UserError(f"{spec.path} (TI2V-5B) takes a first frame only; leave --last-image out")
    check_frames(request.num_frames, spec.temporal_stride)
    check_size(*request.size, spec.pixel_multiple)
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
