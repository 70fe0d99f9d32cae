"""Where the scale alpha / r of a LoRA module stands when its file has no `.alpha` tensor.

Three places, in this order: diffusers' `lora_adapter_metadata` (a JSON text in the safetensors metadata), PEFT's
`adapter_config.json` beside the file, and nowhere, which means scale 1 (alpha = r).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapwan.errors import UserError

ADAPTER_METADATA = "lora_adapter_metadata"
_PREFIXES = ("transformer.", "transformer_2.", "transformer_1.")


class AdapterConfig:
    """PEFT's LoraConfig as far as it says alpha: `lora_alpha`, `alpha_pattern`, `use_rslora`."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        for key in ("use_dora", "lora_bias"):
            if values.get(key):
                raise UserError(f"{source}: {key} = true; lapwan reads plain LoRA (A, B and alpha) only")
        self._alpha = values.get("lora_alpha")
        self._pattern = dict(values.get("alpha_pattern") or {})
        self._rslora = bool(values.get("use_rslora"))
        numbers = [self._alpha, *self._pattern.values()]
        if not all(n is None or isinstance(n, int | float) for n in numbers):
            raise UserError(f"{source}: lora_alpha or alpha_pattern is not a number")

    def alpha(self, path: str, rank: int) -> float:
        """alpha such that scale = alpha / r; rsLoRA's scale is lora_alpha / sqrt(r) (arXiv 2312.03732)."""
        alpha = self._alpha
        for name, value in self._pattern.items():
            # PEFT matches a pattern's key against the end of the module path.
            if re.match(rf"(?:.*\.)?(?:{re.escape(name)})$", path):
                alpha = value
                break
        if alpha is None:
            return float(rank)
        return float(alpha) * math.sqrt(rank) if self._rslora else float(alpha)


def adapter_config(path: Path, metadata: Mapping[str, str], peft_file: bool) -> AdapterConfig | None:
    """The adapter configuration that goes with a file: inside its metadata, or beside it for a PEFT folder."""
    if ADAPTER_METADATA in metadata:
        try:
            values = json.loads(metadata[ADAPTER_METADATA])
            bare = {_strip(key): value for key, value in values.items()}
        except (ValueError, AttributeError):
            raise UserError(f"{path}: metadata '{ADAPTER_METADATA}' is not a JSON object") from None
        return AdapterConfig(bare, f"{path}, {ADAPTER_METADATA}")
    beside = path.with_name("adapter_config.json")
    if peft_file and beside.is_file():
        try:
            values = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {beside}: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{beside} is not a JSON object")
        return AdapterConfig(values, str(beside))
    return None


def _strip(key: str) -> str:
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def adapter_metadata(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> str:
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
