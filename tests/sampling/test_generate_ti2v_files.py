"""TI2V-5B from separate files: `Wan2.2_VAE.pth` in the original layout gives what the diffusers folder gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from PIL import Image
from safetensors.torch import save_file
from sampling_cases import refused
from transformers import UMT5Config, UMT5EncoderModel

from lapwan import VideoGenerator
from lapwan.checkpoints.wan_keys import to_original
from lapwan.models import original_layout
from lapwan.models.original_layout import load_vae_file, t5_to_transformers
from lapwan.models.separate_files import vae_config
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import Request, complete_guidance
from lapwan.sampling.result import read_metadata
from lapwan.settings.model import ModelFilesSettings
from lapwan.tiny.model import make_tokenizer
from lapwan.tiny.resolve import resolve_base
from lapwan.wan.vae import decode, encode

# Tensors of the released Wan2.2_VAE.pth, one of each kind, as its module structure names them.
RELEASED = {
    "conv1.weight": "quant_conv.weight",
    "conv2.bias": "post_quant_conv.bias",
    "encoder.conv1.weight": "encoder.conv_in.weight",
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": "encoder.down_blocks.0.resnets.0.norm1.gamma",
    "encoder.downsamples.0.downsamples.1.residual.6.bias": "encoder.down_blocks.0.resnets.1.conv2.bias",
    "encoder.downsamples.0.downsamples.2.resample.1.weight": "encoder.down_blocks.0.downsampler.resample.1.weight",
    "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.downsamples.2.downsamples.2.time_conv.bias": "encoder.down_blocks.2.downsampler.time_conv.bias",
    "encoder.middle.0.residual.2.weight": "encoder.mid_block.resnets.0.conv1.weight",
    "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
    "encoder.middle.1.norm.gamma": "encoder.mid_block.attentions.0.norm.gamma",
    "decoder.middle.2.residual.3.gamma": "decoder.mid_block.resnets.1.norm2.gamma",
    "decoder.upsamples.0.upsamples.3.time_conv.weight": "decoder.up_blocks.0.upsampler.time_conv.weight",
    "decoder.upsamples.3.upsamples.0.shortcut.bias": "decoder.up_blocks.3.resnets.0.conv_shortcut.bias",
    "decoder.head.0.gamma": "decoder.norm_out.gamma",
    "decoder.head.2.weight": "decoder.conv_out.weight",
}


def original_vae(names: set[str], blocks: int) -> dict[str, str]:
    """diffusers' name -> original name, by building every original name a VAE of `blocks` blocks a stage may have."""
    leaves = [f"residual.{i}.gamma" for i in (0, 3)]
    leaves += [f"{p}.{leaf}" for leaf in ("weight", "bias") for p in ("residual.2", "residual.6", "shortcut")]
    sampler = [f"{p}.{leaf}" for leaf in ("weight", "bias") for p in ("resample.1", "time_conv")]
    attention = ["norm.gamma", *(f"{p}.{leaf}" for leaf in ("weight", "bias") for p in ("to_qkv", "proj"))]
    found = [f"{c}.{leaf}" for c in ("conv1", "conv2") for leaf in ("weight", "bias")]
    for side, group, count in (("encoder", "downsamples", blocks), ("decoder", "upsamples", blocks + 1)):
        found += [f"{side}.{c}.{leaf}" for c in ("conv1", "head.2") for leaf in ("weight", "bias")]
        found += [f"{side}.head.0.gamma", *(f"{side}.middle.1.{part}" for part in attention)]
        found += [f"{side}.middle.{i}.{leaf}" for i in (0, 2) for leaf in leaves]
        for stage in range(4):
            found += [f"{side}.{group}.{stage}.{group}.{j}.{leaf}" for j in range(count) for leaf in leaves]
            found += [f"{side}.{group}.{stage}.{group}.{count}.{leaf}" for leaf in sampler]
    made = {original_layout.wan22_vae_to_diffusers(name): name for name in found}
    assert len(made) == len(found), "two original names met in one"
    assert names <= set(made), names - set(made)
    return {name: made[name] for name in names}


def original_transformer(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    if leaf == "scale_shift_table" or name == "scale_shift_table":
        return f"{path or 'head'}.modulation"
    if (known := to_original(path)) is not None:
        return f"{known}.{leaf}"
    for ours, theirs in (("attn1.norm", "self_attn.norm"), ("attn2.norm", "cross_attn.norm"), ("norm2", "norm3")):
        name = name.replace(ours, theirs)
    return name


def make_vae(blocks: int) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=48, num_res_blocks=blocks, is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=list(original_layout.WAN22_LATENTS_MEAN),
        latents_std=list(original_layout.WAN22_LATENTS_STD),
    ).eval()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[ModelFilesSettings, Path]:
    """The files in the original layout, and the same weights as a diffusers folder."""
    root = tmp_path_factory.mktemp("ti2v_files")
    folder = root / "folder"
    torch.manual_seed(1)
    vae = make_vae(2)
    vae.save_pretrained(folder / "vae")
    state = vae.state_dict()
    names = original_vae(set(state), 2)
    torch.save({names[name]: value for name, value in state.items()}, root / "Wan2.2_VAE.pth")
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=48, out_channels=48,
        text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True,
    ).eval()
    transformer.save_pretrained(folder / "transformer")
    tensors = {original_transformer(n): v.contiguous() for n, v in transformer.state_dict().items()}
    assert convert_wan_transformer_to_diffusers(dict(tensors)).keys() == transformer.state_dict().keys()
    (root / "5b").mkdir()
    save_file(tensors, root / "5b" / "model.safetensors")
    (root / "5b" / "config.json").write_text(json.dumps({"num_heads": 2}))
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text = UMT5EncoderModel(UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, is_encoder_decoder=False,
        use_cache=False)).eval()
    text.save_pretrained(folder / "text_encoder")
    save_file({n: v.clone() for n, v in text.state_dict().items() if n == t5_to_transformers(n) and "embed" not in n},
              root / "umt5.safetensors")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "flow_shift": 5.0}))
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": True,
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]}))
    return ModelFilesSettings(
        transformer=root / "5b" / "model.safetensors", vae=root / "Wan2.2_VAE.pth",
        text_encoder=root / "umt5.safetensors", tokenizer=folder / "tokenizer",
    ), folder


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_name_and_its_place(name) -> None:
    assert original_layout.wan22_vae_to_diffusers(name) == RELEASED[name]
    assert original_layout.wan22_vae_to_diffusers(RELEASED[name]) == RELEASED[name]  # diffusers' own names stay


def test_the_config_of_the_released_sizes() -> None:
    """160 and 256 wide, two blocks a stage, time halved in the second and third."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, num_res_blocks=2, is_residual=True, in_channels=12,
            out_channels=12, patch_size=2, scale_factor_spatial=16,
        )
    state = vae.state_dict()
    names = original_vae(set(state), 2)
    config = original_layout.wan22_vae_config({names[name]: tuple(value.shape) for name, value in state.items()})
    assert config is not None
    for key in ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks", "temperal_downsample", "patch_size"):
        assert config[key] == vae.config[key], key
    mean, std = original_layout.WAN22_LATENTS_MEAN, original_layout.WAN22_LATENTS_STD
    assert len(mean) == len(std) == 48 and min(std) > 0


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_vae_codes_to_the_bit(blocks, tmp_path) -> None:
    vae = make_vae(blocks)
    state = vae.state_dict()
    names = original_vae(set(state), blocks)
    path = tmp_path / "Wan2.2_VAE.pth"
    torch.save({names[name]: value for name, value in state.items()}, path)
    ours = load_vae_file(vae_config(path), path, torch.float32)
    pixels = torch.rand(1, 3, 9, 32, 64) * 2 - 1
    with torch.no_grad():
        latents = encode(vae, pixels)
        assert latents.shape == (1, 48, 3, 2, 4) and torch.equal(encode(ours, pixels), latents)
        assert torch.equal(decode(ours, latents), decode(vae, latents))


@pytest.mark.parametrize("with_image", [False, True])
def test_the_files_generate_what_the_folder_does(with_image, parts) -> None:
    files, folder = parts
    ours, theirs = resolve_base(files), resolve_base(str(folder))
    for base in (ours, theirs):
        assert (base.spec.task, base.spec.noise_experts, base.spec.flow_shift, base.spec.pixel_multiple) == (
            "ti2v", ("high",), 5.0, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    request = Request(
        prompt="电凝钩", negative_prompt="模糊", num_frames=5, size=(32, 64), steps=3, fps=24,
        guidance=complete_guidance(ours.spec, 5.0), image=Image.fromarray(pixels) if with_image else None,
    )
    one, two = Generator(ours).generate(request), Generator(theirs).generate(request)
    assert torch.equal(one.latents, two.latents) and (one.frames == two.frames).all()
    assert torch.equal(Generator(ours, memory="one").latents(request), one.latents)


def test_from_python_as_in_toml(parts, tmp_path) -> None:
    files, folder = parts
    said = {"num_frames": 5, "size": (32, 64), "steps": 2}
    video = VideoGenerator(files.model_dump(exclude_none=True)).generate("电凝钩", **said)
    assert (video.frames == VideoGenerator(folder).generate("电凝钩", **said).frames).all()
    video.save(tmp_path / "a.mp4")
    assert json.loads(read_metadata(tmp_path / "a.mp4")["settings"])["model"]["vae"] == str(files.vae)


def test_what_does_not_fit_is_refused(parts, lapwan, tmp_path) -> None:
    files, _ = parts
    older = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    save_file(older.state_dict(), tmp_path / "old.safetensors")

    def run(**changes: object):
        said = {**files.model_dump(mode="json", exclude_none=True), **changes}
        text = "".join(f"{k} = {json.dumps(str(v))}\n" for k, v in said.items() if v is not None)
        (tmp_path / "c.toml").write_text(f"[model]\n{text}")
        return lapwan("generate", "--config", "c.toml", "--prompt", "x", "-o", "a", "--steps", "2", "--size", "32x64",
                      "--num-frames", "5")

    refused(run(vae="old.safetensors"), "makes 16 latent channels, but the transformer takes 48", "Wan2.2_VAE.pth")
    refused(run(transformer=None, high=files.transformer, low=files.transformer), "has only one")
    assert run().code == 0
