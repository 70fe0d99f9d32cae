"""Merging LoRAs into checkpoint files: what goes where is planned and checked first, then written as a stream.

The result carries where it comes from: metadata `lapwan.merged` (a JSON list of {fingerprint, multiplier,
noise_expert}), `lapwan.base_fingerprint`, and `lapwan.fingerprint` = `merged_fingerprint(base, LoRAs)`, the same that
a merge in memory has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.fingerprints import FINGERPRINT_KEY, checkpoint_fingerprint, merged_fingerprint
from lapwan.checkpoints.lora_keys import canonical_path
from lapwan.checkpoints.rewrite import Advance, check_mergeable, rewrite
from lapwan.console import log
from lapwan.errors import UserError, nearest
from lapwan.lora.formats import LoraFile
from lapwan.lora.merge_verify import verify as verify_file
from lapwan.lora.state import Term
from lapwan.names import NoiseExpert

MERGED_KEY, BASE_KEY = "lapwan.merged", "lapwan.base_fingerprint"
_PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|model\.)?")


@dataclass(frozen=True)
class Given:
    """One LoRA and its multiplier, for one transformer; `fingerprint` is the LoRA's content's."""

    lora: LoraFile
    multiplier: float
    fingerprint: str


@dataclass(frozen=True)
class ComponentPlan:
    """One transformer's merge: its files, the terms of each file's tensors, and the metadata of the result."""

    noise_expert: NoiseExpert | None
    files: tuple[TensorFile, ...]
    terms: tuple[dict[str, list[Term]], ...]
    given: tuple[Given, ...]
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
        """One line for the plan."""
        loras = ", ".join(f"{g.lora.path.name} x {g.multiplier:g}" for g in self.given) or "no LoRA, unchanged"
        return f"{name}: {self.touched} weights, {self.size / 2**30:.3g} GiB in {len(self.files)} file(s): {loras}"


def linear_weights(files: Sequence[TensorFile]) -> dict[str, tuple[int, str]]:
    """diffusers' module path -> (index of the file, tensor's name) of a transformer's Linears, in either naming.

    Raises:
        UserError: one module in two files (variants of one model side by side), or no Wan Linear at all.
    """
    found: dict[str, tuple[int, str]] = {}
    for index, file in enumerate(files):
        for name, info in file.tensors.items():
            path = canonical_path(_PREFIX.sub("", name).removesuffix(".weight")) if name.endswith(".weight") else None
            if path is None or len(info.shape) != 2:
                continue
            if path in found:
                raise UserError(f"{files[found[path][0]].path} and {file.path} both hold '{name}'; keep one variant "
                                "of the weights in the folder")
            found[path] = (index, name)
    if not found:
        raise UserError(f"{files[0].path} is not a Wan transformer: no weight such as "
                        "'blocks.0.self_attn.q.weight' or 'blocks.0.attn1.to_q.weight'")
    return found


def plan_component(paths: Sequence[Path], given: Sequence[Given], noise_expert: NoiseExpert | None) -> ComponentPlan:
    """Check that `given` fits the transformer in `paths`, and say what will change; reads headers only.

    Raises:
        UserError: a module the transformer lacks (with the nearest it has), a shape that does not fit, a quantised
            weight, or a LoRA that is already merged.
    """
    files, terms = plan_terms(paths, [(one.lora, one.multiplier) for one in given])
    return ComponentPlan(noise_expert, files, terms, tuple(given), _provenance(files, paths, given, noise_expert))


def plan_terms(
    paths: Sequence[Path], given: Sequence[tuple[LoraFile, float]]
) -> tuple[tuple[TensorFile, ...], tuple[dict[str, list[Term]], ...]]:
    """The transformer's files, and for each what is added to which of its tensors; headers only.

    Raises:
        UserError: as `plan_component`, but for what is already merged.
    """
    files = tuple(read_header(path) for path in paths)
    weights = linear_weights(files)
    terms: tuple[dict[str, list[Term]], ...] = tuple({} for _ in files)
    for lora, multiplier in given:
        for path, module in lora.modules.items():
            if path not in weights:
                raise UserError(f"{lora.path}: module '{path}' is not in {paths[0].parent.name}/{paths[0].name}"
                                f"{nearest(path, weights)}; the LoRA was made for another model")
            index, name = weights[path]
            shape = files[index].tensors[name].shape
            if shape != module.shape:
                raise UserError(f"{lora.path}: module '{path}' changes a weight {list(module.shape)}, but "
                                f"{files[index].path.name} has {list(shape)}; the LoRA was made for another model")
            check_mergeable(files[index], name)
            terms[index].setdefault(name, []).append(Term(module, multiplier))
    return files, terms


def _provenance(
    files: Sequence[TensorFile], paths: Sequence[Path], given: Sequence[Given], noise_expert: NoiseExpert | None
) -> dict[str, str]:
    before = merged_list(files[0])
    known = {str(item.get("fingerprint")) for item in before}
    for n, one in enumerate(given):
        if one.fingerprint in known:
            raise UserError(f"{one.lora.path} is already merged into {paths[0]} (by the file's own record); merging "
                            "it again would double it: start from the base model")
        if one.fingerprint in {other.fingerprint for other in given[:n]}:
            raise UserError(f"{one.lora.path} is given twice (the same content); give it once, with the sum of the "
                            "strengths")
    base = checkpoint_fingerprint(paths)
    entries = [
        {"fingerprint": one.fingerprint, "multiplier": one.multiplier, "noise_expert": noise_expert.value if noise_expert else None}
        for one in given
    ]
    return {
        MERGED_KEY: json.dumps(before + entries),
        BASE_KEY: files[0].metadata.get(BASE_KEY, base),
        FINGERPRINT_KEY: merged_fingerprint(base, [(one.fingerprint, one.multiplier) for one in given]),
    }


def merged_list(file: TensorFile) -> list[dict[str, Any]]:
    """What the file says was merged into it before."""
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
        verify: read every file back before it gets its name (see `lapwan.lora.merge_verify`).
    """
    for file, terms, target in zip(plan.files, plan.terms, targets, strict=True):
        metadata = {"format": "pt", **file.metadata, **plan.provenance}
        check = _checker(file, terms, target, advance) if verify else None
        rewrite(file, target, terms, metadata, advance, check)


def _checker(
    file: TensorFile, terms: Mapping[str, Sequence[Term]], target: Path, advance: Advance
) -> Callable[[Path], None]:
    def check(written: Path) -> None:
        worst = verify_file(file, read_header(written), terms, advance)
        log(f"verified {target.name}: {len(terms)} merged weights within {worst:.3f} ulp, the other "
            f"{len(file.tensors) - len(terms)} tensors identical")

    return check
