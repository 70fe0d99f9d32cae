"""Which LoRA goes to which noise expert: the roles the user gave, checked against the files' metadata and keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lapwan.checkpoints.wan_keys import in_part, target_label
from lapwan.console import detail, log, warn
from lapwan.errors import UserError
from lapwan.lora.adapter_file import AdapterFile
from lapwan.lora.formats import KeyRule, open_for_use, open_lora
from lapwan.lora.metadata import boundary_from_metadata
from lapwan.names import NoiseExpert


class LoraRequest(NamedTuple):
    """A LoRA as a user gives it.

    Args:
        role: high, low, both, or None: as the file records.
        parts: only the modules that lie in all of these parts of the transformer (`wan_keys.in_part`).
    """

    role: str | None
    path: Path
    strength: float
    parts: tuple[str, ...] = ()


Assigned = dict[NoiseExpert, list[tuple[AdapterFile, float]]]


def assign(
    requests: Sequence[LoraRequest], noise_experts: Sequence[NoiseExpert], rule: KeyRule = "default",
    one_transformer: bool = False,
) -> Assigned:
    """(LoRA, strength) by noise expert of the model; reads headers only.

    Args:
        requests: the LoRAs.
        noise_experts: those that the model has.
        rule: what of a file may be dropped.
        one_transformer: the model has one for all noise, so that the words of a file's name say nothing.

    Raises:
        UserError: a file that is not a LoRA, is for another noise expert, or does not say for which of two.
    """
    assigned: Assigned = {}
    for role, path, strength, parts in requests:
        files = _in_parts(open_for_use(path, rule), parts)
        files = _for_all_noise(files, path, role) if one_transformer else files
        for noise_expert in _noise_experts_of(role, path, files, noise_experts):
            lora = _file_for(files, noise_expert, both=role == "both")
            assigned.setdefault(noise_expert, []).append((lora, strength))
    return assigned


def _for_all_noise(
    files: dict[NoiseExpert | None, AdapterFile], path: Path, role: str | None
) -> dict[NoiseExpert | None, AdapterFile]:
    """The files, for the transformer of a model that has one: whatever a file's name says (`low_motion`), and with a
    warning what it was trained for. People put LoRAs of Wan2.2's low noise expert on Wan2.1.

    Raises:
        UserError: a file for both noise experts of a model of two.
    """
    if None in files or (len(files) > 1 and role in tuple(NoiseExpert)):
        return files
    if len(files) > 1:
        raise UserError(f"{path} holds a LoRA for each of two noise experts, but this model has one transformer for "
                        "all noise; give a LoRA of this model, or high=FILE to use that part of it")
    [(noise_expert, file)] = files.items()
    if file.noise_expert_source != "name":
        source = "metadata says" if file.noise_expert_source == "metadata" else "keys say"
        warn(f"{path} is for the {noise_expert} noise expert of a model of two (its {source} so); this model has one "
             "transformer for all noise")
    return {None: replace(file, noise_expert=None, noise_expert_source="")}


def report(files: Iterable[AdapterFile], reported: set[str] | None = None) -> None:
    """One line about each file: what is applied and what is dropped; a warning if it is not all zeros.

    Args:
        files: adapters that were opened.
        reported: lines that are not repeated; those printed are added.
    """
    known = set() if reported is None else reported
    for line, loses in {file.report(): file.loses for file in files}.items():
        if line not in known:
            (warn if loses else log)(line)
            known.add(line)


def assign_to_transformer(
    requests: Sequence[LoraRequest], named: NoiseExpert | None, rule: KeyRule = "default"
) -> tuple[NoiseExpert | None, list[tuple[AdapterFile, float]]]:
    """LoRAs for a single transformer, and its noise expert: from the roles, else `named`, else from the files.

    Args:
        requests: see `assign`.
        named: the noise expert that the transformer's path names; None: not known.
        rule: what of a file may be dropped.

    Returns:
        (noise expert, None if nothing tells; [(LoRA, strength)]).

    Raises:
        UserError: LoRAs for both noise experts, or for the other one.
    """
    roles = {NoiseExpert(request.role) for request in requests if request.role in tuple(NoiseExpert)}
    if len(roles) > 1:
        raise UserError("LoRAs are given for high and low, but there is one transformer; merge one at a time, or a "
                        "whole model with --model")
    noise_expert = roles.pop() if roles else named
    if noise_expert is None:
        recorded = {e for request in requests for e in open_lora(request.path, rule=rule)} - {None}
        if len(recorded) > 1:
            raise UserError("the LoRAs are for both noise experts, and it is not recorded which one the transformer "
                            "is; give the right LoRA as high=FILE or low=FILE")
        noise_expert = recorded.pop() if recorded else None
    assumed = noise_expert or NoiseExpert.HIGH  # not known: any will do, since there is one transformer
    return noise_expert, assign(requests, [assumed], rule)[assumed]


def group_by_noise_expert(
    requests: Sequence[LoraRequest], rule: KeyRule = "default"
) -> dict[NoiseExpert | None, list[tuple[AdapterFile, float]]]:
    """LoRAs to be summed, by noise expert; a file without one goes to the noise expert of the other files.

    Args:
        requests: see `assign`.
        rule: what of a file may be dropped.

    Raises:
        UserError: files for different noise experts without high= and low= in front, or a file without a noise expert
            while the others are for both.
    """
    groups: dict[NoiseExpert | None, list[tuple[AdapterFile, float]]] = {}
    unassigned: list[tuple[AdapterFile, float]] = []
    by_file: list[set[NoiseExpert]] = []
    for role, path, strength, parts in requests:
        files = _in_parts(open_for_use(path, rule), parts)
        noise_experts = [e for e in files if e is not None]
        if role is not None:
            noise_experts = _noise_experts_of(role, path, files, [*NoiseExpert])
        for noise_expert in noise_experts:
            lora = _file_for(files, noise_expert, both=role == "both")
            groups.setdefault(noise_expert, []).append((lora, strength))
        if role is None and None in files:
            unassigned.append((files[None], strength))
        elif role is None:
            by_file.append(set(noise_experts))
    if any(noise_experts != by_file[0] for noise_experts in by_file):
        names = ", ".join(str(request.path) for request in requests)
        raise UserError(f"these LoRAs are for different noise experts: {names}; sum those of one noise expert, or "
                        "give high=FILE and low=FILE to write both")
    if unassigned and len(groups) > 1:
        raise UserError(f"{unassigned[0][0].path} does not say which noise expert it is for; give it as high=FILE, "
                        "low=FILE, or both=FILE")
    if unassigned:
        groups.setdefault(next(iter(groups), None), []).extend(unassigned)
    return groups


def _in_parts(
    files: dict[NoiseExpert | None, AdapterFile], parts: Sequence[str]
) -> dict[NoiseExpert | None, AdapterFile]:
    """The files with the modules that lie in all of `parts`.

    Raises:
        UserError: no module does.
    """
    if not parts:
        return files
    chosen: dict[NoiseExpert | None, AdapterFile] = {}
    where = "".join(f"@{part}" for part in parts)
    for noise_expert, file in files.items():
        modules = {path: module for path, module in file.modules.items() if all(in_part(path, part) for part in parts)}
        detail(f"{file.path.name}{where}: {len(modules)} of {len(file.modules)} modules")
        if modules:
            chosen[noise_expert] = replace(file, modules=modules)
    if not chosen:
        file = next(iter(files.values()))
        labels = [target_label(path) for path in file.modules]
        blocks = sorted({int(block) for block, _ in labels if block.isdigit()})
        names = ", ".join(dict.fromkeys(name for _, name in labels))
        within = f" in blocks {blocks[0]} to {blocks[-1]}" if blocks else ""
        raise UserError(f"{file.path}: none of its modules lies in {where}; it has {names}{within}")
    return chosen


def _noise_experts_of(
    role: str | None, path: Path, files: dict[NoiseExpert | None, AdapterFile], noise_experts: Sequence[NoiseExpert]
) -> list[NoiseExpert]:
    """The noise experts, of `noise_experts`, that a request is for."""
    if role == "both":
        return list(noise_experts)
    if role is None and None in files:
        if len(noise_experts) > 1:
            raise UserError(f"{path}{_made_for(files[None])} does not say which noise expert it is for; give it as "
                            "high=FILE, low=FILE, or both=FILE")
        return list(noise_experts)
    wanted = [NoiseExpert(role)] if role is not None else [e for e in files if e is not None]
    for noise_expert in wanted:
        if noise_expert not in noise_experts:
            made_for = _made_for(next(iter(files.values())))
            raise UserError(f"{path}{made_for} is for the {noise_expert} noise expert, but the model or file given "
                            f"here only has the {' and '.join(noise_experts)} one; give a LoRA for that, or both=FILE "
                            "to force it")
    return wanted


def _made_for(file: AdapterFile) -> str:
    """` (for TI2V-5B)`: the model of a file, if it can be told."""
    model = file.metadata.get("lapwan.model") or file.fits()
    return f" (for {model})" if model else ""


def _file_for(files: dict[NoiseExpert | None, AdapterFile], noise_expert: NoiseExpert, both: bool) -> AdapterFile:
    lora = files.get(noise_expert) or files.get(None)
    if lora is not None:
        return lora
    (other,) = files.values()
    check_role(other, noise_expert, only_warn=both)
    return other


def check_role(lora: AdapterFile, noise_expert: NoiseExpert, only_warn: bool = False) -> None:
    """Refuse a LoRA that is for the other noise expert by its metadata or keys; warn if only its name says so.

    Args:
        lora: the file.
        noise_expert: the one that it is given for.
        only_warn: warn in every case, for `both=FILE`.

    Raises:
        UserError: the file is for the other noise expert.
    """
    if lora.noise_expert is None or lora.noise_expert is noise_expert:
        return
    if lora.noise_expert_source == "name":
        warn(f"{lora.path} is given for the {noise_expert} noise expert, but its name says {lora.noise_expert}")
        return
    source = "metadata says" if lora.noise_expert_source == "metadata" else "keys say"
    message = (f"{lora.path} is for the {lora.noise_expert} noise expert (its {source} so), not for the "
               f"{noise_expert} one")
    if not only_warn:
        raise UserError(f"{message}; give it as {lora.noise_expert}=FILE")
    warn(message)


def warn_mismatch(
    lora: AdapterFile, task: str | None = None, boundary: float | None = None, base: str | None = None
) -> None:
    """Warn if a LoRA's metadata differs from the model it is put on; not refused, since it may still work.

    Args:
        lora: the file.
        task: of the model.
        boundary: of the model, a sigma.
        base: fingerprint of the noise expert's weights. None for any of the three: not compared.
    """
    metadata = lora.metadata
    if task and metadata.get("lapwan.task") and metadata["lapwan.task"] != task:
        warn(f"{lora.path} was trained for {metadata['lapwan.task']}; this model is {task}")
    trained = boundary_from_metadata(metadata)
    if boundary is not None and trained is not None and abs(trained - boundary) > 1e-6:
        warn(f"{lora.path} was trained with boundary {trained:g}; this model's is {boundary:g}")
    fingerprint = metadata.get("lapwan.base_fingerprint")
    if base and fingerprint and fingerprint != base:
        warn(f"{lora.path} was trained on other weights (fingerprint {fingerprint[:12]}, these have {base[:12]})")
