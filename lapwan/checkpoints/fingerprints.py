"""Fingerprints of weight files, of merges and of plain values, without torch.

A fingerprint ties a LoRA, a mixture or a cache to the base it was made with; it does not protect against tampering.
The fingerprint of a LoRA's content is `lapwan.lora.state.AdapterState.fingerprint`; those of the VAE and the text
encoder are in `lapwan.models.fingerprints`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from pathlib import Path

from lapwan.checkpoints.container import TensorFile, TensorInfo
from lapwan.checkpoints.wan_keys import tensor_to_diffusers
from lapwan.checkpoints.weights import read_weights

FINGERPRINT_KEY = "lapwan.fingerprint"
_PIECE = 4096  # bytes
_INNER_PIECES = 4  # strided pieces between the first and the last


def checkpoint_fingerprint(files: Sequence[Path]) -> str:
    """Identity of one component's weights: 64 hex digits, independent of sharding and key layout. Scales of fp8 weights
    count as tensors; markers and a tokenizer in the file do not.

    The metadata `lapwan.fingerprint` if all files have the same one (a merge writes it); else sha256 over (name, dtype,
    shape, sampled bytes) by sorted tensor name. Of each tensor the first and last 4 KiB and four evenly spaced pieces
    of 4 KiB are hashed, which takes milliseconds on a 28 GB file. A change only between the samples is not detected;
    training or a merge changes nearly all bytes of a tensor.

    Raises:
        UserError: a file that is missing, damaged, or not a safetensors file.
    """
    headers = [read_weights(path) for path in files]
    recorded = {header.metadata.get(FINGERPRINT_KEY) for header in headers}
    if len(recorded) == 1 and (known := recorded.pop()):
        return known
    tensors: dict[str, tuple[TensorFile, TensorInfo]] = {}
    for header in headers:
        # By diffusers' names: the same weights in the original layout are the same base.
        raw = header.raw
        tensors |= {tensor_to_diffusers(name): (raw, raw.tensors[name]) for name in header.tensors}
        tensors |= {f"{tensor_to_diffusers(name)}\0scale": (raw, raw.tensors[scale])
                    for name, scale in header.scales.items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        file, info = tensors[name]
        digest.update(f"{name}\0{info.dtype}\0{','.join(map(str, info.shape))}\0".encode())
        for start, size in _samples(info.size):
            digest.update(file.read(info.name, start, size))
    return digest.hexdigest()


def json_fingerprint(value: object) -> str:
    """sha256 over the value as JSON with sorted keys: 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """(offset, size) of the pieces hashed of a tensor of `size` bytes: all of a small one."""
    pieces = _INNER_PIECES + 2
    if size <= pieces * _PIECE:
        return [(0, size)]
    return [(k * (size - _PIECE) // (pieces - 1), _PIECE) for k in range(pieces)]


def merged_fingerprint(base: str, loras: Sequence[tuple[str, float]]) -> str:
    """Identity of base + Σ multiplier · LoRA: sha256 over (base, sorted [(LoRA's fingerprint, multiplier)]).

    The same for a merge in memory and a merged file, in any order of the LoRAs; without LoRAs it is `base`.
    """
    if not loras:
        return base
    digest = hashlib.sha256(f"merge/1\0{base}".encode())
    for fingerprint, multiplier in sorted(loras):
        digest.update(f"\0{fingerprint}\0".encode() + struct.pack("<d", multiplier))
    return digest.hexdigest()
