"""Which noise expert a LoRA file is for, as far as the file says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lapwan.errors import UserError
from lapwan.names import NoiseExpert

KEY = "lapwan.noise_expert"
# How a file for both noise experts names their transformers in its keys.
WRITTEN_AS = {NoiseExpert.HIGH: "transformer_1", NoiseExpert.LOW: "transformer_2"}
# A training range of timesteps (of 1000) that ends below this is the low expert's; one that starts above half is the
# high expert's: Wan2.2's boundaries are 875 and 900, and people also train with overlap around them.
_LOW_ENDS_BELOW = 960.0
_HIGH_STARTS_FROM = 500.0


def from_metadata(metadata: Mapping[str, str], path: Path) -> NoiseExpert | None:
    """From our own key, else from the training range musubi writes (`modelspec.timestep_range = "875,1000"`)."""
    if KEY in metadata:
        try:
            return NoiseExpert(metadata[KEY])
        except ValueError:
            raise UserError(f"{path}: metadata {KEY} = {metadata[KEY]!r}; allowed: high, low") from None
    text = metadata.get("modelspec.timestep_range")
    if text is None and "ss_min_timestep" in metadata and "ss_max_timestep" in metadata:
        text = f"{metadata['ss_min_timestep']},{metadata['ss_max_timestep']}"
    if text is None:
        return None
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    if len(numbers) != 2:  # musubi writes None where no bound was set
        return None
    return _from_range(float(numbers[0]), float(numbers[1]))


def _from_range(low: float, high: float) -> NoiseExpert | None:
    if low >= _HIGH_STARTS_FROM:
        return NoiseExpert.HIGH
    return NoiseExpert.LOW if high < _LOW_ENDS_BELOW else None


def from_name(path: Path) -> NoiseExpert | None:
    """From the words of the file's name: `high`, `HighNoise`, `low_noise`; None if it says neither or both."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", path.stem)
    said = {e for e in NoiseExpert for w in words if w.lower() in (e.value, f"{e.value}noise")}
    return said.pop() if len(said) == 1 else None


def join_metadata(both: Mapping[NoiseExpert, Mapping[str, str]]) -> dict[str, str]:
    """One file's metadata for both noise experts: what all agree on as it is, what differs as `{key}.{noise expert}`.

    Which noise expert it is stands in the tensors' names.
    """
    found: dict[str, str] = {}
    for noise_expert, metadata in both.items():
        for key, value in metadata.items():
            shared = all(other.get(key) == value for other in both.values())
            if key != KEY:
                found[key if shared else f"{key}.{noise_expert.value}"] = value
    return found


def own_metadata(metadata: Mapping[str, str], noise_expert: NoiseExpert) -> dict[str, str]:
    """The inverse of `join_metadata` for one noise expert."""
    found: dict[str, str] = {}
    for key, value in metadata.items():
        stem, _, last = key.rpartition(".")
        if last == noise_expert.value:
            found[stem] = value
        elif last not in tuple(NoiseExpert):
            found[key] = value
    return found
