"""Identities of weight files and of merges, without torch.

A fingerprint ties a LoRA, a mixture or a cache to the base it was made with; it is no proof against tampering.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

from lapwan.checkpoints.container import TensorFile, TensorInfo, read_header
from lapwan.checkpoints.wan_keys import tensor_to_diffusers

FINGERPRINT_KEY = "lapwan.fingerprint"
_PIECE = 4096  # bytes
_INNER_PIECES = 4  # strided pieces between the first and the last


def checkpoint_fingerprint(files: Sequence[Path]) -> str:
    """Identity of one component's weights: 64 hex digits.

    The metadata `lapwan.fingerprint` where every file carries the same one (a merge writes it); else sha256 over, by
    sorted tensor name, (name, dtype, shape, sampled bytes). Sampled are the first and last 4 KiB and four strided
    pieces of 4 KiB of each tensor: milliseconds on a 28 GB file, independent of sharding. A change confined to bytes
    between the samples is not seen; any training or merge changes nearly all bytes of a tensor.

    Raises:
        UserError: a file that is missing, damaged, or no safetensors file.
    """
    headers = [read_header(path) for path in files]
    said = {header.metadata.get(FINGERPRINT_KEY) for header in headers}
    if len(said) == 1 and (known := said.pop()):
        return known
    where: dict[str, tuple[TensorFile, TensorInfo]] = {}
    for header in headers:
        # By diffusers' names: the same weights in the original layout are the same base.
        where |= {tensor_to_diffusers(name): (header, info) for name, info in header.tensors.items()}
    digest = hashlib.sha256()
    for name in sorted(where):
        header, info = where[name]
        digest.update(f"{name}\0{info.dtype}\0{','.join(map(str, info.shape))}\0".encode())
        for start, size in _samples(info.size):
            digest.update(header.read(info.name, start, size))
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what is hashed of a tensor of `size` bytes: all of it if it is small."""
    pieces = _INNER_PIECES + 2
    if size <= pieces * _PIECE:
        return [(0, size)]
    return [(k * (size - _PIECE) // (pieces - 1), _PIECE) for k in range(pieces)]


def merged_fingerprint(base: str, loras: Sequence[tuple[str, float]]) -> str:
    """Identity of base + Σ multiplier · LoRA: sha256 over (base, the sorted [(LoRA's fingerprint, multiplier)]).

    The same for a merge in memory and for a merged file, and in any order of the LoRAs; `base` itself without any.
    """
    if not loras:
        return base
    digest = hashlib.sha256(f"merge/1\0{base}".encode())
    for fingerprint, multiplier in sorted(loras):
        digest.update(f"\0{fingerprint}\0".encode() + struct.pack("<d", multiplier))
    return digest.hexdigest()
