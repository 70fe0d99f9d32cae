"""`[high=|low=|both=]PATH[:STRENGTH]`: a LoRA as given on the command line and in TOML."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lapwan.errors import nearest
from lapwan.settings.aliases import current_keys
from lapwan.settings.base import Settings

Role = Literal["high", "low", "both"]
ROLES: tuple[Role, ...] = ("high", "low", "both")
LORA_METAVAR = "FILE[:STRENGTH]"
_RENAMED = {"expert": "noise_expert"}


class LoraArgument(Settings):
    """A LoRA file, its noise expert (None: as the file says), and its strength.

    Parsed from a string `high=motion.safetensors:0.8` or a table
    `{noise_expert = "high", path = "...", strength = 0.8}`.
    """

    noise_expert: Role | None = None
    path: Path
    strength: float = Field(default=1.0, description="Multiplies the LoRA's own scale.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return split_lora(value)
        return current_keys(value, _RENAMED, ()) if isinstance(value, dict) else value

    def __str__(self) -> str:
        role = f"{self.noise_expert}=" if self.noise_expert else ""
        strength = "" if self.strength == 1.0 else f":{self.strength!r}"
        return f"{role}{self.path}{strength}"


def split_lora(text: str) -> dict[str, Any]:
    """`high=a.safetensors:0.8` -> {"noise_expert": "high", "path": "a.safetensors", "strength": 0.8}.

    A path may hold `=` and `:`; only a leading role and a number after the last colon are split off.

    Raises:
        ValueError: a misspelt role or strength, or no path.
    """
    parts: dict[str, Any] = {}
    word, equals, rest = text.partition("=")
    if equals and word in ROLES:
        parts["noise_expert"], text = word, rest
    elif equals and re.fullmatch(r"\w+", word) and (guess := nearest(word.lower(), ROLES)):
        raise ValueError(f"unknown noise expert '{word}'{guess}; write high=FILE, low=FILE or both=FILE")
    path, colon, last = text.rpartition(":")
    if colon and (strength := _number(last)) is not None:
        if not math.isfinite(strength):
            raise ValueError(f"strength {last} is not a finite number")
        parts["strength"], text = strength, path
    elif colon and path.endswith(".safetensors"):
        raise ValueError(f"strength '{last}' is not a number; write FILE.safetensors:0.8")
    if not text.strip():
        raise ValueError("no file named; write [high=|low=|both=]FILE[:STRENGTH]")
    return {**parts, "path": text}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
