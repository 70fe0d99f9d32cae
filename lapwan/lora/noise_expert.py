"""Which noise expert a LoRA file is for: by its metadata, or by the words of its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lapwan.errors import UserError
from lapwan.names import NoiseExpert

NOISE_EXPERT_KEY = "lapwan.noise_expert"
# Training ranges in timesteps of 1000. One that ends below _LOW_ENDS_BELOW is the low noise expert's, one that starts
# at _HIGH_STARTS_FROM or above the high one's: Wan2.2's boundaries are 875 and 900, and people train with overlap.
_LOW_ENDS_BELOW = 960.0
_HIGH_STARTS_FROM = 500.0


def noise_expert_from_metadata(metadata: Mapping[str, str], path: Path) -> NoiseExpert | None:
    """From lapwan's key, else from the training range musubi writes (`modelspec.timestep_range = "875,1000"`).

    Args:
        metadata: the file's.
        path: the file, for the message.

    Returns:
        The noise expert; None if the metadata does not say.

    Raises:
        UserError: lapwan's key has a value other than high or low; `path` is named in the message.
    """
    if NOISE_EXPERT_KEY in metadata:
        try:
            return NoiseExpert(metadata[NOISE_EXPERT_KEY])
        except ValueError:
            raise UserError(f"{path}: metadata {NOISE_EXPERT_KEY} = {metadata[NOISE_EXPERT_KEY]!r}; "
                            "allowed: high, low") from None
    text = metadata.get("modelspec.timestep_range")
    if text is None and "ss_min_timestep" in metadata and "ss_max_timestep" in metadata:
        text = f"{metadata['ss_min_timestep']},{metadata['ss_max_timestep']}"
    if text is None:
        return None
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    if len(numbers) != 2:  # musubi writes None where no bound was set
        return None
    return _noise_expert_from_range(float(numbers[0]), float(numbers[1]))


def _noise_expert_from_range(low: float, high: float) -> NoiseExpert | None:
    if low >= _HIGH_STARTS_FROM:
        return NoiseExpert.HIGH
    return NoiseExpert.LOW if high < _LOW_ENDS_BELOW else None


def of_one_transformer(metadata: Mapping[str, str]) -> bool:
    """Whether lapwan wrote the file for a model of one transformer: its boundary is recorded as empty."""
    return metadata.get("lapwan.boundary") == "" and NOISE_EXPERT_KEY not in metadata


def noise_expert_from_file_name(path: Path) -> NoiseExpert | None:
    """From the words of the file's name: `high`, `HighNoise`, `low_noise`; None if it has neither or both."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", path.stem)
    named = {e for e in NoiseExpert for w in words if w.lower() in (e.value, f"{e.value}noise")}
    return named.pop() if len(named) == 1 else None


def join_metadata(both: Mapping[NoiseExpert, Mapping[str, str]]) -> dict[str, str]:
    """One file's metadata for both noise experts: equal entries once, others as `{key}.{noise expert}`.

    `lapwan.noise_expert` is left out: the tensors' names tell the noise experts apart.
    """
    joined: dict[str, str] = {}
    for noise_expert, metadata in both.items():
        for key, value in metadata.items():
            shared = all(other.get(key) == value for other in both.values())
            if key != NOISE_EXPERT_KEY:
                joined[key if shared else f"{key}.{noise_expert.value}"] = value
    return joined


def metadata_for(metadata: Mapping[str, str], noise_expert: NoiseExpert) -> dict[str, str]:
    """The inverse of `join_metadata` for one noise expert, without `lapwan.noise_expert`.

    Args:
        metadata: as `join_metadata` returns it.
        noise_expert: whose entries are selected.
    """
    selected: dict[str, str] = {}
    for key, value in metadata.items():
        stem, _, last = key.rpartition(".")
        if last == noise_expert.value:
            selected[stem] = value
        elif last not in tuple(NoiseExpert):
            selected[key] = value
    return selected
