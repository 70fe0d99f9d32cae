"""Verifying a cache: every file has the bytes that were written, is finite, of the right shape, and the one the index
refers to. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lapwan import console
from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.caching.layout import (
    LATENTS_END,
    PROMPTS_FILE,
    ROI_END,
    TEMPORAL_STRIDE,
    TEXT_END,
    checksum_matches,
    find_tensor,
    open_cache_file,
    read_recipe,
    recipe_fingerprint,
)
from lapwan.caching.read import load_index
from lapwan.checkpoints.container import TensorFile
from lapwan.errors import UserError
from lapwan.files import is_temporary

# safetensors dtype -> (unsigned type of its size, the exponent bits that are all 1 in infinities and NaN)
_EXPONENT = {
    "F64": (np.uint64, 0x7FF0 << 48), "F32": (np.uint32, 0x7F80_0000), "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}


@dataclass(frozen=True)
class VerifiedFiles:
    """Number of files read, those without a checksum, and why others are damaged, by name."""

    count: int
    unchecked: int
    problems: dict[str, str]


def verify_folder(folder: Path) -> VerifiedFiles:
    """Read every file of an index.

    Raises:
        UserError: the folder has no usable index.
    """
    index = load_index(folder)
    checks: dict[str, tuple[str, CachedItem | None]] = {}
    for cached in index.items:
        checks[cached.latents] = ("latents", cached)
        checks[cached.text] = ("text", cached)
        if cached.roi is not None:
            checks[cached.roi] = ("roi", cached)
    if (folder / PROMPTS_FILE).is_file():
        checks[PROMPTS_FILE] = ("prompts", None)
    return _read_all(folder, checks, index)


def damaged_files(folder: Path) -> dict[str, str]:
    """Why cache files of a folder are damaged, by name; also those that no index lists, such as a killed run leaves."""
    if not folder.is_dir():
        return {}
    paths = (path for path in folder.iterdir() if path.name.endswith((LATENTS_END, TEXT_END, ROI_END, PROMPTS_FILE)))
    names = sorted(path.name for path in paths if not is_temporary(path))
    result = _read_all(folder, dict.fromkeys(names, ("", None)), CacheIndex(folder, ()))
    warn_unchecked(folder, result)
    for name, reason in result.problems.items():
        console.log(f"{name}: {reason}")
    if not result.problems:
        console.log(f"{folder}: all {result.count} files are intact")
    return {name: f"damaged: {reason}" for name, reason in result.problems.items()}


def warn_unchecked(folder: Path, result: VerifiedFiles) -> None:
    """Say how many files have no checksum."""
    if result.unchecked:
        console.log(f"{folder}: {result.unchecked} of {result.count} files have no checksum (older versions and other "
                    "tools write none); only their shapes and values are checked")


def _read_all(folder: Path, checks: Mapping[str, tuple[str, CachedItem | None]], index: CacheIndex) -> VerifiedFiles:
    problems: dict[str, str] = {}
    unchecked = 0
    with console.progress("verify", len(checks), "file") as bar:
        for name, (kind, item) in checks.items():
            try:
                file = open_cache_file(folder / name)
                intact = checksum_matches(file)
                reason = "its checksum does not match" if intact is False else _problem(file, kind, item, index)
            except UserError as error:
                intact = True
                reason = str(error).removeprefix(f"{folder / name} ").split("; ")[0]
            except OSError as error:
                intact, reason = True, f"cannot be read ({error.strerror})"
            unchecked += intact is None
            if reason:
                problems[name] = reason
            bar.advance()
    return VerifiedFiles(len(checks), unchecked, problems)


def _problem(file: TensorFile, kind: str, item: CachedItem | None, index: CacheIndex) -> str | None:
    for name in file.tensors:
        if not is_finite(file, name):
            return f"tensor {name} holds infinities or NaN"
    if item is None:
        return None
    recipe = read_recipe(file)
    if recipe is not None and recipe_fingerprint(recipe) != item.fingerprints.get(kind):
        return "not made from what the index says"
    if kind == "text":
        shape = file.tensors[str(find_tensor(file, "varlen_t5"))].shape
        if file.metadata.get("caption1") != item.caption:
            return "not made from the caption in the index"
        return None if len(shape) == 2 and index.text_dim in (None, shape[1]) else f"features {list(shape)}"
    return _shape_problem(file, kind, item)


def _shape_problem(file: TensorFile, kind: str, item: CachedItem) -> str | None:
    """Latents have (frames - 1) / stride + 1 frames and the aspect ratio of the item."""
    kinds = [("roi", 3)] if kind == "roi" else [("latents", 4), *([("latents_image", 4)] if item.condition else [])]
    for name, rank in kinds:
        shape = file.tensors[str(find_tensor(file, name))].shape
        frames, height, width = shape[-3:] if len(shape) == rank else (0, 0, 0)
        if (frames - 1) * TEMPORAL_STRIDE + 1 != item.frames or height * item.width != width * item.height:
            return f"{name} {list(shape)} do not fit {item.frames} frames of {item.height}x{item.width}"
    return None


def is_finite(file: TensorFile, name: str) -> bool:
    """Whether no element of a floating-point tensor has all its exponent bits set."""
    kind = _EXPONENT.get(file.tensors[name].dtype)
    if kind is None:
        return True
    bits = np.frombuffer(file.read(name), dtype=kind[0])
    mask = np.array(kind[1], dtype=kind[0])
    return not bool(((bits & mask) == mask).any())
