"""Videos from Python: `from lapwan import VideoGenerator`. The command `lapwan generate` is built on it.

    with VideoGenerator("tiny", moe="mixture.safetensors") as generator:
        generator.generate(prompt="电凝钩切割组织", instrument_hint="hook").save("out.mp4")
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import torch

from lapwan import console
from lapwan.distributed import Processes
from lapwan.errors import Interrupted, UserError
from lapwan.models.base import Base
from lapwan.models.device import pick_device, pick_dtype, unlimit_memory
from lapwan.models.resolve import check_components
from lapwan.models.spec import Task, task_with
from lapwan.sampling.adapters import AdapterSet, read_adapters
from lapwan.sampling.expert_mix import alpha_vector, choose_mix
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, check_request, completed, make_request
from lapwan.sampling.result import Video, record_of
from lapwan.sampling.start_image import as_rgb_image, open_image, read_clip
from lapwan.settings.generate import ModelSettings, VideoSettings
from lapwan.settings.load import given, load
from lapwan.settings.lora_argument import LoraArgument
from lapwan.settings.memory import GenerateDtype, precision_of
from lapwan.tiny.resolve import TINY, resolve_base

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["OnStep", "Prepared", "Video", "VideoGenerator", "VideoOptions"]

# A file, a PIL image, or an array: RGB uint8 or floats in [0, 1], numpy [H, W, 3], torch [3, H, W] or [1, 3, H, W].
ImageInput: TypeAlias = "str | Path | Image.Image | np.ndarray[Any, Any] | torch.Tensor"
# A file, `"high=FILE:0.8"`, a file and its strength, or a LoraArgument.
LoraInput: TypeAlias = "str | Path | LoraArgument | tuple[str | Path, float]"
# Called after each step with the steps done and all steps; False cancels.
OnStep: TypeAlias = "Callable[[int, int], bool | None]"

# Of all objects: diffusers and transformers patch torch.nn.Module for the whole process while they load weights.
_ONE_AT_A_TIME = threading.RLock()

_DTYPES: Mapping[torch.dtype, GenerateDtype] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}


class VideoOptions(TypedDict, total=False):
    """The options of a video besides prompt and seed, as `VideoGenerator.generate` documents them."""

    image: ImageInput | None
    last_image: ImageInput | None
    video: str | Path | None
    start_sigma: float | None
    negative_prompt: str | None
    instrument_hint: str | None
    alpha_base: float | None
    alpha_expert: float | Mapping[str, float] | None
    num_frames: int | None
    size: tuple[int, int] | None
    steps: int | None
    guidance: float | Mapping[str, float] | None
    guidance_interval: tuple[float, float] | None
    flow_shift: float | None
    boundary: float | None
    sigmas: Sequence[float] | None
    sampler: Literal["unipc", "euler", "dpmpp"]
    first_block_cache: float | Mapping[str, float] | None


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

    Thread-safe: one thread of a process generates at a time, with any object, and the others wait; several GPUs at once
    need several processes. As a context manager it closes itself, which frees the memory of host and device.

    Args:
        model: 'tiny' (embedded; image-to-video if an image is given, else text-to-video), a model folder in diffusers
            layout, a hub id, or a mapping as `[model]` in TOML: separate files, or a base with LoRAs merged in memory.
        moe: file of a mixture of LoRA experts.
        loras: one LoRA or several, each as a path, `"high=FILE:0.8"`, `(path, strength)` or a LoraArgument.
        device: auto, cpu, cuda or cuda:N, or a torch.device.
        dtype: of the transformers: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16 or fp16; fp8, int8 and nf4 quantise
            their blocks. A torch.dtype is accepted too. `text_dtype`: of the text encoder; auto: as stored.
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
        loras: LoraInput | Sequence[LoraInput] = (),
        device: str | torch.device = "auto",
        dtype: GenerateDtype | torch.dtype = "auto",
        text_dtype: Literal["auto", "fp8", "int8"] = "auto",
        memory: Literal["auto", "both", "one", "stream"] | float = "auto",
        compile: Literal["auto", "on", "off"] = "auto",
        fold: bool = False,
    ) -> None:
        options: dict[str, Any] = {
            "model": dict(model) if isinstance(model, Mapping) else str(model), "moe": moe, "device": str(device),
            "dtype": _dtype_name(dtype), "text_dtype": text_dtype, "memory": memory, "compile": compile, "fold": fold,
            "lora": _lora_options(loras),
        }
        self._start(load(ModelSettings, options=options, environment={}))

    def _start(self, settings: ModelSettings, device: str | None = None, processes: Processes | None = None) -> None:
        if settings.model is None:
            raise UserError("--model is required: 'tiny', or a model folder in diffusers layout")
        self.settings = settings
        self._busy, self._closed = False, False
        self._device, self._processes = pick_device(device or settings.device), processes
        self._generators: dict[Task | None, Generator] = {}
        self._warned = False
        self._bases: dict[Task | None, Base] = {}
        self._reported: set[str] = set()  # lines about LoRA files, which a grid opens again and again
        self._adapters: dict[tuple[Task | None, str, Path | None], tuple[Base, AdapterSet]] = {}

    @classmethod
    def from_settings(
        cls, settings: ModelSettings, device: str | None = None, processes: Processes | None = None
    ) -> VideoGenerator:
        """Build from validated settings. Several `processes`, each on its own `device`, share the work on a video.

        Args:
            settings: of the model and its adapters.
            device: overrides `settings.device`.
            processes: those that share each video; None: this one alone.
        """
        generator = cls.__new__(cls)
        model_settings = ModelSettings(**{name: getattr(settings, name) for name in ModelSettings.model_fields})
        generator._start(model_settings, device, processes)
        return generator

    def __enter__(self) -> VideoGenerator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release all weights and the device's memory, after a video that another thread is generating.

        Raises:
            UserError: called from `on_step`.
        """
        with _ONE_AT_A_TIME:
            if self._busy:
                raise UserError("close was called from on_step; return False there to cancel, and close afterwards")
            self._closed = True
            self._generators.clear()
            self._adapters.clear()
            self._bases.clear()
            gc.collect()  # adapters and transformers refer to each other
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
                if isinstance(self.settings.memory, float):
                    unlimit_memory(self._device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time: gates, offloading and prompt caches belong to one video."""
        with _ONE_AT_A_TIME:
            if self._closed:
                raise UserError("this VideoGenerator is closed; make a new one")
            if self._busy:
                raise UserError("generate was called from on_step of another video; call it after that one")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def generate(
        self,
        prompt: str,
        *,
        image: ImageInput | None = None,
        last_image: ImageInput | None = None,
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
        on_step: OnStep | None = None,
    ) -> Video:
        """Generate one video; None means the model's default.

        Args:
            prompt: what the video shows.
            image: first frame, for an image-to-video model, scaled and cropped to the size: a file, a PIL image, or
                RGB as uint8 or floats in [0, 1], numpy [H, W, 3] (such as another video's `frames[-1]`) or torch
                [3, H, W]. `last_image`: its last frame.
            video: start from this file's frames at noise level `start_sigma` in (0, 1] instead of from pure noise.
            negative_prompt: None is Wan's official one, "" none.
            instrument_hint: the mixture's expert: a family, an alias, or a mix such as "hook:0.7,suction:0.3".
            alpha_expert: strength of the mixture's experts, one number or by family. `alpha_base`: of its base LoRA.
            num_frames: 4N+1.
            size: (height, width) in pixels.
            steps: sampling steps.
            guidance: scale of classifier-free guidance, one number or {"high": 4, "low": 3}; 1 is none.
            guidance_interval: sigmas (low, high) between which guidance is applied.
            flow_shift: shift of the sigma schedule.
            boundary: sigma from which on the high noise expert is used.
            sigmas: custom noise levels, decreasing from at most 1, instead of `steps` and `flow_shift`.
            sampler: solver of the steps.
            first_block_cache: skip all blocks but the first in steps where the predicted relative error of the velocity
                is below this number; None: never. `reuse` is its older name.
            seed: of the noise; the same on every machine.
            on_step: called as `on_step(done, total)` after each step; returning False cancels, None or True continues.

        Raises:
            UserError: anything the model, the files or the numbers do not allow, before weights are loaded; the GPU's
                memory ran out; the object is closed.
            Interrupted: `on_step` returned False. The object can be used again.
        """
        if reuse is not None and first_block_cache is not None:
            raise UserError("reuse is the older name of first_block_cache, and both are given; leave reuse out")
        options: VideoOptions = {
            "image": image, "last_image": last_image, "video": video, "start_sigma": start_sigma,
            "negative_prompt": negative_prompt, "instrument_hint": instrument_hint, "alpha_base": alpha_base,
            "alpha_expert": alpha_expert, "num_frames": num_frames, "size": size, "steps": steps,
            "guidance": guidance, "guidance_interval": guidance_interval, "flow_shift": flow_shift,
            "boundary": boundary, "sigmas": sigmas, "sampler": sampler,
            "first_block_cache": reuse if first_block_cache is None else first_block_cache,
        }
        with self._alone():
            return self._make([self._prepared(prompt, seed, options)], on_step=on_step)[0]

    def generate_many(
        self, prompts: str | Sequence[str], *, seeds: int | Sequence[int] = 42, batch_size: int = 1,
        on_step: OnStep | None = None, **options: Unpack[VideoOptions],
    ) -> list[Video]:
        """Generate a video for each prompt and seed, in order; all are checked before the first.

        Args:
            prompts: one for all seeds, or as many as there are seeds.
            seeds: one for all prompts, or as many as there are prompts.
            batch_size: videos sampled together. More are faster where a video is small, take more memory, and may
                differ from a video generated alone in the last bits.
            on_step: called as `on_step(done, total)` after each step, counted over all videos; False cancels.
            options: as for `generate`, the same for all videos.

        Raises:
            UserError: see `generate`; numbers of prompts and seeds that do not match; a batch size below 1.
            Interrupted: `on_step` returned False; finished videos are lost.
        """
        if isinstance(prompts, str):
            prompts = [prompts] * (1 if isinstance(seeds, int) else len(seeds))
        seeds = [seeds] * len(prompts) if isinstance(seeds, int) else seeds
        if len(prompts) != len(seeds) or batch_size < 1:
            raise UserError(f"{len(prompts)} prompts, {len(seeds)} seeds, batch_size = {batch_size}: give one prompt "
                            "or one seed for all, or as many of both, and a batch size of 1 or more")
        with self._alone():
            prepared = [self._prepared(prompt, seed, options) for prompt, seed in zip(prompts, seeds, strict=True)]
            return self._make(prepared, batch_size, on_step=on_step)

    def _prepared(self, prompt: str, seed: int, options: VideoOptions) -> Prepared:
        plain: dict[str, Any] = {"prompt": prompt, "seed": seed, **options}
        images: dict[str, Any] = {}
        for name in ("image", "last_image"):
            if plain.get(name) is not None and not isinstance(plain[name], str | Path):
                images[name] = as_rgb_image(plain.pop(name), name)
        return self.prepare(load(VideoSettings, options=given(plain), environment={}), **images)

    def prepare(
        self, settings: VideoSettings, image: Image.Image | None = None, last_image: Image.Image | None = None,
        model: ModelSettings | None = None,
    ) -> Prepared:
        """Check a video against the model and the adapters without loading weights.

        Args:
            settings: of the video.
            image: the first frame, of any size; None: that of `settings`, if any.
            last_image: the last frame; None: that of `settings`, if any.
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
        """Generate a prepared video.

        Args:
            prepared: as `prepare` returns it.
            preview: a .png, rewritten after each step with three frames of the current estimate.

        Raises:
            UserError: out of GPU memory; the object is closed.
        """
        with self._alone():
            return self._make([prepared], preview=preview)[0]

    def _make(
        self, prepared: Sequence[Prepared], batch_size: int = 1, preview: Path | None = None,
        on_step: OnStep | None = None,
    ) -> list[Video]:
        videos: list[Video] = []
        for start in range(0, len(prepared), batch_size):
            batch = prepared[start : start + batch_size]
            first = batch[0]
            first.generator.use(first.base, first.adapters)
            try:
                made = first.generator.generate_videos(
                    [item.request for item in batch], preview,
                    _counted(on_step, len(videos), len(batch), len(prepared)))
            except torch.OutOfMemoryError as error:
                raise _out_of_memory(first, len(batch), error) from None
            finally:
                first.generator.noise_experts.finish_loading()  # a cancelled video may have begun to read the other one
            videos += [replace(video, settings=record_of(item.model, item.settings))
                       for video, item in zip(made, batch, strict=True)]
        return videos

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
        key = open_task, f"{chosen.lora} {chosen.fold} {chosen.key_rule}", chosen.moe
        if key not in self._adapters:
            if open_task not in self._bases:
                self._bases[open_task] = resolve_base(settings.model, open_task)
                check_components(self._bases[open_task].spec)
            self._adapters[key] = read_adapters(
                self._bases[open_task], chosen.lora, chosen.moe, chosen.fold, chosen.key_rule, self._reported)
        base, adapters = self._adapters[key]
        if open_task not in self._generators:
            dtype = pick_dtype(settings.dtype, self._device)
            self._generators[open_task] = Generator(
                base, adapters, self._device, dtype, settings.memory, settings.compile, precision_of(settings.dtype),
                precision_of(settings.text_dtype), self._processes)
        return self._generators[open_task], base, adapters


def _dtype_name(dtype: GenerateDtype | torch.dtype) -> GenerateDtype:
    if not isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UserError(f"dtype = {dtype}: allowed are {', '.join(map(str, _DTYPES))}, or a name such as 'nf4'")
    return _DTYPES[dtype]


def _lora_options(loras: LoraInput | Sequence[LoraInput]) -> list[Any]:
    """As the settings take them. A path and a number are one LoRA with its strength."""
    alone = isinstance(loras, str | Path | LoraArgument) or (
        isinstance(loras, tuple) and len(loras) == 2 and isinstance(loras[1], int | float))
    items: Any = [loras] if alone else loras
    return [{"path": str(item[0]), "strength": item[1]} if isinstance(item, tuple) else
            {"path": str(item)} if isinstance(item, Path) else item for item in items]


def _counted(on_step: OnStep | None, done: int, batch: int, count: int) -> Callable[[int, int], None] | None:
    """The callback of a batch: steps of all `count` videos, of which `done` are finished."""
    if on_step is None:
        return None

    def call(step: int, steps: int) -> None:
        position, total = done * steps + step * batch, count * steps
        if on_step(position, total) is False:
            raise Interrupted(f"cancelled by on_step after {position} of {total} steps")

    return call


def _out_of_memory(prepared: Prepared, videos: int, error: torch.OutOfMemoryError) -> UserError:
    height, width = prepared.request.size
    frames, reason = prepared.request.num_frames, str(error).splitlines()[0]
    memory_one = "" if prepared.model.memory == "one" else "--memory one, "
    together = "" if videos == 1 else f" with {videos} videos at a time"
    return UserError(f"the GPU's memory ran out at {height}x{width}, {frames} frames{together}: use {memory_one}a "
                     f"smaller --size or --num-frames, or --device cpu ({reason})")
