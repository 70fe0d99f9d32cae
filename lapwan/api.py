"""Videos from Python: `from lapwan import VideoGenerator`. The command `lapwan generate` is built on it.

    generator = VideoGenerator("tiny", moe="mixture.safetensors")
    generator.generate(prompt="电凝钩切割组织", instrument_hint="hook").save("out.mp4")
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lapwan import console
from lapwan.distributed import Processes
from lapwan.errors import UserError
from lapwan.models.base import Base
from lapwan.models.device import pick_device, pick_dtype
from lapwan.models.spec import Task, task_with
from lapwan.sampling.adapters import AdapterSet, read_adapters
from lapwan.sampling.expert_mix import alpha_vector, choose_mix
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, check_request, completed, make_request
from lapwan.sampling.result import Video
from lapwan.sampling.start_image import as_rgb_image, open_image, read_clip
from lapwan.settings.base import to_toml
from lapwan.settings.generate import ModelSettings, VideoSettings
from lapwan.settings.load import given, load
from lapwan.settings.lora_argument import LoraArgument
from lapwan.settings.memory import GenerateDtype, precision_of
from lapwan.tiny.resolve import TINY, resolve_base

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Prepared", "Video", "VideoGenerator"]


@dataclass(frozen=True)
class Prepared:
    """A video that has been checked and can be generated. `settings` has the model's defaults filled in."""

    generator: Generator
    base: Base
    adapters: AdapterSet
    request: Request
    settings: VideoSettings
    model: ModelSettings


class VideoGenerator:
    """A model with its adapters. Components are loaded when first needed and kept for the next video.

    Args:
        model: 'tiny' (embedded; image-to-video if an image is given, else text-to-video), a model folder in diffusers
            layout, a hub id, or a mapping as `[model]` in TOML: separate files, or a base with LoRAs merged in memory.
        moe: file of a mixture of LoRA experts.
        loras: LoRA files, each as a path, `"high=FILE:0.8"` or a LoraArgument.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the transformers: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16; fp8, int8 and nf4 quantise
            their blocks. `text_dtype`: of the text encoder; auto: as stored.
        memory: "both" keeps both noise experts on the device; "one" offloads the idle one to pinned host memory;
            "stream" also streams blocks from host memory; a number is a limit in GiB; "auto" takes the fastest that
            fits. The frames are the same in all cases.
        fold: merge the LoRAs into the weights in memory, rounded as by `merge`, instead of computing them beside the
            weights.
        compile: run the transformers' blocks through torch.compile; auto: on a GPU, if a video saves more time than
            compiling takes.

    Raises:
        UserError: an invalid argument. Files are read and checked with the first video.
    """

    def __init__(
        self,
        model: str | Path | Mapping[str, Any] = TINY,
        *,
        moe: str | Path | None = None,
        loras: Sequence[str | Path | LoraArgument] = (),
        device: str = "auto",
        dtype: GenerateDtype = "auto",
        text_dtype: Literal["auto", "fp8", "int8"] = "auto",
        memory: Literal["auto", "both", "one", "stream"] | float = "auto",
        compile: Literal["auto", "on", "off"] = "auto",
        fold: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "model": dict(model) if isinstance(model, Mapping) else str(model), "moe": moe, "device": device,
            "dtype": dtype, "text_dtype": text_dtype, "memory": memory, "compile": compile, "fold": fold,
            "lora": [lora if isinstance(lora, LoraArgument) else str(lora) for lora in loras],
        }
        self._start(load(ModelSettings, options=options, environment={}))

    def _start(self, settings: ModelSettings, device: str | None = None, processes: Processes | None = None) -> None:
        if settings.model is None:
            raise UserError("--model is required: 'tiny', or a model folder in diffusers layout")
        self.settings = settings
        self._device, self._processes = pick_device(device or settings.device), processes
        self._generators: dict[Task | None, Generator] = {}
        self._warned = False
        self._bases: dict[Task | None, Base] = {}
        self._adapters: dict[tuple[Task | None, str, Path | None], tuple[Base, AdapterSet]] = {}

    @classmethod
    def from_settings(
        cls, settings: ModelSettings, device: str | None = None, processes: Processes | None = None
    ) -> VideoGenerator:
        """Build from validated settings. Several `processes`, each on its own `device`, share the work on a video."""
        generator = cls.__new__(cls)
        model_settings = ModelSettings(**{name: getattr(settings, name) for name in ModelSettings.model_fields})
        generator._start(model_settings, device, processes)
        return generator

    def generate(
        self,
        prompt: str,
        *,
        image: str | Path | Image.Image | np.ndarray | None = None,
        last_image: str | Path | Image.Image | np.ndarray | None = None,
        video: str | Path | None = None,
        start_sigma: float | None = None,
        negative_prompt: str | None = None,
        instrument_hint: str | None = None,
        alpha_base: float | None = None,
        alpha_expert: float | Mapping[str, float] | None = None,
        num_frames: int | None = None,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float | Mapping[str, float] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        flow_shift: float | None = None,
        boundary: float | None = None,
        sigmas: Sequence[float] | None = None,
        sampler: Literal["unipc", "euler", "dpmpp"] = "unipc",
        first_block_cache: float | Mapping[str, float] | None = None,
        reuse: float | Mapping[str, float] | None = None,
        seed: int = 42,
    ) -> Video:
        """Generate one video; None means the model's default.

        Args:
            image: first frame for an image-to-video model: a file, an image, or uint8 RGB [H, W, 3] such as another
                video's `frames[-1]`. `last_image`: its last frame.
            video: start from this video at noise level `start_sigma` instead of from pure noise.
            negative_prompt: None is Wan's official one, "" none.
            instrument_hint: the mixture's expert: a family, an alias, or a mix such as "hook:0.7,suction:0.3".
            alpha_expert: strength of the mixture's experts, one number or by family. `alpha_base`: of its base LoRA.
            size: (height, width) in pixels.
            guidance: scale of classifier-free guidance, one number or {"high": 4, "low": 3}; 1 is none.
            guidance_interval: sigmas (low, high) between which guidance is applied.
            boundary: sigma from which on the high noise expert is used.
            sigmas: custom noise levels, decreasing from at most 1, instead of `steps` and `flow_shift`.
            first_block_cache: skip all blocks but the first in steps where the predicted relative error of the velocity
                is below this number; None: never. `reuse` is its older name.

        Raises:
            UserError: anything the model, the files or the numbers do not allow, before weights are loaded.
        """
        if reuse is not None and first_block_cache is not None:
            raise UserError("reuse is the older name of first_block_cache, and both are given; leave reuse out")
        first_block_cache = reuse if first_block_cache is None else first_block_cache
        options = {name: value for name, value in locals().items() if name in VideoSettings.model_fields}
        images = {}
        for name in ("image", "last_image"):
            if options[name] is not None and not isinstance(options[name], str | Path):
                images[name] = as_rgb_image(options.pop(name), name)
        prepared = self.prepare(load(VideoSettings, options=given(options), environment={}), **images)
        return self.make(prepared)

    def prepare(
        self, settings: VideoSettings, image: Image.Image | None = None, last_image: Image.Image | None = None,
        model: ModelSettings | None = None,
    ) -> Prepared:
        """Check a video against the model and the adapters without loading weights.

        Args:
            model: the same model with other LoRAs or another mixture; None: as constructed.

        Raises:
            UserError: see `generate`.
        """
        chosen = model or self.settings
        if settings.moe_options() and chosen.moe is None:
            name = settings.moe_options()[0].replace("_", "-")
            raise UserError(f"--{name} acts on a mixture; give one with --moe FILE")
        image = open_image(settings.image) if image is None and settings.image is not None else image
        if last_image is None and settings.last_image is not None:
            last_image = open_image(settings.last_image)
        generator, base, adapters = self._parts(task_with(image is not None), chosen)
        request = make_request(generator.spec, settings, image, last_image)
        check_request(generator.spec, request)
        self._check_mixture(adapters, request)
        if settings.video is not None:
            clip = read_clip(settings.video, request.num_frames, request.size, request.fps)
            request = replace(request, video_THWC=clip)
        return Prepared(generator, base, adapters, request, completed(settings, generator.spec, request), chosen)

    def make(self, prepared: Prepared, preview: Path | None = None) -> Video:
        """Generate a prepared video; `preview` as in `Generator.generate`.

        Raises:
            UserError: out of GPU memory.
        """
        prepared.generator.use(prepared.base, prepared.adapters)
        try:
            video = prepared.generator.generate(prepared.request, preview)
        except torch.OutOfMemoryError as error:
            height, width = prepared.request.size
            frames, reason = prepared.request.num_frames, str(error).splitlines()[0]
            memory_one = "" if prepared.model.memory == "one" else "--memory one, "
            raise UserError(f"the GPU's memory ran out at {height}x{width}, {frames} frames: use {memory_one}a smaller "
                            f"--size or --num-frames, or --device cpu ({reason})") from None
        model, options = _plain(prepared.model), _plain(prepared.settings)
        del model["memory"]  # offloading does not change the frames: a repetition on another machine chooses again
        return replace(video, settings={**model, **options})

    def _check_mixture(self, adapters: AdapterSet, request: Request) -> None:
        """Refuse a hint or a family that the taxonomy does not know; warn once if α_base has no base LoRA to act on."""
        mixture = adapters.mixture
        if mixture is None:
            return
        alpha_vector(mixture, request.alpha_expert)
        if request.hint is not None:
            choose_mix(mixture, request.prompt, request.hint, lambda: torch.empty(0))
        if request.alpha_base not in (None, 1.0) and not mixture.base_lora and not self._warned:
            self._warned = True
            alpha = f"alpha-base {request.alpha_base:g}"
            console.warn(f"{alpha} has no effect: this mixture was trained without a base LoRA")

    def _parts(self, task: Task, chosen: ModelSettings) -> tuple[Generator, Base, AdapterSet]:
        # Only `tiny` leaves the task open; a folder of the wrong task gets the clearer message of check_request.
        settings = self.settings
        assert settings.model is not None
        open_task = task if settings.model == TINY else None
        key = open_task, f"{chosen.lora} {chosen.fold}", chosen.moe
        if key not in self._adapters:
            if open_task not in self._bases:
                self._bases[open_task] = resolve_base(settings.model, open_task, generation=True)
            self._adapters[key] = read_adapters(self._bases[open_task], chosen.lora, chosen.moe, chosen.fold)
        base, adapters = self._adapters[key]
        if open_task not in self._generators:
            dtype = pick_dtype(settings.dtype, self._device)
            self._generators[open_task] = Generator(
                base, adapters, self._device, dtype, settings.memory, settings.compile, precision_of(settings.dtype),
                precision_of(settings.text_dtype), self._processes)
        return self._generators[open_task], base, adapters


def _plain(settings: ModelSettings | VideoSettings) -> dict[str, Any]:
    """In the types of TOML: absolute paths, None left out."""
    plain = tomllib.loads(to_toml(settings))
    for holder in (plain, plain.get("model")):
        if isinstance(holder, dict) and isinstance(name := holder.get("model"), str) and Path(name).is_dir():
            holder["model"] = str(Path(name).absolute())
    return plain
