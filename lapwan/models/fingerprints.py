"""Fingerprints of the VAE and of the text encoder, on which cached features depend. No torch.

A transformer's is `ModelSpec.fingerprint`; the hashing of safetensors files is in `lapwan.checkpoints.fingerprints`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lapwan.checkpoints.container import is_pickled
from lapwan.checkpoints.fingerprints import checkpoint_fingerprint
from lapwan.checkpoints.weights import read_weights, stored_dtype
from lapwan.documents import TOKENIZER_BYTES, read_bytes
from lapwan.errors import UserError
from lapwan.models.configs import component_config
from lapwan.models.spec import ModelSpec, component_files, original_file, weight_files

_PIECES, _PIECE = 64, 1 << 16  # of a .pth file, sampled
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def vae_fingerprint(spec: ModelSpec) -> str:
    """16 hex digits over the VAE's weights and the mean and std that normalise its latents."""
    folder = spec.path / "vae"
    config = component_config(folder)
    settings = json.dumps([config.get("latents_mean"), config.get("latents_std")])
    return _digest(_weights(folder), settings)


def text_encoder_fingerprint(spec: ModelSpec) -> str:
    """16 hex digits over the text encoder's weights and its tokenizer.

    Raises:
        UserError: the folder has no tokenizer.
    """
    folder = spec.path / "tokenizer"
    for name in ("tokenizer.json", "spiece.model"):
        if (folder / name).is_file():
            vocabulary = hashlib.sha256(read_bytes(folder / name, TOKENIZER_BYTES)).hexdigest()
            return _digest(_weights(spec.path / "text_encoder"), vocabulary)
    raise UserError(f"no tokenizer.json in {folder}; is {spec.path} a complete model folder?")


def text_dtype(spec: ModelSpec) -> str:
    """The dtype in which the text encoder is stored and by default runs: `float32`, `bfloat16` or `float16`."""
    return _DTYPES[stored_dtype(map(read_weights, component_files(spec.path / "text_encoder")))]


def _weights(folder: Path) -> str:
    """Fingerprint of a component's weights; of a .pth, sha256 over its size and 64 evenly spaced pieces of 64 KiB."""
    original = original_file(folder)
    if original is None:
        return checkpoint_fingerprint(weight_files(folder))
    if not is_pickled(original):
        return checkpoint_fingerprint([original])
    size = original.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with original.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
