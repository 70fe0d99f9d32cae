"""The embedded model `tiny`: Wan2.2-shaped, in the exact folder layout of T2V-A14B and I2V-A14B, from shipped weights.

Both tasks share one set of weights, pretrained by `lapwan.tiny.pretrain`: the high noise expert on sigma in [0.875, 1],
the low one on [0, 0.9], so either task's boundary holds, half of the time without an image: the T2V patch embedding is
the first 16 input channels of the I2V one. Stored in bf16, loaded as fp32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from lapwan import files
from lapwan.files import cache_root
from lapwan.names import NoiseExpert
from lapwan.wan.folder import DEFAULTS_FILE, Task

BOUNDARY: dict[Task, float] = {"t2v": 0.875, "i2v": 0.9}
FLOW_SHIFT: dict[Task, float] = {"t2v": 5.0, "i2v": 5.0}
DEFAULTS: dict[Task, dict[str, Any]] = {
    "t2v": {"steps": 12, "guidance": {"high": 3.5, "low": 3.5}, "size": [96, 96], "num_frames": 17, "fps": 16},
    "i2v": {"steps": 12, "guidance": {"high": 2.0, "low": 2.0}, "size": [96, 96], "num_frames": 17, "fps": 16},
}
TRANSFORMER = {
    "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 48, "out_channels": 16, "text_dim": 96,
    "freq_dim": 64, "ffn_dim": 768, "num_layers": 8, "rope_max_seq_len": 256, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
}
# Few channels where the picture is large, many where it is small: a clip encodes in under a second on a CPU core.
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 8, 8], "num_res_blocks": 2}
TEXT = {
    "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 3, "num_heads": 4, "is_encoder_decoder": False,
    "use_cache": False,
}
VAE_FILE, TEXT_FILE, LATENTS_FILE = "vae.safetensors", "text_encoder.safetensors", "latents.json"
WEIGHTS = Path(str(package_files("lapwan.tiny"))) / "weights"


def expert_file(expert: NoiseExpert) -> str:
    """File of a noise expert's weights."""
    return f"{expert.component}.safetensors"


@cache
def _identity() -> str:
    """Of everything a folder is made from: the weights, this file, the tokenizer."""
    digest = hashlib.sha256()
    names = [*(expert_file(e) for e in NoiseExpert), VAE_FILE, TEXT_FILE, LATENTS_FILE]
    for path in (*(WEIGHTS / name for name in names), Path(__file__), Path(__file__).with_name("tokenizer.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def tiny_folder(task: Task) -> Path:
    """The embedded model's folder for `task`, made on first use (a second) and kept under `cache_root()`.

    The name carries a hash of what it is made from, so that a new version of lapwan never meets an old folder.
    """
    folder = cache_root() / f"tiny-{task}-{_identity()}"
    if not (folder / "model_index.json").is_file():
        with files.atomic_folder(folder) as temporary:
            build(task, temporary)
    return folder


def _read(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value.float() for key, value in load_file(WEIGHTS / name).items()}


def _transformer(expert: NoiseExpert, task: Task) -> Any:
    from diffusers import WanTransformer3DModel

    state = _read(expert_file(expert))
    if task == "t2v":
        state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].clone()
    model = WanTransformer3DModel(in_channels=state["patch_embedding.weight"].shape[1], **TRANSFORMER)
    model.load_state_dict(state)
    return model.eval()


def _vae() -> Any:
    from diffusers import AutoencoderKLWan

    statistics = json.loads((WEIGHTS / LATENTS_FILE).read_text(encoding="utf-8"))
    vae = AutoencoderKLWan(**VAE, **statistics)
    vae.load_state_dict(_read(VAE_FILE))
    return vae.eval()


def _text_encoder(vocabulary: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT))
    state = _read(TEXT_FILE)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]  # one tensor under two names
    model.load_state_dict(state)
    return model.eval()  # its dropout_rate is 0.1


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar for a second's work, which would stand before an error's one line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build(task: Task, folder: Path) -> None:
    """Write the model for `task` into `folder` through diffusers' own pipeline class."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    from lapwan.tiny.tokenizer import make_tokenizer

    with torch.random.fork_rng(devices=[]):  # modules draw their first weights, which the shipped ones replace
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
    with _no_bar():
        pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / DEFAULTS_FILE).write_text(json.dumps(DEFAULTS[task], indent=2) + "\n", encoding="utf-8")
