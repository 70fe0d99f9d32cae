"""Small random models of one transformer: TI2V-5B (48 channels, VAE of strides 4x16x16), and Wan2.1 T2V."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lapwan.models.spec import ModelSpec, read_spec
from lapwan.tiny.model import make_tokenizer


def write_ti2v(folder: Path) -> ModelSpec:
    """A folder that diffusers' pipeline writes."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                      is_encoder_decoder=False, use_cache=False)
    WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=48, num_res_blocks=1, is_residual=True, in_channels=12,
            out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48, latents_std=[1.3] * 48,
        ).eval(),
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=48, out_channels=48,
            text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64,
        ).eval(),
        transformer_2=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
        ),
        expand_timesteps=True,
    ).save_pretrained(folder)
    return read_spec(folder)


def edited(source: ModelSpec, folder: Path, file: str, **changes: object) -> Path:
    """A folder of links to a model's parts, with one JSON file changed."""
    folder.mkdir()
    for part in source.path.iterdir():
        (folder / part.name).symlink_to(part, target_is_directory=part.is_dir())
    target = folder / file
    if target.parent != folder:
        real = target.parent.resolve()
        target.parent.unlink()
        target.parent.mkdir()
        for part in real.iterdir():
            (target.parent / part.name).symlink_to(part)
    data = json.loads(target.read_text())
    target.unlink()
    target.write_text(json.dumps({**data, **changes}))
    return folder


def write_wan21(folder: Path, t2v: ModelSpec) -> ModelSpec:
    """The high noise expert of the embedded text-to-video model as a Wan2.1 model."""
    edited(t2v, folder, "model_index.json", boundary_ratio=None, transformer_2=[None, None])
    (folder / "lapwan.json").unlink()
    return read_spec(folder)
