"""Merging LoRAs into checkpoint files: plan and check from the headers, write as a stream, verify.

The result records its origin: metadata `lapwan.merged` (a JSON list of {fingerprint, multiplier, noise_expert}),
`lapwan.base_fingerprint`, and `lapwan.fingerprint` = `merged_fingerprint(base, LoRAs)`, the fingerprint of the same
merge in memory. The arithmetic is in `lapwan.checkpoints.rewrite`.

Verifying reads a merged file back against its source: untouched bytes are equal, touched weights within one rounding:

    |W' − (W + Σ m·ΔW)| ≤ ½ ulp of the exact value (+ the accumulation's own error),  recomputed in fp64
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapwan.checkpoints.container import ITEM_SIZE, TensorFile, TensorInfo, read_header
from lapwan.checkpoints.fingerprints import FINGERPRINT_KEY, checkpoint_fingerprint, merged_fingerprint
from lapwan.checkpoints.rewrite import AddRows, Advance, check_mergeable, matrix_shape, rewrite
from lapwan.checkpoints.tensors import load_rows
from lapwan.checkpoints.wan_keys import target_path, to_original, without_wrapper
from lapwan.checkpoints.weights import WeightFile, read_weights, unquantised
from lapwan.console import count_text, log
from lapwan.errors import UserError, nearest
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.state import Term
from lapwan.names import NoiseExpert

MERGED_KEY, BASE_KEY = "lapwan.merged", "lapwan.base_fingerprint"
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_CHUNK = 16 << 20  # bytes of an untouched tensor, or of a touched one in fp64, at a time
# The accumulation's own error over the largest magnitude in the tile, and that of torch's conversion to 16 bits, which
# goes through fp32, over the value.
_SLACK, _TWICE_ROUNDED = 1e-14, 2.0**-24


@dataclass(frozen=True)
class LoraToMerge:
    """One LoRA and its multiplier, for one transformer; `fingerprint` is that of the LoRA's content."""

    lora: AdapterFile
    multiplier: float
    fingerprint: str


@dataclass(frozen=True)
class ComponentPlan:
    """One transformer's merge: its files, the terms added to each file's tensors, and the metadata of the result."""

    noise_expert: NoiseExpert | None
    files: tuple[TensorFile, ...]
    terms: tuple[dict[str, list[Term]], ...]
    loras: tuple[LoraToMerge, ...]
    provenance: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes to write."""
        return sum(file.size for file in self.files)

    @property
    def touched(self) -> int:
        """Weights that change."""
        return sum(len(terms) for terms in self.terms)

    def describe(self, name: str) -> str:
        """One line for the console."""
        loras = ", ".join(f"{g.lora.path.name} x {g.multiplier:g}" for g in self.loras) or "no LoRA, unchanged"
        files = count_text(len(self.files), "file")
        return f"{name}: {self.touched} weights, {self.size / 2**30:.3g} GiB in {files}: {loras}"


def target_tensors(files: Sequence[TensorFile]) -> dict[str, tuple[int, str]]:
    """Path (`wan_keys.target_path`) -> (index of the file, tensor's name) of all that an adapter may change in a
    transformer, in either layout.

    Raises:
        UserError: one tensor in two files (variants of one model side by side), or no Wan Linear at all.
    """
    weights: dict[str, tuple[int, str]] = {}
    for index, file in enumerate(files):
        for name in file.tensors:
            path = target_path(without_wrapper(name))
            if path is None:
                continue
            if path in weights:
                raise UserError(f"{files[weights[path][0]].path} and {file.path} both hold '{name}'; keep one variant "
                                "of the weights in the folder")
            weights[path] = (index, name)
    if not any(map(is_linear, weights)):
        raise UserError(f"{files[0].path} is not a Wan transformer: no weight such as "
                        "'blocks.0.self_attn.q.weight' or 'blocks.0.attn1.to_q.weight'")
    return weights


def _hint(path: str, known: Collection[str]) -> str:
    """What to append about a module that a transformer lacks: its blocks if there are too few, else the nearest module
    of the same kind and block."""
    block = _BLOCK.match(path)
    last = max((int(match[1]) for match in map(_BLOCK.match, known) if match), default=-1)
    if block and int(block[1]) > last:
        return f", which has blocks 0 to {last}"
    same = [other for other in known if is_linear(other) == is_linear(path)
            and (_BLOCK.match(other) or [""])[0] == (block or [""])[0]]
    return nearest(path, same)


def is_linear(path: str) -> bool:
    """The weight of a Linear, which low-rank pairs can change: no bias, norm, modulation or convolution."""
    return path != "patch_embedding" and to_original(path) is not None


def plan_component(
    paths: Sequence[Path], loras: Sequence[LoraToMerge], noise_expert: NoiseExpert | None, dtype: str | None = None
) -> ComponentPlan:
    """Check that `loras` fit the transformer in `paths`, and plan what will change; reads headers only.

    Args:
        paths: the transformer's file, or its shards.
        loras: the LoRAs to add, with multipliers.
        noise_expert: recorded in the result; None: not known.
        dtype: `bfloat16`, `float16` or `float32`, to which quantised weights are dequantised before the merge.

    Raises:
        UserError: a module the transformer lacks (with the nearest it has), a shape that does not fit, quantised
            weights without `dtype`, or a LoRA that is already merged.
    """
    files, terms = plan_terms(paths, [(item.lora, item.multiplier) for item in loras])
    files = _to_write(files, dtype)
    return ComponentPlan(noise_expert, files, terms, tuple(loras), _provenance(files, paths, loras, noise_expert))


def _to_write(files: tuple[WeightFile, ...], dtype: str | None) -> tuple[WeightFile, ...]:
    """The files as they are written: quantised ones dequantised."""
    quantised = [file for file in files if file.quantised]
    if dtype is None and quantised:
        size = sum(unquantised(file, "BF16").size for file in files)
        types = ", ".join(quantised[0].quantised)
        raise UserError(f"{quantised[0].path} is quantised ({types}), and a LoRA merges into unquantised weights: add "
                        f"--dtype bfloat16 to write them dequantised ({size / 2**30:.3g} GiB), or give the LoRA to "
                        "`lapwan generate --lora`, which leaves the file as it is")
    if dtype is not None and not quantised:
        raise UserError("--dtype applies only if the result is a LoRA, or the model is quantised; a merged model keeps "
                        "its layout and dtype")
    if dtype is None:
        return files
    return tuple(unquantised(file, _STORED[dtype]) for file in files)


def plan_terms(
    paths: Sequence[Path], loras: Sequence[tuple[AdapterFile, float]]
) -> tuple[tuple[WeightFile, ...], tuple[dict[str, list[Term]], ...]]:
    """(the transformer's files, for each file the terms to add by tensor name); reads headers only.

    Args:
        paths: the transformer's file, or its shards.
        loras: LoRAs with their multipliers.

    Raises:
        UserError: as `plan_component`, except that a LoRA merged before is not refused.
    """
    files = tuple(read_weights(path) for path in paths)
    weights = target_tensors(files)
    terms: tuple[dict[str, list[Term]], ...] = tuple({} for _ in files)
    for lora, multiplier in loras:
        for path, module in lora.modules.items():
            if path not in weights:
                near = _hint(path, weights)
                raise UserError(f"{lora.path}: module '{path}' is not in {paths[0].parent.name}/{paths[0].name}{near}; "
                                f"{lora.other_model()}")
            index, name = weights[path]
            shape = files[index].tensors[name].shape
            # Products for a convolution count its kernel into `in`.
            if module.shape not in ((shape, matrix_shape(shape)) if len(shape) > 2 else (shape,)):
                raise UserError(f"{lora.path}: module '{path}' changes a weight {list(module.shape)}, but "
                                f"{files[index].path.name} has {list(shape)}; {lora.other_model()}")
            check_mergeable(files[index], name)
            terms[index].setdefault(name, []).append(Term(module, multiplier))
    return files, terms


def _provenance(
    files: Sequence[TensorFile], paths: Sequence[Path], loras: Sequence[LoraToMerge], noise_expert: NoiseExpert | None
) -> dict[str, str]:
    """Metadata that records the merge; refuses a LoRA that would be merged twice."""
    history = merge_history(files[0])
    known = {str(item.get("fingerprint")) for item in history}
    for n, item in enumerate(loras):
        if item.fingerprint in known:
            raise UserError(f"{item.lora.path} is already merged into {paths[0]} (its metadata records it); merging "
                            "it again would double it: start from the base model")
        if item.fingerprint in {other.fingerprint for other in loras[:n]}:
            raise UserError(f"{item.lora.path} is given twice (the same content); give it once, with the sum of the "
                            "strengths")
    base = checkpoint_fingerprint(paths)
    role = noise_expert.value if noise_expert else None
    entries = [
        {"fingerprint": item.fingerprint, "multiplier": item.multiplier, "noise_expert": role} for item in loras
    ]
    return {
        MERGED_KEY: json.dumps(history + entries),
        BASE_KEY: files[0].metadata.get(BASE_KEY, base),
        FINGERPRINT_KEY: merged_fingerprint(base, [(item.fingerprint, item.multiplier) for item in loras]),
    }


def merge_history(file: TensorFile) -> list[dict[str, Any]]:
    """The LoRAs merged into the file before, from its metadata.

    Raises:
        UserError: the metadata is not a JSON list of objects.
    """
    text = file.metadata.get(MERGED_KEY, "[]")
    try:
        items = json.loads(text)
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{file.path}: metadata {MERGED_KEY} is not a JSON list of objects; the file is damaged")
    return items


def write_component(plan: ComponentPlan, targets: Sequence[Path], advance: Advance, verify: bool = False) -> None:
    """Write each file of the plan to its target, atomically, one after the other.

    Args:
        plan: the base's files and the updates of each tensor.
        targets: a path per file of the plan.
        advance: is called with the number of bytes written or verified.
        verify: read every file back with `verify_merged` before it is renamed to its target.

    Raises:
        UserError: with `verify`, a tensor that differs when read back.
    """
    for file, terms, target in zip(plan.files, plan.terms, targets, strict=True):
        metadata = {"format": "pt", **file.metadata, **plan.provenance}
        check = _checker(file, terms, target, advance) if verify else None
        rewrite(file, target, terms, metadata, advance, check)


def _checker(
    file: TensorFile, terms: Mapping[str, Sequence[Term]], target: Path, advance: Advance
) -> Callable[[Path], None]:
    def check(written: Path) -> None:
        worst = verify_merged(file, read_header(written), terms, advance)
        log(f"verified {target.name}: {len(terms)} merged weights within {worst:.3f} ulp, the other "
            f"{len(file.tensors) - len(terms)} tensors identical")

    return check


def verify_merged(
    source: TensorFile, merged: TensorFile, terms: Mapping[str, Sequence[Term]], advance: Advance
) -> float:
    """Compare every tensor of a merged file with its source.

    Args:
        source: the base's file.
        merged: the file that was written.
        terms: the updates by name of tensor.
        advance: called with the bytes compared.

    Returns:
        The largest rounding error of a touched weight beyond the accumulation's own, in units in the last place of
        its dtype: at most 0.5.

    Raises:
        UserError: a tensor differs from base + LoRA, which means a faulty disk or memory.
    """
    worst = 0.0
    for name, info in source.tensors.items():
        other = merged.tensors.get(name)
        if other is None or (other.dtype, other.shape) != (info.dtype, info.shape):
            raise _mismatch(merged, name)
        if name in terms:
            rows = partial(load_rows, source.unrounded, name)
            additions = [term.module.prepare(term.multiplier, torch.float64, rows) for term in terms[name]]
            worst = max(worst, _verify_touched(source, merged, info, additions, advance))
        else:
            _verify_untouched(source, merged, info, advance)
    return worst


def _verify_untouched(source: TensorFile, merged: TensorFile, info: TensorInfo, advance: Advance) -> None:
    for offset in range(0, info.size, _CHUNK):
        size = min(_CHUNK, info.size - offset)
        if source.read(info.name, offset, size) != merged.read(info.name, offset, size):
            raise _mismatch(merged, info.name)
        advance(size)


def _verify_touched(
    source: TensorFile, merged: TensorFile, info: TensorInfo, additions: Sequence[AddRows], advance: Advance,
) -> float:
    rows, columns = matrix_shape(info.shape)
    row_bytes, step, worst = columns * ITEM_SIZE[info.dtype], max(1, _CHUNK // (columns * 8)), 0.0
    for first in range(0, rows, step):
        count = min(step, rows - first)
        before, after = (load_rows(file, info.name, first, count) for file in (source.unrounded, merged))
        exact = before.double()
        for add_rows in additions:
            add_rows(exact, before, first)
        error = (after.double() - exact).abs_()
        ulp = _ulp(exact, after.dtype)
        largest = max(exact.abs().max().item(), before.double().abs().max().item())
        error -= _SLACK * largest + (_TWICE_ROUNDED * exact.abs() if after.dtype.itemsize == 2 else 0)
        if not (error <= 0.5 * ulp).all():
            raise _mismatch(merged, info.name)
        worst = max(worst, (error / ulp).max().item())
        advance(count * row_bytes)
    return worst


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at each value: 2^exponent · eps, at least that of its subnormals."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp_min(info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def _mismatch(merged: TensorFile, name: str) -> UserError:
    return UserError(f"{merged.path}: tensor '{name}' is not base + LoRA when read back; check the disk and the "
                     "memory, then merge again")
