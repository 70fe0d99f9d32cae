"""The commands `merge` and `inspect-weights` as Python functions: `from lapwan import merge, inspect_weights`.

    merge("hook.safetensors", moe="mixture.safetensors", mix="hook")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lapwan import console
from lapwan.diagnostics.inspect import inspect, read_points
from lapwan.models import merge as merging
from lapwan.settings.base import RunOptions
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.load import given, load
from lapwan.settings.lora_argument import LoraArgument
from lapwan.settings.merge import MergeSettings
from lapwan.tiny.resolve import with_tiny


def merge(
    output: str | Path,
    *,
    loras: Sequence[str | Path | LoraArgument] = (),
    model: str | Path | None = None,
    dit: str | Path | None = None,
    moe: str | Path | None = None,
    mix: str | None = None,
    multiplier: float = 1.0,
    rank: int | None = None,
    format: Literal["comfy", "musubi", "diffusers"] | None = None,
    one_file: bool = False,
    overwrite: bool = False,
) -> Path:
    """Merge LoRAs into a model folder (`model`), into one transformer (`dit`), or into one LoRA (neither is given); or
    convert a mixture (`moe`) at a fixed `mix` to plain LoRAs. Prints nothing; the log goes to stderr.

    Args:
        output: the model folder or .safetensors file to write.
        loras: each as a path, `"high=FILE:0.8"` or a LoraArgument.
        mix: shares of the experts, such as "hook=0.7,suction=0.3".
        multiplier: multiplies the strength of every LoRA.
        rank: resize the resulting LoRA to at most this rank by SVD.
        format: key layout of the resulting LoRA.
        one_file: write the LoRAs of both noise experts into one file.
        overwrite: replace an existing output.

    Returns:
        The path of the output.

    Raises:
        UserError: arguments that contradict each other, or unusable files; nothing is written then.
    """
    options: dict[str, Any] = {
        "output": output, "model": None if model is None else with_tiny(str(model)), "dit": dit, "moe": moe, "mix": mix,
        "multiplier": multiplier,
        "lora": [lora if isinstance(lora, LoraArgument) else str(lora) for lora in loras], "rank": rank,
        "format": format, "one_file": one_file,
    }
    settings = load(MergeSettings, options=given(options), environment={})
    for line in merging.merge(settings, RunOptions(overwrite=overwrite)):
        console.detail(line)
    return Path(output)


def inspect_weights(
    *files: str | Path,
    preset: Literal["motion", "character"] = "motion",
    by: Literal["expert", "block", "projection"] = "expert",
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Statistics of the files HIGH and LOW, of one file, or of a run folder, as `lapwan inspect-weights --json` writes.

    Args:
        preset: purpose of the LoRA: for motion the high noise expert must lead, for character the low one.
        by: rows of the table: one for each noise expert, block, or projection.
        base: model with whose weights the updates are compared; None: no comparison.

    Raises:
        UserError: missing files, files that are not LoRAs, or two files that are not a pair.
    """
    options: dict[str, Any] = {"files": [str(file) for file in files], "preset": preset, "by": by}
    options["base"] = None if base is None else with_tiny(str(base))
    settings = load(InspectWeightsSettings, options=given(options), environment={})
    return inspect(settings, *read_points(settings)).document
