"""The file of a mixture: experts of both noise experts, router and timestep gates; nothing of the base model.

Tensors: `{high|low}_noise.{module path}.{family}.lora_A.weight`, `.lora_B.weight`, `.alpha`;
`both_noise.{module path}…` if the noise experts share their experts; `{high|low}_noise.timestep_gate.values_K`;
`router.*`. Metadata: `lapwan.format = mixture/1`, `lapwan.mixture` (JSON).

`is_mixture` detects such a file; where the other kinds of files are detected is listed in `lapwan.lora.formats`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lapwan import files
from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import all_finite, save_tensors
from lapwan.checkpoints.wan_keys import split_block
from lapwan.documents import checked, parse_json
from lapwan.errors import UserError
from lapwan.lora.checks import RETRAIN
from lapwan.lora.metadata import FORMAT_KEY
from lapwan.lora.state import AdapterState, LowRank
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.names import Band, NoiseExpert

FORMAT = "mixture/1"
_SPEC_KEY = "lapwan.mixture"
_SHARED = "both_noise"


class MixtureBase(Protocol):
    """What a mixture must match of the base model; `lapwan.models.base.Base` has it."""

    @property
    def task(self) -> str: ...
    @property
    def bands(self) -> Mapping[NoiseExpert, Band]: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    def fingerprint(self, noise_expert: NoiseExpert) -> str: ...


def is_mixture(metadata: Mapping[str, str] | None) -> bool:
    """True if a safetensors file with this metadata is a mixture."""
    return bool(metadata) and (metadata or {}).get(FORMAT_KEY, "").startswith("mixture/")


def write_mixture(path: Path, mixture: Mixture, metadata: Mapping[str, str] | None = None) -> None:
    """Write a mixture atomically; all tensors in the dtype they are trained in.

    Args:
        path: the .safetensors file to write.
        mixture: experts, router and timestep gates.
        metadata: further entries of the file's metadata.
    """
    tensors: dict[str, Tensor] = {}
    for noise_expert, states in mixture.states.items():
        if mixture.spec.shared_experts and noise_expert is not mixture.noise_experts[0]:
            continue
        stem = _SHARED if mixture.spec.shared_experts else noise_expert.file_suffix
        for family, state in states.items():
            for module, entry in state.low_rank(f"expert {family}").items():
                prefix = f"{stem}.{module}.{family}"
                tensors[f"{prefix}.lora_A.weight"] = entry.down
                tensors[f"{prefix}.lora_B.weight"] = entry.up
                tensors[f"{prefix}.alpha"] = torch.tensor(entry.alpha, dtype=torch.float64)
    for noise_expert in mixture.noise_experts:
        tensors[f"{noise_expert.file_suffix}.timestep_gate.values_K"] = mixture.timestep_gate(noise_expert).values_K
    tensors |= {f"router.{name}": value for name, value in mixture.router.state_dict().items()}
    spec = {FORMAT_KEY: FORMAT, _SPEC_KEY: json.dumps(asdict(mixture.spec), ensure_ascii=False)}
    with files.atomic_file(path) as temporary:
        save_tensors(tensors, temporary, metadata={**(metadata or {}), **spec})


def read_mixture(path: Path, base: MixtureBase | None = None) -> Mixture:
    """Read a mixture and, with `base`, check that it was made for this base model.

    Args:
        path: a file written by `write_mixture`.
        base: the model it is to act on; None: no check.

    Raises:
        UserError: not a mixture, a damaged or incomplete one, or another base, task, boundary, block, rank or router;
            with `base`, values that are not finite.
    """
    tensors, spec = _read(path)
    if base is not None:
        _check_base(path, spec, base)
        if bad := next((name for name, tensor in tensors.items() if not all_finite(tensor)), None):
            raise UserError(f"{path}: '{bad}' holds NaN or infinity: {RETRAIN}")
    states: dict[NoiseExpert, dict[str, AdapterState]] = {}
    for noise_expert in spec.bands:
        states[noise_expert] = {family: AdapterState({}, {}) for family in spec.families}
    mixture = Mixture(spec, states)
    _load_router(path, mixture, tensors)
    for noise_expert in spec.bands:
        values_K = mixture.timestep_gate(noise_expert).values_K
        _copy(path, values_K, tensors, f"{noise_expert.file_suffix}.timestep_gate.values_K", "timestep gate")
    _load_experts(path, mixture, tensors, None if base is None else base.num_layers)
    return mixture.requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Tensor], MixtureSpec]:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the .safetensors in it that train-moe wrote")
    if not path.exists():
        raise UserError(f"no such file: {path}; a mixture is the .safetensors that train-moe wrote")
    metadata = read_header(path).metadata
    if not is_mixture(metadata):
        raise UserError(f"{path} is not a lapwan mixture; if it is a LoRA, pass it with --lora")
    if metadata[FORMAT_KEY] != FORMAT:
        raise UserError(f"{path} has format {metadata[FORMAT_KEY]}; this version reads {FORMAT}: update lapwan")
    spec = _spec(metadata, path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, spec  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from None


_Sigma = Annotated[float, Field(strict=True, ge=0, le=1)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class MixtureMetadata(BaseModel):
    """`lapwan.mixture` of a file: the values of a `MixtureSpec`, as JSON has them."""

    model_config = ConfigDict(extra="forbid")

    families: Annotated[list[Annotated[str, Field(pattern=r"^[^.\s]+$", max_length=100)]],
                        Field(min_length=1, max_length=256)]
    taxonomy: dict[str, Any]
    task: str
    bands: Annotated[dict[NoiseExpert, tuple[_Sigma, _Sigma]], Field(min_length=1)]
    text_dim: Annotated[int, Field(strict=True, ge=1, le=65536)]
    router: str = "text"
    router_temperature: _Positive = 1.0
    top_k: Annotated[int, Field(strict=True, ge=1, le=256)] = 2
    knots: Annotated[int, Field(strict=True, ge=2, le=4096)] = 8
    base: dict[NoiseExpert, str] = {}
    base_lora: dict[NoiseExpert, dict[str, str]] = {}
    flow_shift: _Positive = 5.0
    steps: Annotated[int, Field(strict=True, ge=1, le=10000)] = 40
    router_sigma: Annotated[bool, Field(strict=True)] = False
    gate_ema: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    shared_experts: Annotated[bool, Field(strict=True)] = False


def _spec(metadata: Mapping[str, str], path: Path) -> MixtureSpec:
    source = f"{path}, metadata {_SPEC_KEY}"
    if _SPEC_KEY not in metadata:
        raise UserError(f"{source}: it is missing; the file is damaged or was edited")
    values = checked(parse_json(metadata[_SPEC_KEY], source), MixtureMetadata, source)
    if len(set(values.families)) < len(values.families):
        raise UserError(f"{source}: families names one twice: {', '.join(values.families)}")
    for noise_expert, (low, high) in values.bands.items():
        if low >= high:
            raise UserError(f"{source}: bands.{noise_expert.value} = [{low:g}, {high:g}]: the first must be smaller")
    fields = {name: getattr(values, name) for name in MixtureMetadata.model_fields}
    return MixtureSpec(**{**fields, "families": tuple(values.families)})


def _check_base(path: Path, spec: MixtureSpec, base: MixtureBase) -> None:
    if spec.task != base.task:
        raise UserError(f"{path} was trained for {spec.task}, but the model is {base.task}; use one for {spec.task}")
    if spec.text_dim != base.text_dim:
        raise UserError(f"{path}: its router reads text features of width {spec.text_dim}, but the model's are "
                        f"{base.text_dim}; use the model it was trained on")
    for noise_expert, band in spec.bands.items():
        model = base.bands.get(noise_expert)
        if model is None:
            raise UserError(f"{path} has experts for the {noise_expert.value} noise expert, which the model lacks; "
                            "use the model it was trained on")
        if (model.low, model.high) != band:
            raise UserError(f"{path}: trained with sigma band {Band(*band)} for the {noise_expert.value} noise expert, "
                            f"the model's is {model}; use the model it was trained on")
        trained_on, given = spec.base.get(noise_expert), base.fingerprint(noise_expert)
        if trained_on is not None and trained_on != given:
            raise UserError(f"{path} was trained on another base: its {noise_expert.value} noise expert has "
                            f"fingerprint {trained_on[:12]}, this model's {given[:12]}; use the model it was trained "
                            "on (with the same LoRA at the same strength, if one was merged into it)")


def _copy(path: Path, target: Tensor, tensors: dict[str, Tensor], name: str, what: str) -> None:
    value = tensors.pop(name, None)
    if value is None:
        raise UserError(f"{path}: tensor '{name}' of the {what} is missing; the file is damaged or was edited")
    if value.shape != target.shape:
        raise UserError(f"{path}: tensor '{name}' of the {what} has shape {list(value.shape)}, expected "
                        f"{list(target.shape)}; the file is damaged or was edited")
    with torch.no_grad():
        target.copy_(value)


def _load_router(path: Path, mixture: Mixture, tensors: dict[str, Tensor]) -> None:
    for name, value in mixture.router.state_dict(keep_vars=True).items():
        _copy(path, value, tensors, f"router.{name}", "router")


def _load_experts(path: Path, mixture: Mixture, tensors: dict[str, Tensor], num_layers: int | None) -> None:
    """Fill the states from the remaining tensors; a tensor that does not belong to the mixture is refused by name."""
    entries: dict[tuple[NoiseExpert, str, str], dict[str, Tensor]] = {}
    for name, value in tensors.items():
        stem, _, rest = name.partition(".")
        stems = [_SHARED if mixture.spec.shared_experts else e.file_suffix for e in mixture.noise_experts]
        noise_expert = mixture.noise_experts[stems.index(stem)] if stem in stems else None
        suffix = next((s for s in (".lora_A.weight", ".lora_B.weight", ".alpha") if rest.endswith(s)), None)
        module, _, family = rest.removesuffix(suffix or "").rpartition(".")
        if noise_expert is None or suffix is None or family not in mixture.families or split_block(module) is None:
            raise UserError(f"{path}: tensor '{name}' is not part of a mixture of {', '.join(mixture.families)}; "
                            "the file is damaged or was edited")
        block = split_block(module)
        if num_layers is not None and block is not None and block[0] >= num_layers:
            raise UserError(f"{path}: tensor '{name}' is for block {block[0]}, the model has {num_layers} blocks; "
                            "use the model it was trained on")
        entries.setdefault((noise_expert, family, module), {})[suffix] = value
    for (noise_expert, family, module), parts in entries.items():
        if len(parts) != 3:
            raise UserError(f"{path}: {noise_expert.file_suffix}.{module}.{family} lacks one of lora_A, lora_B and "
                            "alpha; the file is damaged or was edited")
        for part, value in parts.items():
            if value.dim() != (0 if part == ".alpha" else 2) or not value.is_floating_point():
                raise UserError(f"{path}: tensor '{noise_expert.file_suffix}.{module}.{family}{part}' is "
                                f"{list(value.shape)} {value.dtype}; the file is damaged or was edited")
        try:
            entry = LowRank(parts[".lora_A.weight"], parts[".lora_B.weight"], float(parts[".alpha"]))
        except ValueError as error:
            raise UserError(f"{path}: {noise_expert.file_suffix}.{module}.{family}: rank mismatch: {error}") from None
        for target in mixture.noise_experts if mixture.spec.shared_experts else (noise_expert,):
            mixture.states[target][family].entries[module] = entry
    for noise_expert, states in mixture.states.items():
        for family, state in states.items():
            if not state.entries:
                raise UserError(f"{path}: expert '{family}' of the {noise_expert.value} noise expert has no tensors; "
                                "the file is damaged or was edited")
