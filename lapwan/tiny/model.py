"""The embedded model `tiny`: Wan2.2-shaped, in the exact folder layout of T2V-A14B and I2V-A14B, made from a seed.

Both tasks share one set of weights: the I2V patch embedding's first 16 input channels are the T2V one's.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

from lapwan import files
from lapwan.names import NoiseExpert
from lapwan.wan.folder import DEFAULTS_FILE, Task

BOUNDARY: dict[Task, float] = {"t2v": 0.875, "i2v": 0.9}
FLOW_SHIFT: dict[Task, float] = {"t2v": 12.0, "i2v": 5.0}
SEED = 20220722
DEFAULTS = {
    "steps": 8, "guidance": {"high": 3.5, "low": 3.5}, "size": [64, 64], "num_frames": 17, "fps": 16,
}
TRANSFORMER = {
    "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 48, "out_channels": 16, "text_dim": 96,
    "freq_dim": 64, "ffn_dim": 768, "num_layers": 8, "rope_max_seq_len": 256, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
}
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 8, 8], "num_res_blocks": 2}
TEXT = {
    "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 3, "num_heads": 4, "is_encoder_decoder": False,
    "use_cache": False,
}
VAE_FILE, TEXT_FILE, LATENTS_FILE = "vae.safetensors", "text_encoder.safetensors", "latents.json"


def expert_file(expert: NoiseExpert) -> str:
    """File of a noise expert's weights."""
    return f"{expert.component}.safetensors"


def cache_root() -> Path:
    """Where lapwan keeps what it can make again: $LAPWAN_CACHE_DIR, $XDG_CACHE_HOME/lapwan, or ~/.cache/lapwan."""
    if own := os.environ.get("LAPWAN_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapwan"


def tiny_folder(task: Task) -> Path:
    """The embedded model's folder for `task`, made on first use (seconds) and kept under `cache_root()`.

    The name carries a hash of what it is made from, so that a new version of lapwan never meets an old folder.
    """
    recipe = json.dumps([SEED, TRANSFORMER, VAE, TEXT, DEFAULTS, task, BOUNDARY[task], FLOW_SHIFT[task]], default=list)
    source = "".join(inspect.getsource(f) for f in (build, _transformer, _vae, _text_encoder))
    name = hashlib.sha256((recipe + source).encode()).hexdigest()[:12]
    folder = cache_root() / f"tiny-{task}-{name}"
    if not (folder / "model_index.json").is_file():
        with files.atomic_folder(folder) as temporary:
            build(task, temporary)
    return folder


def _transformer(expert: NoiseExpert, task: Task) -> Any:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(SEED + list(NoiseExpert).index(expert))
    model = WanTransformer3DModel(in_channels=36, **TRANSFORMER).eval()
    if task == "i2v":
        return model
    text_to_video = WanTransformer3DModel(in_channels=16, **TRANSFORMER).eval()
    state = model.state_dict()
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].clone()
    text_to_video.load_state_dict(state)
    return text_to_video


def _vae() -> Any:
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(SEED + 10)
    return AutoencoderKLWan(**VAE, latents_mean=[0.0] * 16, latents_std=[1.0] * 16).eval()


def _text_encoder(vocabulary: int) -> Any:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(SEED + 20)
    return UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT)).eval()  # eval: its dropout_rate is 0.1


def build(task: Task, folder: Path) -> None:
    """Write the model for `task` into `folder` through diffusers' own pipeline class."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    from lapwan.tiny.tokenizer import make_tokenizer

    with torch.random.fork_rng(devices=[]):
        tokenizer = make_tokenizer()
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": _text_encoder(len(tokenizer)),
            "vae": _vae(),
            "transformer": _transformer(NoiseExpert.HIGH, task),
            "transformer_2": _transformer(NoiseExpert.LOW, task),
        }
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT[task]
    )
    pipeline = (WanImageToVideoPipeline if task == "i2v" else WanPipeline)(
        **parts, scheduler=scheduler, boundary_ratio=BOUNDARY[task]
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / DEFAULTS_FILE).write_text(json.dumps(DEFAULTS, indent=2) + "\n", encoding="utf-8")


