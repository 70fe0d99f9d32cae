"""LoRA and model files from Python: `from lapwan import merge, inspect_weights`, as the commands of these names.

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
    """`lapwan merge`: LoRAs into a model folder (`model`), one transformer (`dit`), or one LoRA (neither); or a mixture
    (`moe`) at one `mix` into plain LoRAs. Prints nothing; the log goes to stderr.

    Args:
        loras: paths, `"high=FILE:0.8"` or LoraArguments.
        mix: as a hint is given, such as "hook=0.7,suction=0.3".
        rank: resize the resulting LoRA by SVD; `format` its key layout; `one_file` for both noise experts' in one.

    Raises:
        UserError: what does not fit together, before anything is written.
    """
    said: dict[str, Any] = {
        "output": output, "model": None if model is None else with_tiny(str(model)), "dit": dit, "moe": moe, "mix": mix,
        "multiplier": multiplier,
        "lora": [lora if isinstance(lora, LoraArgument) else str(lora) for lora in loras], "rank": rank,
        "format": format, "one_file": one_file,
    }
    settings = load(MergeSettings, options=given(said), environment={})
    for line in merging.merge(settings, RunOptions(overwrite=overwrite)):
        console.detail(line)
    return Path(output)


def inspect_weights(
    *files: str | Path,
    preset: Literal["motion", "character"] = "motion",
    by: Literal["expert", "block", "projection"] = "expert",
    base: str | Path | None = None,
) -> dict[str, Any]:
    """`lapwan inspect-weights`: the document that `--json` writes, of HIGH and LOW files, one file, or a run folder.

    Raises:
        UserError: files that are missing, no LoRA, or not a pair.
    """
    said: dict[str, Any] = {"files": [str(file) for file in files], "preset": preset, "by": by}
    said["base"] = None if base is None else with_tiny(str(base))
    settings = load(InspectWeightsSettings, options=given(said), environment={})
    return inspect(settings, *read_points(settings)).document
