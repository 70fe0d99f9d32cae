"""Which LoRA goes to which noise expert: what the user said, checked against what the files say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lapwan.console import warn
from lapwan.errors import UserError
from lapwan.lora.formats import LoraFile, open_lora, stated_boundary
from lapwan.names import NoiseExpert

Request = tuple[str | None, Path, float]  # (high, low, both or None: the file says; file; strength)
Assigned = dict[NoiseExpert, list[tuple[LoraFile, float]]]


def assign(requests: Sequence[Request], noise_experts: Sequence[NoiseExpert]) -> Assigned:
    """LoRAs with their strengths by noise expert, of those the model has; headers are read, tensors are not.

    Raises:
        UserError: a file that is no LoRA, that is for the other noise expert, or that does not say which of two.
    """
    found: Assigned = {}
    for role, path, strength in requests:
        files = open_lora(path)
        for noise_expert in _wanted(role, path, files, noise_experts):
            found.setdefault(noise_expert, []).append((_pick(files, path, noise_expert, both=role == "both"), strength))
    return found


def assign_one(
    requests: Sequence[Request], named: NoiseExpert | None
) -> tuple[NoiseExpert | None, list[tuple[LoraFile, float]]]:
    """LoRAs for one transformer, and which noise expert that is: what the roles say, else `named`, else the files.

    Raises:
        UserError: LoRAs for both noise experts, or for the other one.
    """
    roles = {NoiseExpert(role) for role, _, _ in requests if role in tuple(NoiseExpert)}
    if len(roles) > 1:
        raise UserError("LoRAs are given for high and low, but there is one transformer; merge one at a time, or a "
                        "whole model with --model")
    noise_expert = roles.pop() if roles else named
    if noise_expert is None:
        said = {e for _, path, _ in requests for e in open_lora(path)} - {None}
        if len(said) > 1:
            raise UserError("the LoRAs are for both noise experts, and which one the transformer is, is not known; "
                            "give the right one as high=FILE or low=FILE")
        noise_expert = said.pop() if said else None
    stand_in = noise_expert or NoiseExpert.HIGH  # nothing says which: any serves, since there is one transformer
    return noise_expert, assign(requests, [stand_in])[stand_in]


def group(requests: Sequence[Request]) -> dict[NoiseExpert | None, list[tuple[LoraFile, float]]]:
    """LoRAs to be summed, by noise expert: a file that does not say goes to the one that the others name.

    Raises:
        UserError: files for different noise experts without high= and low= in front, or one that fits neither.
    """
    found: dict[NoiseExpert | None, list[tuple[LoraFile, float]]] = {}
    unsaid: list[tuple[LoraFile, float]] = []
    by_file: list[set[NoiseExpert]] = []
    for role, path, strength in requests:
        files = open_lora(path)
        noise_experts = [e for e in files if e is not None] if role is None else _wanted(role, path, files, [*NoiseExpert])
        for noise_expert in noise_experts:
            found.setdefault(noise_expert, []).append((_pick(files, path, noise_expert, both=role == "both"), strength))
        if role is None and None in files:
            unsaid.append((files[None], strength))
        elif role is None:
            by_file.append(set(noise_experts))
    if any(noise_experts != by_file[0] for noise_experts in by_file):
        names = ", ".join(str(path) for _, path, _ in requests)
        raise UserError(f"these LoRAs are for different noise experts: {names}; sum those of one noise expert, or "
                        "give high=FILE and low=FILE to write both")
    if unsaid and len(found) > 1:
        raise UserError(f"{unsaid[0][0].path} does not say which noise expert it is for; give it as high=FILE, "
                        "low=FILE, or both=FILE")
    if unsaid:
        found.setdefault(next(iter(found), None), []).extend(unsaid)
    return found


def _wanted(
    role: str | None, path: Path, files: dict[NoiseExpert | None, LoraFile], noise_experts: Sequence[NoiseExpert]
) -> list[NoiseExpert]:
    if role == "both":
        return list(noise_experts)
    if role is None and None in files:
        if len(noise_experts) > 1:
            raise UserError(f"{path} does not say which noise expert it is for; give it as high=FILE, low=FILE, "
                            "or both=FILE")
        return list(noise_experts)
    wanted = [NoiseExpert(role)] if role is not None else [noise_expert for noise_expert in files if noise_expert is not None]
    for noise_expert in wanted:
        if noise_expert not in noise_experts:
            raise UserError(f"{path} is for the {noise_expert} noise expert, but the model or file given here is the "
                            f"{' and '.join(noise_experts)} one alone; give a LoRA for that, or both=FILE for any")
    return wanted


def _pick(files: dict[NoiseExpert | None, LoraFile], path: Path, noise_expert: NoiseExpert, both: bool) -> LoraFile:
    own = files.get(noise_expert) or files.get(None)
    if own is not None:
        return own
    (other,) = files.values()
    check_role(other, noise_expert, only_warn=both)
    return other


def check_role(lora: LoraFile, noise_expert: NoiseExpert, only_warn: bool = False) -> None:
    """Refuse a LoRA whose metadata or keys say it is the other noise expert's; warn if only its name does.

    Args:
        only_warn: `both=FILE` says plainly that one LoRA is meant for two.

    Raises:
        UserError: the file is for the other noise expert.
    """
    if lora.noise_expert is None or lora.noise_expert is noise_expert:
        return
    if lora.said_by == "name":
        warn(f"{lora.path} is given for the {noise_expert} noise expert, but its name says {lora.noise_expert}")
        return
    said = "metadata says" if lora.said_by == "metadata" else "keys say"
    text = f"{lora.path} is for the {lora.noise_expert} noise expert (its {said} so), not for the {noise_expert} one"
    if not only_warn:
        raise UserError(f"{text}; give it as {lora.noise_expert}=FILE")
    warn(text)


def warn_mismatch(
    lora: LoraFile, task: str | None = None, boundary: float | None = None, base: str | None = None
) -> None:
    """Warn where a LoRA's own record differs from the model it is put on; it may still work, so it is not refused.

    Args:
        task: the model's; `boundary`: the sigma at which its noise experts hand over; `base`: the fingerprint of the
            noise expert's weights. None: not known, not compared.
    """
    said = lora.metadata
    if task and said.get("lapwan.task") and said["lapwan.task"] != task:
        warn(f"{lora.path} was trained for {said['lapwan.task']}; this model is {task}")
    trained = stated_boundary(said)
    if boundary is not None and trained is not None and abs(trained - boundary) > 1e-6:
        warn(f"{lora.path} was trained with boundary {trained:g}; this model's is {boundary:g}")
    print_ = said.get("lapwan.base_fingerprint")
    if base and print_ and print_ != base:
        warn(f"{lora.path} was trained on other weights (fingerprint {print_[:12]}, these have {base[:12]})")
