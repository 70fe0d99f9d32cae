"""Separate files as a folder in diffusers layout: configs from the tensors' shapes, weights as symbolic links.

Nothing is converted on disk: `original_layout.load_*` rename the tensors while they load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lapwan.checkpoints.container import is_pickled
from lapwan.checkpoints.wan_keys import contents_of
from lapwan.checkpoints.weights import is_gguf, read_weights
from lapwan.console import warn
from lapwan.documents import Count, checked
from lapwan.errors import UserError
from lapwan.files import atomic_folder
from lapwan.lora.noise_expert import noise_expert_from_file_name, noise_expert_from_metadata
from lapwan.models.configs import component_config, read_object
from lapwan.models.original_layout import (
    WAN22_VAE_CHANNELS,
    check_text_file,
    check_vae_file,
    t5_to_transformers,
    tensor_infos,
    wan22_vae_config,
)
from lapwan.models.resolve import check_tokenizer
from lapwan.models.spec import (
    ORIGINAL,
    OTHER_WEIGHTS,
    check_shards,
    component_files,
    image_encoder_error,
    tensor_shapes,
    transformer_folders,
    weight_files,
)
from lapwan.names import NoiseExpert

_HEAD_DIM = 128  # of every released Wan transformer; a config.json beside the weights overrides it
_BOUNDARY = {16: 0.875, 36: 0.9}  # by input channels: T2V-A14B, I2V-A14B
_SHIFT = {16: 12.0, 36: 5.0}
_CONFIG_KEYS = {"vae": "z_dim", "text_encoder": "d_model"}  # that a component's config.json has
_SHIFT_SINGLE = 5.0  # Wan2.1 T2V, TI2V-5B


def make_folder(
    root: Path, transformers: Mapping[NoiseExpert, Path], vae: Path, text_encoder: Path, tokenizer: Path,
    boundary: float | None, flow_shift: float | None,
) -> Path:
    """A folder under `root` that `read_spec` reads, named by the files' paths, sizes and times; made once.

    Raises:
        UserError: a file that is missing, unreadable or of a model that is not supported as separate files.
    """
    files = {e: _transformer_files(path, e) for e, path in transformers.items()}
    check_sides(files)
    vae, text_encoder = _component(vae, "vae"), _component(text_encoder, "text_encoder")
    tokenizer = _tokenizer_folder(tokenizer)
    components = [f for path in (vae, text_encoder) for f in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stamp = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns)
             for f in (*(f for shards in files.values() for f in shards), *components, tokenizer)]
    key = json.dumps([[e.value for e in files], stamp, boundary, flow_shift])
    folder = root / f"files-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "model_index.json").is_file():
        with atomic_folder(folder, first_wins=True) as temporary:
            _write(temporary, files, vae, text_encoder, tokenizer, boundary, flow_shift)
    return folder


def _transformer_files(path: Path, noise_expert: NoiseExpert) -> list[Path]:
    """A file, a folder of shards, or of a whole model's folder the noise expert's."""
    if path.is_dir():
        return weight_files(transformer_folders(path).get(noise_expert, path))
    read_weights(path)
    check_shards([path])
    return [path]


def _component(path: Path, name: str) -> Path:
    """A file, or a component's folder in diffusers layout: given itself, or the model folder that has it.

    Raises:
        UserError: it does not exist, or is another folder; the weights in it are named.
    """
    if path.is_file():
        check_shards([path])
        return path
    if not path.is_dir():
        raise UserError(f"no such file: {path}")
    folder = path / name if (path / name).is_dir() else path
    if (folder / "config.json").is_file():
        config = component_config(folder)
        if _CONFIG_KEYS[name] not in config:
            title = {"vae": "VAE"}.get(name, "text encoder")
            kind = config.get("_class_name") or ", ".join(config.get("architectures") or ["another model"])
            raise UserError(f"{name} = {path} is the folder of {kind}; give that of the {title}")
        for file in component_files(folder):
            read_weights(file)
        return folder
    weights = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", *OTHER_WEIGHTS))
    inside = f"; it holds {', '.join(weights[:5])}" if weights else ""
    raise UserError(f"{name} = {path} is a folder without config.json: give the weights file, or a folder in diffusers "
                    f"layout{inside}")


def _tokenizer_folder(path: Path) -> Path:
    """The folder of umT5's tokenizer: given itself, as a file in it, or as the model folder that has it.

    Raises:
        UserError: it is missing, incomplete, or its files are no JSON.
    """
    folder = path.parent if path.is_file() else path / "tokenizer" if (path / "tokenizer").is_dir() else path
    if not folder.is_dir():
        raise UserError(f"no such folder: {path}; the tokenizer is a folder, google/umt5-xxl of the original release")
    check_tokenizer(folder)
    return folder


def check_sides(files: Mapping[NoiseExpert, list[Path]]) -> None:
    """Compare the noise expert that file and folder names and metadata state with the one a file is given for.

    Raises:
        UserError: both are given the wrong way round; if only one is, a warning.
    """
    if len(files) < 2:
        return
    high, low = files.values()
    if [f.resolve() for f in high] == [f.resolve() for f in low]:
        warn(f"high and low are the same file, {high[0]}; Wan2.2 has a transformer for each")
        return
    shared = Path(os.path.commonpath([f.absolute() for f in (*high, *low)]))
    stated_by = {e: _stated(shards[0], shared) for e, shards in files.items()}
    wrong = {e: shards[0] for e, shards in files.items() if stated_by[e] not in (None, e)}
    if not wrong:
        return
    stated = ", ".join(f"{e.value} = {path} is for {stated_by[e]} noise" for e, path in wrong.items())
    if len(wrong) == len(files):
        raise UserError(f"high and low are the wrong way round: by name or metadata, {stated}; swap them")
    warn(f"by its name or metadata, {stated}; check that high and low are not exchanged, or the same")


def _stated(path: Path, shared: Path) -> NoiseExpert | None:
    """By metadata, the file's name, those of its folders inside `shared`, from the inner to the outer, or GGUF's."""
    components = {e.component: e for e in NoiseExpert}
    metadata = read_weights(path).metadata
    name = Path(metadata.get("general.name", ""))
    folders = [folder for folder in path.absolute().parents if folder.is_relative_to(shared) and folder != shared]
    stated = [noise_expert_from_metadata(metadata, path),
              *(noise_expert_from_file_name(p) or components.get(p.name) for p in (path, *folders)),
              noise_expert_from_file_name(name)]
    return next((noise_expert for noise_expert in stated if noise_expert is not None), None)


def _write(
    folder: Path, files: Mapping[NoiseExpert, list[Path]], vae: Path, text_encoder: Path, tokenizer: Path,
    boundary: float | None, flow_shift: float | None,
) -> None:
    configs = {noise_expert: transformer_config(shards) for noise_expert, shards in files.items()}
    channels = next(iter(configs.values()))["in_channels"]
    two = len(files) == 2
    if two and channels == WAN22_VAE_CHANNELS:
        raise UserError("high and low are TI2V-5B transformers; that model has only one: give it as transformer")
    vae_settings = component_config(vae, "vae") if vae.is_dir() else vae_config(vae)
    text_settings = (component_config(text_encoder, "text_encoder") if text_encoder.is_dir() else
                     text_config(text_encoder))
    if (vae_settings["z_dim"] == WAN22_VAE_CHANNELS) != (channels == WAN22_VAE_CHANNELS):
        raise UserError(f"{vae} makes {vae_settings['z_dim']} latent channels, but the transformer takes {channels}: "
                        "TI2V-5B needs Wan2.2_VAE.pth, every other model Wan2.1_VAE.pth")
    if vae.is_file():
        check_vae_file(vae_settings, vae)
    if text_encoder.is_file():
        check_text_file(text_settings, text_encoder)
    default_shift = _SHIFT.get(channels, _SHIFT_SINGLE) if two else _SHIFT_SINGLE
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if channels == 36 else "WanPipeline",
        "expand_timesteps": channels == WAN22_VAE_CHANNELS,
        "boundary_ratio": (boundary or _BOUNDARY[channels]) if two else None,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if two else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"], "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    for noise_expert, shards in files.items():
        _write_config(folder / noise_expert.component, configs[noise_expert])
        for number, file in enumerate(shards, 1):
            name = "diffusion_pytorch_model" + (f"-{number:05d}" if len(shards) > 1 else "")
            suffix = ".gguf" if is_gguf(file) else ".pth" if is_pickled(file) else ".safetensors"
            (folder / noise_expert.component / f"{name}{suffix}").symlink_to(file.resolve())
    for name, file, config in (("vae", vae, vae_settings), ("text_encoder", text_encoder, text_settings)):
        if file.is_dir():
            (folder / name).symlink_to(file.resolve(), target_is_directory=True)
            continue
        _write_config(folder / name, config)
        (folder / name / f"{ORIGINAL}{file.suffix}").symlink_to(file.resolve())
    (folder / "tokenizer").symlink_to(tokenizer.resolve(), target_is_directory=True)
    _write_config(folder / "scheduler", {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "flow_shift": flow_shift or default_shift,
    }, "scheduler_config.json")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_config(folder: Path, config: Mapping[str, Any], name: str = "config.json") -> None:
    folder.mkdir()
    (folder / name).write_text(json.dumps(config, indent=2), encoding="utf-8")


def transformer_config(files: list[Path]) -> dict[str, Any]:
    """A WanTransformer3DModel's config from tensor shapes; the heads from a config.json beside the files, if any.

    Raises:
        UserError: not a Wan transformer, or one that is not supported.
    """
    shapes = tensor_shapes(files)
    if any("img_emb" in name or "add_k_proj" in name or "k_img" in name for name in shapes):
        raise image_encoder_error(files[0], "transformer")
    try:
        dim, channels = shapes["patch_embedding.weight"][:2]
        ffn = shapes["blocks.0.ffn.net.0.proj.weight"][0]
        text = shapes["condition_embedder.text_embedder.linear_1.weight"][1]
        freq = shapes["condition_embedder.time_embedder.linear_1.weight"][1]
        patch = tuple(shapes["patch_embedding.weight"][2:5])
        out = shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2])
    except KeyError as error:
        raise _another(files[0], "a Wan transformer", shapes, str(error)) from None
    except (IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{files[0]} is not a Wan transformer: its first tensors have other shapes") from None
    if channels not in (*_BOUNDARY, WAN22_VAE_CHANNELS):
        raise UserError(f"{files[0]} has {channels} input channels; supported are T2V (16), I2V-A14B (36) and TI2V-5B "
                        "(48)")
    heads = dim // _HEAD_DIM if dim % _HEAD_DIM == 0 else 0
    config_path = files[0].parent / "config.json"
    if config_path.is_file():
        config = read_object(config_path)
        given = config.get("num_heads") or config.get("num_attention_heads") or heads
        heads = checked(given, Count, f"{config_path}: num_heads")
    if heads < 1 or dim % heads or dim // heads % 2:
        raise UserError(f"{files[0]}: width {dim} is not divisible into heads of {_HEAD_DIM}; put the model's "
                        "config.json beside it")
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": list(patch), "num_attention_heads": heads,
        "attention_head_dim": dim // heads, "in_channels": channels, "out_channels": out, "text_dim": text,
        "freq_dim": freq, "ffn_dim": ffn, "num_layers": len(blocks),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }


def _another(path: Path, wanted: str, names: Iterable[str], missing: str) -> UserError:
    if (kind := contents_of(names)) is not None and not kind.startswith(wanted):
        return UserError(f"{path} is not {wanted} but {kind}")
    return UserError(f"{path} is not {wanted}: it has no tensor {missing}")


def vae_config(path: Path) -> dict[str, Any]:
    """An AutoencoderKLWan's config: of Wan2.2's VAE, or of Wan2.1's, whose latents' mean and std are the defaults.

    Raises:
        UserError: another VAE.
    """
    shapes = {name: shape for name, (shape, _) in tensor_infos(path).items()}
    if (wan22 := wan22_vae_config(shapes)) is not None:
        return wan22
    first = shapes.get("encoder.conv1.weight", shapes.get("encoder.conv_in.weight"))
    second = shapes.get("conv2.weight", shapes.get("post_quant_conv.weight"))
    if first is None or second is None or len(first) < 2 or not second:
        raise _another(path, "Wan's VAE", shapes, "'encoder.conv1.weight'")
    if first[1] != 3 or second[0] != 16:
        raise UserError(f"{path} makes {second[0]} latent channels from {first[1]}; Wan2.1_VAE.pth makes "
                        "16 from 3, Wan2.2_VAE.pth 48 from 12")
    down = "encoder.downsamples.", "encoder.down_blocks."
    stages = {name.split(".")[2] for name in shapes if name.startswith(down)}
    return {"_class_name": "AutoencoderKLWan", "base_dim": first[0], "z_dim": second[0],
            "num_res_blocks": (len(stages) - 3) // 4}  # four stages of them, three halvings between


def text_config(path: Path) -> dict[str, Any]:
    """A umT5 encoder's config from tensor shapes.

    Raises:
        UserError: not a umT5 encoder.
    """
    shapes = {t5_to_transformers(name): shape for name, (shape, _) in tensor_infos(path).items()}
    block = "encoder.block.0.layer."
    try:
        vocabulary, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{block}0.SelfAttention.relative_attention_bias.weight"]
        inner, hidden = shapes[f"{block}0.SelfAttention.q.weight"][0], shapes[f"{block}1.DenseReluDense.wi_0.weight"][0]
    except KeyError as error:
        raise _another(path, "a umT5 encoder", shapes, str(error)) from None
    except (IndexError, ValueError):
        raise UserError(f"{path} is not a umT5 encoder: its first tensors have other shapes") from None
    if not heads:
        raise UserError(f"{path} is not a umT5 encoder: its first tensors have no values")
    layers = len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")})
    return {"vocab_size": vocabulary, "d_model": width, "d_kv": inner // heads, "d_ff": hidden, "num_layers": layers,
            "num_heads": heads, "relative_attention_num_buckets": buckets, "is_encoder_decoder": False,
            "use_cache": False}
