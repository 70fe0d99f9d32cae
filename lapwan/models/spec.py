"""The spec of a model folder in diffusers layout: capabilities, noise experts, boundary, channels, strides. No torch.

How to add a base model in diffusers layout: a `ModelFamily` here and its case in `_family_of`, which reads the
checkpoint. What differs between models is read from the spec (`requires_image`, `clean_first_frame`, `image_channels`,
...); task names are compared only with a name that a file or the user gives. Original files: `separate_files`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lapwan.checkpoints.fingerprints import checkpoint_fingerprint
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.checkpoints.weights import read_weights
from lapwan.documents import checked
from lapwan.errors import UserError
from lapwan.files import inside
from lapwan.models.configs import (
    DefaultsOfModel,
    ModelIndex,
    SchedulerConfig,
    component_config,
    read_file,
    read_object,
)
from lapwan.names import Band, NoiseExpert, bands

Task = Literal["t2v", "i2v", "ti2v"]  # ti2v: with or without a first frame
TEXT_LENGTH = 512  # tokens; Wan also attends to the zero rows that pad the text


@dataclass(frozen=True)
class Defaults:
    """A model's default sampling settings; `guidance` per noise expert, `size` is (height, width) in pixels."""

    steps: int
    guidance: dict[NoiseExpert, float]
    size: tuple[int, int]
    num_frames: int
    fps: int


@dataclass(frozen=True)
class ModelFamily:
    """What the models of a family have in common.

    Args:
        title: the name that users know.
        task: the name in caches, mixtures and metadata.
        release: as other tools show it in a LoRA's metadata.
        image: whether a video starts from a given first frame.
        clean_first_frame: that frame is the first latent frame of x, at noise level 0 by timesteps per token; False: it
            comes in `ModelSpec.image_channels`.
    """

    title: str
    task: Task
    defaults: Defaults
    release: Literal["wan2.1", "wan2.2", "wan_2.2_5b"] = "wan2.2"
    image: Literal["none", "optional", "required"] = "none"
    clean_first_frame: bool = False


_T2V_21 = ModelFamily(
    "Wan2.1 T2V", "t2v", Defaults(50, {NoiseExpert.HIGH: 5.0}, (480, 832), 81, 16), release="wan2.1")
T2V_A14B = ModelFamily(
    "T2V-A14B", "t2v", Defaults(40, {NoiseExpert.HIGH: 4.0, NoiseExpert.LOW: 3.0}, (480, 832), 81, 16))
_I2V_A14B = ModelFamily(
    "I2V-A14B", "i2v", Defaults(40, {NoiseExpert.HIGH: 3.5, NoiseExpert.LOW: 3.5}, (480, 832), 81, 16),
    image="required")
_TI2V_5B = ModelFamily(
    "TI2V-5B", "ti2v", Defaults(50, {NoiseExpert.HIGH: 5.0}, (704, 1280), 121, 24), release="wan_2.2_5b",
    image="optional", clean_first_frame=True)
_TASKS: dict[str, tuple[Task, ...]] = {"none": ("t2v",), "required": ("i2v",), "optional": ("ti2v", "t2v", "i2v")}
ORIGINAL = "original"  # stem of a link to weights in the original layout: original.pth, original.safetensors
OTHER_WEIGHTS = (".sft", ".gguf", ".bin", ".pth", ".pt", ".ckpt")  # suffixes of weights beside .safetensors
DEFAULTS_FILE = "lapwan.json"  # optional, in the model folder: overrides the defaults (the embedded model has one)


@dataclass(frozen=True)
class ModelSpec:
    """A model folder, read and checked.

    `boundary` is a sigma; `pixel_multiple` is what height and width must divide by; `spatial_stride` and
    `temporal_stride` are the VAE's; `latent_channels` its z_dim; `positions` is the longest axis of tokens that the
    transformers tell apart.
    """

    path: Path
    family: ModelFamily
    noise_experts: tuple[NoiseExpert, ...]
    boundary: float | None
    in_channels: int
    latent_channels: int
    num_layers: int
    text_dim: int
    flow_shift: float
    temporal_stride: int
    spatial_stride: int
    pixel_multiple: int
    defaults: Defaults
    positions: int = 1024

    @property
    def task(self) -> Task:
        """The name of the model's task in caches, mixtures and metadata."""
        return self.family.task

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the model can be asked for."""
        return _TASKS[self.family.image]

    @property
    def takes_image(self) -> bool:
        """Whether a video can start from a given first frame."""
        return self.family.image != "none"

    @property
    def requires_image(self) -> bool:
        """Whether every video starts from a given first frame."""
        return self.family.image == "required"

    @property
    def clean_first_frame(self) -> bool:
        """Whether a given first frame is the first latent frame of x, at noise level 0."""
        return self.family.clean_first_frame

    @property
    def image_channels(self) -> int:
        """Input channels of the image condition, mask and latents; 0: the model has none."""
        return self.in_channels - self.latent_channels

    @property
    def takes_last_image(self) -> bool:
        """Whether the last frame can be given too: the mask of the image condition marks it."""
        return self.image_channels > 0

    @property
    def bands(self) -> dict[NoiseExpert, Band]:
        """Sigma band by noise expert."""
        return bands(self.boundary)

    @property
    def one_transformer(self) -> bool:
        """Whether a single transformer covers all noise; it goes by `NoiseExpert.HIGH`."""
        return len(self.noise_experts) == 1

    def title_of(self, noise_expert: NoiseExpert) -> str:
        """A noise expert in messages: `high noise expert`, or `transformer` where the model has only one."""
        return "transformer" if self.one_transformer else f"{noise_expert.value} noise expert"

    @property
    def patch(self) -> int:
        """Latent pixels along a side of a token."""
        return self.pixel_multiple // self.spatial_stride

    def file_suffix(self, noise_expert: NoiseExpert) -> str:
        """`_high_noise` in the name of a noise expert's LoRA file; empty where the model has one transformer."""
        return "" if self.one_transformer else f"_{noise_expert.file_suffix}"

    @property
    def boundary_text(self) -> str:
        """The boundary for messages."""
        return "none" if self.boundary is None else f"{self.boundary:g}"

    def component(self, noise_expert: NoiseExpert) -> Path:
        """The folder of a noise expert's transformer."""
        return self.path / noise_expert.component

    def fingerprint(self, noise_expert: NoiseExpert) -> str:
        """Identity of a noise expert's weights; in a merged folder, of base and LoRAs."""
        return checkpoint_fingerprint(weight_files(self.component(noise_expert)))

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(channels, latent frames, latent height, latent width) of a clip of `frames` frames of height x width pixels.

        Raises:
            UserError: as `check_clip`.
        """
        self.check_clip(frames, height, width)
        stride = self.spatial_stride
        return self.latent_channels, (frames - 1) // self.temporal_stride + 1, height // stride, width // stride

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Refuse a clip that the model cannot take.

        Raises:
            UserError: frames not 4N+1, a size not divisible by the VAE's stride times the patch size, or more of either
                than the transformers have positions.
        """
        check_frames(frames, self.temporal_stride)
        check_size(height, width, self.pixel_multiple)
        sides = ((frames - 1) // self.temporal_stride + 1, height // self.pixel_multiple, width // self.pixel_multiple)
        if max(sides) > self.positions:
            most = self.positions * self.pixel_multiple
            raise UserError(f"{frames} frames of {height}x{width}: the model takes sides of at most {most} pixels, and "
                            f"{(self.positions - 1) * self.temporal_stride + 1} frames; give fewer")


def check_frames(frames: int, stride: int = 4) -> None:
    """Refuse a frame count that is not stride·N + 1."""
    if frames < 1 or (frames - 1) % stride:
        below = max(1, (frames - 1) // stride * stride + 1)
        raise UserError(
            f"frames = {frames}: must be {stride}N+1 (1, {stride + 1}, {2 * stride + 1}, ...); "
            f"the nearest are {below} and {below + stride}"
        )


def check_size(height: int, width: int, multiple: int = 16) -> None:
    """Refuse a size in pixels that is not divisible by `multiple`."""
    if height < multiple or width < multiple or height % multiple or width % multiple:
        near = [max(multiple, round(n / multiple) * multiple) for n in (height, width)]
        raise UserError(
            f"size {height}x{width} (height x width): both must be multiples of {multiple}; try {near[0]}x{near[1]}"
        )


_NAME = re.compile(  # diffusion_pytorch_model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<a>\w+))?(?:-\d+(?:-of-\d+)?)?(?:\.(?P<b>\w+))?\.safetensors")
_INDEX = re.compile(r"\.safetensors(?:\.index)?(?:\.(?P<a>\w+))?(?:\.index)?\.json$")


_SHARD = re.compile(r"-(\d+)-of-(\d+)\b")


def _variant(name: str) -> str:
    """diffusers' variant in a weight file's name, such as fp16; empty: none, or a name of another tool."""
    match = _NAME.fullmatch(name)
    return (match["a"] or match["b"] or "") if match else ""


def _index_variant(name: str) -> str:
    stem, match = name.partition(".safetensors")[0], _INDEX.search(name)
    return (match["a"] if match else None) or stem.partition(".")[2]


def weight_files(folder: Path) -> list[Path]:
    """A component's weight files: one, or the shards its index names, or those of other formats.

    Of several variants (`diffusion_pytorch_model.fp16.safetensors`) the one without a variant's name.

    Raises:
        UserError: none there, a shard is missing, its name leads out of the folder, or several variants.
    """
    indices = sorted(f for f in folder.glob("*.safetensors*.json") if ".index." in f.name)
    indexed = {_index_variant(index.name): _shards(folder, index) for index in indices}
    variants = dict(indexed)
    for file in sorted(folder.glob("*.safetensors")):
        if (variant := _variant(file.name)) not in indexed:
            variants.setdefault(variant, []).append(file)
    if "" not in variants and len(variants) > 1:
        raise UserError(f"{folder} has variants of its weights: {', '.join(sorted(variants))}; keep one")
    files = variants.get("") or next(iter(variants.values()), None) or next(
        (other for suffix in OTHER_WEIGHTS if (other := sorted(folder.glob(f"*{suffix}")))), [])
    if not files:
        raise UserError(f"no .safetensors or .gguf weights in {folder}; is the download complete?")
    if len(files) > 1 and files[0].suffix == ".gguf":
        raise UserError(f"{folder} has several GGUF files: {', '.join(f.name for f in files)}; keep one")
    check_shards(files)
    return files


def transformer_folders(path: Path) -> dict[NoiseExpert, Path]:
    """A folder's own folders of transformers: `transformer` and `transformer_2`, or those of the original release."""
    names = {e: (e.component, f"{e.value}_noise_model") for e in NoiseExpert}
    return {e: path / name for e, choices in names.items() for name in choices if (path / name).is_dir()}


def check_shards(files: Sequence[Path]) -> None:
    """Check by their names (`...-00001-of-00006...`) that no shard is missing.

    Raises:
        UserError: one is, or a single one is given whose folder holds the others.
    """
    numbers = {int(match[1]): int(match[2]) for file in files if (match := _SHARD.search(file.name))}
    missing = [n for n in range(1, max(numbers.values(), default=0) + 1) if n not in numbers]
    if not missing:
        return
    total, first = max(numbers.values()), files[0]
    others = [f for f in first.parent.glob(f"*{first.suffix}") if _SHARD.search(f.name)]
    if len(others) > len(files):
        raise UserError(f"{first} is one of {total} shards; give their folder: {first.parent}")
    raise UserError(f"{first.parent} lacks shards {', '.join(map(str, missing))} of {total}; is the download complete?")


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map (tensor name -> file name); download it again")
    files = sorted({inside(folder, name, index) for name in weight_map.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index} names files that are missing: {', '.join(missing)}; copy the folder again")
    return files


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shape by name in diffusers' layout, of a transformer's files in any layout, from their headers.

    Raises:
        UserError: one weight twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, info in read_weights(file).tensors.items():
            ours = tensor_to_diffusers(name)
            if ours in names:
                other, first = names[ours]
                where = f"{file} holds '{first}' and" if other == file else f"{other} and {file} both hold"
                raise UserError(f"{where} '{name}', the same weight twice; keep one model in a file or folder")
            shapes[ours], names[ours] = tuple(info.shape), (file, name)
    return shapes


def original_file(folder: Path) -> Path | None:
    """A VAE's or text encoder's weights in the original layout, if `separate_files.make_folder` linked them."""
    return next(iter(sorted(folder.glob(f"{ORIGINAL}.*"))), None)


def component_files(folder: Path) -> list[Path]:
    """The weight files of a VAE or text encoder: that in the original layout, or as `weight_files`."""
    original = original_file(folder)
    return weight_files(folder) if original is None else [original]


def image_encoder_error(name: object, what: str) -> UserError:
    """Of a Wan2.1 image-to-video model or transformer."""
    return UserError(f"{name} is a Wan2.1 image-to-video {what}, which needs an image encoder; lapwan does not support "
                     "it: use Wan2.2 I2V-A14B")


def _present(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and any(part is not None for part in entry)


def task_with(image: bool) -> Task:
    """The task that is meant by giving an image, or none, where a name such as `tiny` names several models."""
    return "i2v" if image else "t2v"


def task_named(name: str | None) -> Task | None:
    """The task that a file names; None: none that is known."""
    return next((task for task in get_args(Task) if task == name), None)


def _family_of(
    in_channels: int, latent_channels: int, temporal_stride: int, per_token: bool, boundary: float | None, path: Path
) -> ModelFamily:
    if per_token and in_channels == latent_channels:
        return _TI2V_5B
    if in_channels == latent_channels == 16:
        return _T2V_21 if boundary is None else T2V_A14B
    if in_channels == 2 * latent_channels + temporal_stride:  # latent | mask | condition
        return _I2V_A14B
    raise UserError(
        f"{path}: a transformer with {in_channels} input channels over a VAE of {latent_channels} is not supported; "
        "Wan2.2 T2V-A14B (16 over 16), I2V-A14B (36 over 16) and TI2V-5B (48 over 48) are"
    )


def _noise_experts(folder: Path, index: dict[str, Any], boundary: float | None) -> tuple[NoiseExpert, ...]:
    two = _present(index, "transformer_2")
    if boundary is not None and not two:
        raise UserError(
            f"{folder} has a boundary_ratio ({boundary}) but no transformer_2: the low noise expert is missing; "
            "download the whole model, or remove boundary_ratio from model_index.json for a single transformer"
        )
    if boundary is None and two:
        raise UserError(
            f"{folder} has a transformer_2 but no boundary_ratio in model_index.json, the sigma at which the noise "
            "experts switch; add it (Wan2.2 T2V-A14B 0.875, I2V-A14B 0.9)"
        )
    return (NoiseExpert.HIGH, NoiseExpert.LOW) if two else (NoiseExpert.HIGH,)


def _defaults(folder: Path, base: Defaults) -> Defaults:
    file = folder / DEFAULTS_FILE
    if not file.is_file():
        return base
    values = read_file(file, DefaultsOfModel)
    height, width = values.size or base.size
    return Defaults(values.steps or base.steps, values.guidance or base.guidance, (height, width),
                    values.num_frames or base.num_frames, values.fps or base.fps)


def read_spec(folder: Path) -> ModelSpec:
    """Read and check a model folder in diffusers layout.

    Raises:
        UserError: no such folder, an incomplete one, or a model that lapwan does not support.
    """
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}; MODEL is 'tiny', 'tiny-t2v', 'tiny-i2v' or a diffusers folder")
    index = read_object(folder / "model_index.json")
    pipeline = checked(index, ModelIndex, folder / "model_index.json")
    boundary = pipeline.boundary_ratio
    noise_experts = _noise_experts(folder, index, boundary)
    transformers = {e: component_config(folder / e.component) for e in noise_experts}
    main = transformers[noise_experts[0]]
    for noise_expert, config in transformers.items():
        for key in ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim"):
            if config.get(key) != main.get(key):
                raise UserError(f"{folder}: {noise_expert.component}'s {key} is {config.get(key)}, but the other "
                                f"noise expert's is {main.get(key)}; they belong to different models")
    if main.get("image_dim") is not None:
        raise image_encoder_error(folder, "model")
    vae = component_config(folder / "vae")
    scheduler = read_file(folder / "scheduler" / "scheduler_config.json", SchedulerConfig)
    temporal, spatial = int(vae.get("scale_factor_temporal") or 4), int(vae.get("scale_factor_spatial") or 8)
    per_token = bool(pipeline.expand_timesteps)
    family = _family_of(int(main["in_channels"]), int(vae["z_dim"]), temporal, per_token, boundary, folder)
    return ModelSpec(
        path=folder, family=family, noise_experts=noise_experts, boundary=boundary,
        in_channels=int(main["in_channels"]), latent_channels=int(vae["z_dim"]), num_layers=int(main["num_layers"]),
        text_dim=int(main["text_dim"]), flow_shift=scheduler.flow_shift or scheduler.shift or 1.0,
        temporal_stride=temporal, spatial_stride=spatial, pixel_multiple=spatial * int(main["patch_size"][1]),
        defaults=_defaults(folder, family.defaults), positions=int(main.get("rope_max_seq_len") or 1024),
    )
