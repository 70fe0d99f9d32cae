"""Identities of the VAE and of the text encoder, read without torch: what cached features depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lapwan.errors import UserError
from lapwan.lora.fingerprint import checkpoint_fingerprint
from lapwan.lora.tensorfile import read_header
from lapwan.wan.folder import ModelSpec, weight_files

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def vae_identity(spec: ModelSpec) -> str:
    """16 hex digits over the VAE's weights and the mean and std that normalise its latents."""
    folder = spec.path / "vae"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = json.dumps([config.get("latents_mean"), config.get("latents_std")])
    return _digest(checkpoint_fingerprint(weight_files(folder)), settings)


def text_identity(spec: ModelSpec) -> str:
    """16 hex digits over the text encoder's weights and its tokenizer.

    Raises:
        UserError: the folder has no tokenizer.
    """
    folder = spec.path / "tokenizer"
    for name in ("tokenizer.json", "spiece.model"):
        if (folder / name).is_file():
            vocabulary = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            return _digest(checkpoint_fingerprint(weight_files(spec.path / "text_encoder")), vocabulary)
    raise UserError(f"no tokenizer.json in {folder}; is {spec.path} a complete model folder?")


def text_dtype(spec: ModelSpec) -> str:
    """The dtype the text encoder is stored, and by default run, in: `float32`, `bfloat16` or `float16`."""
    header = read_header(weight_files(spec.path / "text_encoder")[0])
    dtypes = {info.dtype for info in header.tensors.values()}
    return _DTYPES["F32" if "F32" in dtypes else sorted(dtypes)[0]]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
