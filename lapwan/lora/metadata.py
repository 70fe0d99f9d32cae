"""The metadata of a LoRA file: alpha and rank of its modules, the boundary of its model.

Read: `adapter_config`, `boundary_from_metadata`. Written: `file_metadata`. The noise expert: see `noise_expert`.

A module without an `.alpha` tensor gets its alpha, in this order, from diffusers' `lora_adapter_metadata` (a JSON text
in the safetensors metadata), from PEFT's `adapter_config.json` beside the file, or it is r (scale alpha / r = 1).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from lapwan.checkpoints.fingerprints import FINGERPRINT_KEY
from lapwan.checkpoints.wan_keys import original_target
from lapwan.documents import Number, checked, parse_json, read_json
from lapwan.errors import UserError
from lapwan.lora.noise_expert import NOISE_EXPERT_KEY
from lapwan.lora.state import AdapterState, LowRank
from lapwan.names import NoiseExpert, bands

FORMAT_KEY, FORMAT = "lapwan.format", "lora/1"
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
_STEP_FOLDER = re.compile(r"^step_([0-9]{1,18})$")
# Other trainers' names: `name-step00000400.safetensors`, `name-000012.safetensors` (epochs), `name_000000600_...`.
_STEP_NAME = re.compile(r"(?:step[-_]?|[-_])0*(\d+)(?=[-_.]|$)")
_REPETITIONS = 3  # in a key of alpha_pattern
_COMPONENT_PREFIXES = ("transformer.", "transformer_2.", "transformer_1.")


def boundary_from_metadata(metadata: Mapping[str, str]) -> float | None:
    """The sigma at which the noise experts switch, `lapwan.boundary`; None if it is missing or not between 0 and 1."""
    try:
        boundary = float(metadata["lapwan.boundary"])
    except (KeyError, ValueError):
        return None
    return boundary if 0 < boundary < 1 else None


def saved_step(path: Path, metadata: Mapping[str, str]) -> int | None:
    """The step a file was saved at: by its folder `step_400`, its metadata (`lapwan.step`, `ss_steps`), or its name.

    Args:
        path: the file.
        metadata: its safetensors metadata.
    """
    if match := _STEP_FOLDER.match(path.parent.name):
        return int(match[1])
    for key in ("lapwan.step", "ss_steps"):
        if re.fullmatch(r"[0-9]{1,18}", metadata.get(key, "")):
            return int(metadata[key])
    numbers = _STEP_NAME.findall(path.stem)
    return int(numbers[-1]) if numbers else None


_Patterns = Annotated[dict[Annotated[str, Field(max_length=1000)], Number], Field(max_length=10_000)]


class LoraConfigKeys(BaseModel):
    """The keys of PEFT's LoraConfig, LoKrConfig and LoHaConfig that are read."""

    r: Number | None = None
    lora_alpha: Number | None = None
    alpha: Number | None = None
    rank_pattern: _Patterns | None = None
    alpha_pattern: _Patterns | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


class AdapterConfig:
    """The part of PEFT's LoraConfig that sets the scale: `lora_alpha`, `alpha_pattern`, `use_rslora`; of LoKr and LoHa
    `alpha`, `r` and their patterns; and `use_dora`.

    Args:
        values: the LoraConfig as read from JSON.
        source: where it was read, for messages.

    Raises:
        UserError: an alpha that is not a number.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        known = checked(values, LoraConfigKeys, source)
        self.source, self.use_dora = source, bool(known.use_dora)
        self._alpha = known.alpha if known.lora_alpha is None else known.lora_alpha  # of LoKr and LoHa; of LoRA
        self._rank, self._rslora = known.r, bool(known.use_rslora)
        self._pattern, self._rank_pattern = (
            [(_compiled(pattern, source), value) for pattern, value in (patterns or {}).items()]
            for patterns in (known.alpha_pattern, known.rank_pattern))

    def alpha(self, path: str, rank: int) -> float:
        """alpha such that scale = alpha / r; rsLoRA's scale is lora_alpha / sqrt(r) (arXiv 2312.03732).

        Args:
            path: diffusers' path of the module.
            rank: r of the module.
        """
        alpha = _matching(self._pattern, path, self._alpha)
        if alpha is None:
            return float(rank)
        return float(alpha) * math.sqrt(rank) if self._rslora else float(alpha)

    def product_scale(self, path: str) -> float:
        """alpha / r of a LoKr or LoHa, r the configuration's.

        Args:
            path: diffusers' path of the module.
        """
        alpha, rank = (_matching(self._pattern, path, self._alpha), _matching(self._rank_pattern, path, self._rank))
        return float(alpha) / float(rank) if alpha is not None and rank else 1.0


def _compiled(pattern: str, source: str) -> re.Pattern[str]:
    """A key of a pattern as PEFT uses it: a regular expression for the end of a module's name in the trained model.

    Repetitions of groups, and many of them, are refused: matching one name could take hours.
    """
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _REPETITIONS:
        raise UserError(f"{source}: alpha_pattern or rank_pattern '{pattern}' repeats a group, or has more than "
                        f"{_REPETITIONS} repetitions; write module names")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except (re.error, RecursionError, OverflowError):
        raise UserError(f"{source}: alpha_pattern or rank_pattern '{pattern}' is not a regular expression") from None


def _matching(patterns: Sequence[tuple[re.Pattern[str], float]], path: str, default: float | None) -> float | None:
    """Of the first key that fits the end of the trained module's name."""
    original = original_target(path)
    names = (path, original[0]) if original else (path,)
    return next((value for pattern, value in patterns if any(pattern.match(name) for name in names)), default)


def adapter_config(path: Path, metadata: Mapping[str, str], peft_file: bool) -> AdapterConfig | None:
    """The adapter configuration of the file `path`: in its metadata, or beside it for a PEFT folder; None without one.

    Args:
        path: the LoRA's file.
        metadata: its safetensors metadata.
        peft_file: the file's names are PEFT's.

    Raises:
        UserError: it is not a JSON object, or not of a plain LoRA.
    """
    if ADAPTER_METADATA_KEY in metadata:
        source = f"{path}, {ADAPTER_METADATA_KEY}"
        values = checked(parse_json(metadata[ADAPTER_METADATA_KEY], source), dict[str, Any], source)
        stripped = {_strip_component(key): value for key, value in values.items()}
        return AdapterConfig(stripped, source)
    config_path = path.with_name("adapter_config.json")
    if peft_file and config_path.is_file():
        return AdapterConfig(checked(read_json(config_path), dict[str, Any], config_path), str(config_path))
    return None


def _strip_component(key: str) -> str:
    for prefix in _COMPONENT_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def file_metadata(state: AdapterState, alpha_in_metadata: bool) -> dict[str, str]:
    """Metadata of a LoRA file: the state's, lapwan's format and fingerprint, and the `ss_*` and `modelspec.*` keys that
    other tools read; with `alpha_in_metadata` also what diffusers reads instead of `.alpha` tensors.

    Args:
        state: the adapter to write.
        alpha_in_metadata: the file has no `.alpha` tensors.
    """
    metadata = {key: value for key, value in state.metadata.items() if key != ADAPTER_METADATA_KEY}
    metadata[FORMAT_KEY] = FORMAT
    metadata[FINGERPRINT_KEY] = state.fingerprint()
    metadata.setdefault("format", "pt")
    metadata.setdefault("modelspec.sai_model_spec", "1.0.0")
    release = "wan2.1" if metadata.get("ss_base_model_version") == "wan2.1" else "wan2.2"
    metadata.setdefault("modelspec.architecture", f"{release}/lora")
    kinds = Counter(entry.kind for entry in state.entries.values())
    ranks = {path: entry.rank for path, entry in state.entries.items() if isinstance(entry, LowRank)}
    alphas = {path: entry.alpha for path, entry in state.entries.items() if isinstance(entry, LowRank)}
    if ranks:
        metadata["lapwan.ranks"], metadata["lapwan.alphas"] = (_value_counts(values) for values in (ranks, alphas))
        metadata["ss_network_dim"] = str(Counter(ranks.values()).most_common(1)[0][0])
        metadata["ss_network_alpha"] = str(Counter(alphas.values()).most_common(1)[0][0])
    if set(kinds) == {LowRank.KIND}:
        metadata.setdefault("ss_network_module", "networks.lora_wan")
    else:
        metadata["lapwan.kinds"] = json.dumps(dict(kinds))
    noise_expert, boundary = metadata.get(NOISE_EXPERT_KEY), boundary_from_metadata(metadata)
    if noise_expert and boundary is not None and "modelspec.timestep_range" not in metadata:
        band = bands(boundary)[NoiseExpert(noise_expert)]
        metadata["modelspec.timestep_range"] = f"{1000 * band.low:g},{1000 * band.high:g}"
    if alpha_in_metadata:
        metadata[ADAPTER_METADATA_KEY] = _diffusers_adapter_metadata(ranks, alphas)
    return metadata


def _value_counts(values: Mapping[str, float]) -> str:
    """How many modules have each value, as `{"8": 16, "4": 51}`."""
    return json.dumps({f"{value:g}": count for value, count in Counter(values.values()).most_common()})


def _diffusers_adapter_metadata(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> str:
    """The `lora_adapter_metadata` diffusers reads: rank and alpha of every module under the prefix `transformer.`."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    values: dict[str, Any] = {
        "r": rank, "lora_alpha": _number(alpha), "target_modules": sorted(ranks),
        "rank_pattern": {path: r for path, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {path: _number(a) for path, a in sorted(alphas.items()) if a != alpha},
    }
    return json.dumps({f"transformer.{key}": value for key, value in values.items()}, sort_keys=True)


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
