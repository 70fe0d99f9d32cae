"""The JSON files of a model folder as types: what lapwan and the classes of diffusers and transformers read of them.

A file is checked whole when it is read, so that a wrong value is named here and not by a class that is built from it.
Keys that are not listed are left as they are. Sizes are bounded, since the classes allocate by them.

How to add a component: a class here and its row in `_COMPONENTS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from lapwan.checkpoints.container import file_kind
from lapwan.documents import JSON_BYTES, Count, Number, checked, read_json
from lapwan.errors import UserError
from lapwan.names import NoiseExpert

_Layers = Annotated[int, Field(strict=True, ge=1, le=1000)]
_Width = Annotated[int, Field(strict=True, ge=1, le=65536)]
_Rate = Annotated[float, Field(strict=True, ge=0, le=1)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Shift = Annotated[float, Field(strict=True, gt=0, le=1000)]
_Flag = Annotated[bool, Field(strict=True)]


class ModelFile(BaseModel):
    """Base of the files; protected namespaces are off since a file has keys such as `model_type`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


F = TypeVar("F", bound=ModelFile)


class ModelIndex(ModelFile):
    """`model_index.json`."""

    boundary_ratio: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    expand_timesteps: _Flag | None = None


class SchedulerConfig(ModelFile):
    """`scheduler/scheduler_config.json`: of UniPC, and of Euler, which calls the shift by another name."""

    flow_shift: _Shift | None = None
    shift: _Shift | None = None
    num_train_timesteps: Count = 1000
    solver_order: Annotated[int, Field(strict=True, ge=1, le=3)] = 2
    beta_start: Number = 0.0001
    beta_end: Number = 0.02
    thresholding: _Flag = False
    predict_x0: _Flag = True
    lower_order_final: _Flag = True
    disable_corrector: list[Annotated[int, Field(strict=True)]] = []
    steps_offset: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0


class DefaultsOfModel(ModelFile):
    """`lapwan.json`: settings of a model instead of its family's."""

    guidance: dict[NoiseExpert, Number] = {}
    size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    steps: Count | None = None
    num_frames: Count | None = None
    fps: Count | None = None


class TransformerConfig(ModelFile):
    """`config.json` of a WanTransformer3DModel."""

    num_attention_heads: Annotated[int, Field(strict=True, ge=1, le=1024)]
    attention_head_dim: Annotated[int, Field(strict=True, ge=2, le=4096)]
    in_channels: _Width
    out_channels: _Width
    text_dim: _Width
    freq_dim: _Width
    ffn_dim: Count
    num_layers: _Layers
    patch_size: Annotated[list[Annotated[int, Field(strict=True, ge=1, le=64)]], Field(min_length=3, max_length=3)]
    cross_attn_norm: _Flag
    qk_norm: str | None = "rms_norm_across_heads"
    eps: _Rate = 1e-6
    rope_max_seq_len: _Width = 1024
    image_dim: Count | None = None
    added_kv_proj_dim: Count | None = None
    pos_embed_seq_len: Count | None = None


class VaeConfig(ModelFile):
    """`config.json` of an AutoencoderKLWan."""

    z_dim: Annotated[int, Field(strict=True, ge=1, le=1024)]
    base_dim: Annotated[int, Field(strict=True, ge=1, le=4096)] = 96
    decoder_base_dim: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    dim_mult: Annotated[list[Annotated[int, Field(strict=True, ge=1, le=64)]], Field(min_length=1, max_length=8)] = [
        1, 2, 4, 4]
    num_res_blocks: Annotated[int, Field(strict=True, ge=1, le=64)] = 2
    attn_scales: list[Number] = []
    temperal_downsample: Annotated[list[_Flag], Field(max_length=8)] = [False, True, True]
    dropout: _Rate = 0.0
    latents_mean: Annotated[list[Number], Field(max_length=1024)] = []
    latents_std: Annotated[list[_Positive], Field(max_length=1024)] = []
    is_residual: _Flag = False
    in_channels: Annotated[int, Field(strict=True, ge=1, le=1024)] = 3
    out_channels: Annotated[int, Field(strict=True, ge=1, le=1024)] = 3
    patch_size: Annotated[int, Field(strict=True, ge=1, le=64)] | None = None
    scale_factor_temporal: Annotated[int, Field(strict=True, ge=1, le=64)] | None = None
    scale_factor_spatial: Annotated[int, Field(strict=True, ge=1, le=64)] | None = None


class TextEncoderConfig(ModelFile):
    """`config.json` of a UMT5EncoderModel."""

    vocab_size: Count = 250112
    d_model: _Width = 512
    d_kv: Annotated[int, Field(strict=True, ge=1, le=4096)] = 64
    d_ff: Count = 1024
    num_layers: _Layers = 8
    num_heads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 6
    relative_attention_num_buckets: Annotated[int, Field(strict=True, ge=2, le=4096)] = 32
    relative_attention_max_distance: Count = 128
    dropout_rate: _Rate = 0.1
    layer_norm_epsilon: _Rate = 1e-6
    initializer_factor: Number = 1.0
    feed_forward_proj: str = "gated-gelu"
    is_encoder_decoder: _Flag = True
    use_cache: _Flag = True


class TokenizerConfig(ModelFile):
    """`tokenizer_config.json`; `extra_ids` are tokens that are made, each one."""

    extra_ids: Annotated[int, Field(strict=True, ge=0, le=65536)] | None = None
    vocab_size: Count | None = None


class ClipTextConfig(ModelFile):
    """`text_config` of a CLIPModel."""

    vocab_size: Count = 49408
    hidden_size: _Width = 512
    intermediate_size: _Width = 2048
    projection_dim: _Width = 512
    num_hidden_layers: _Layers = 12
    num_attention_heads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 8
    max_position_embeddings: _Width = 77


class ClipVisionConfig(ModelFile):
    """`vision_config` of a CLIPModel."""

    hidden_size: _Width = 768
    intermediate_size: _Width = 3072
    projection_dim: _Width = 512
    num_hidden_layers: _Layers = 12
    num_attention_heads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 12
    num_channels: Annotated[int, Field(strict=True, ge=1, le=1024)] = 3
    image_size: Annotated[int, Field(strict=True, ge=1, le=8192)] = 224
    patch_size: Annotated[int, Field(strict=True, ge=1, le=8192)] = 32


class ClipConfig(ModelFile):
    """`config.json` of a CLIPModel."""

    projection_dim: _Width = 512
    logit_scale_init_value: Number = 2.6592
    text_config: ClipTextConfig | None = None
    vision_config: ClipVisionConfig | None = None


_COMPONENTS: dict[str, type[ModelFile]] = {
    "transformer": TransformerConfig, "transformer_2": TransformerConfig, "vae": VaeConfig,
    "text_encoder": TextEncoderConfig,
}


def read_object(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of a model, of at most `limit` bytes.

    Raises:
        UserError: it is missing, damaged, or not an object.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; is {path.parent} a complete model folder in diffusers layout?")
    try:
        value = read_json(path, limit)
    except UserError:
        if path.is_file() and (kind := file_kind(path)) is not None:
            raise UserError(f"cannot read {path}: it is {kind}") from None
        raise
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_file(path: Path, kind: type[F]) -> F:
    """A JSON file of a model as its type.

    Raises:
        UserError: as `read_object`, or a value that the type does not allow.
    """
    return checked(read_object(path), kind, path)


def check_tokenizer(folder: Path) -> None:
    """Check what a tokenizer's settings would allocate, before a library reads them.

    Raises:
        UserError: `tokenizer_config.json` is damaged, or holds a value that is not allowed.
    """
    if (file := folder / "tokenizer_config.json").exists():
        read_file(file, TokenizerConfig)


def component_config(folder: Path, component: str | None = None) -> dict[str, Any]:
    """The `config.json` of a component of a model folder, checked.

    Args:
        folder: the component's.
        component: transformer, vae or text_encoder; None: by the folder's name.

    Raises:
        UserError: as `read_object`, or a value that the component's class does not take.
    """
    path = folder / "config.json"
    values = read_object(path)
    if (kind := _COMPONENTS.get(component or folder.name)) is not None:
        config = checked(values, kind, path)
        if isinstance(config, VaeConfig):
            _check_lengths(config, path)
    return values


def _check_lengths(config: VaeConfig, path: Path) -> None:
    for key, values in (("latents_mean", config.latents_mean), ("latents_std", config.latents_std)):
        if key in config.model_fields_set and len(values) != config.z_dim:
            raise UserError(f"{path}: {key} has {len(values)} values, but z_dim is {config.z_dim}; download it again")
    if len(config.temperal_downsample) != len(config.dim_mult) - 1:
        raise UserError(f"{path}: temperal_downsample has {len(config.temperal_downsample)} values, but dim_mult "
                        f"{len(config.dim_mult)}; it has one less: download it again")
