"""`[high=|low=|both=]PATH[:STRENGTH][@PART]`: a LoRA as given on the command line and in TOML."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lapwan.checkpoints.wan_keys import check_part
from lapwan.errors import nearest
from lapwan.settings.aliases import current_keys
from lapwan.settings.base import Flag, Settings

KeyRule = Literal["strict", "default", "common"]
Role = Literal["high", "low", "both"]
ROLES: tuple[Role, ...] = ("high", "low", "both")
LORA_METAVAR = "FILE[:STRENGTH][@PART]"
_SUFFIXES = r"\.(?:safetensors|sft|bin|pt|pth|ckpt)"
_RENAMED = {"expert": "noise_expert"}


# What of an adapter's file may be left out: fields of the settings that name adapters, and what they mean together.
Strict = Annotated[bool, Flag(), Field(
    description="Refuse a LoRA file of which something would be dropped, such as Wan2.1's image branch.")]
CommonModules = Annotated[bool, Flag(), Field(
    description="Apply a LoRA for another model (VACE, Fun, camera control): of its modules, those that Wan2.2 has.")]


class AdapterRule(Settings):
    """Settings that name adapters: the fields of each subclass, at its own place among the others."""

    if TYPE_CHECKING:
        strict: bool
        common_modules: bool

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.strict and self.common_modules:
            raise ValueError("strict refuses what common_modules drops; give one of them")
        return self

    @property
    def key_rule(self) -> KeyRule:
        """What of a LoRA's file may be dropped: see `lapwan.lora.formats`."""
        return "strict" if self.strict else "common" if self.common_modules else "default"


class LoraArgument(Settings):
    """A LoRA file, its noise expert (None: as the file says), its strength, and the parts of the model it acts on.

    Parsed from a string `high=motion.safetensors:0.8@blocks.20-39@ffn` or a table
    `{noise_expert = "high", path = "...", strength = 0.8, only = ["blocks.20-39", "ffn"]}`.
    """

    noise_expert: Role | None = None
    path: Path
    strength: float = Field(default=1.0, description="Multiplies the LoRA's own scale.")
    only: tuple[str, ...] | None = Field(
        default=None, description="Apply only the modules that lie in all of these parts: blocks (blocks.7, "
                                  "blocks.20-39) or names (attn1, ffn, self_attn.q).")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return split_lora(value)
        return current_keys(value, _RENAMED, ()) if isinstance(value, dict) else value

    @field_validator("only")
    @classmethod
    def _known_parts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for part in value or ():
            check_part(part)
        return value or None

    def __str__(self) -> str:
        role = f"{self.noise_expert}=" if self.noise_expert else ""
        strength = "" if self.strength == 1.0 and not self.only else f":{self.strength!r}"
        return f"{role}{self.path}{strength}" + "".join(f"@{part}" for part in self.only or ())


def split_lora(text: str) -> dict[str, Any]:
    """`high=a.safetensors:0.8@ffn` -> {"noise_expert": "high", "path": "a.safetensors", "strength": 0.8, "only":
    ["ffn"]}.

    A path may hold `=`, `:` and `@`; only a leading role, a number after the last colon with the parts behind it, and
    parts behind the file's suffix are split off.

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
    number, *only = last.split("@")
    if colon and (strength := _number(number)) is not None:
        if not math.isfinite(strength):
            raise ValueError(f"strength {number} is not a finite number")
        parts["strength"], text = strength, path
    elif colon and (match := re.search(rf"{_SUFFIXES}$", path)):
        raise ValueError(f"strength '{number}' is not a number; write FILE{match[0]}:0.8")
    else:
        match = re.match(rf"(.*{_SUFFIXES})@(.*)$", text)
        text, only = (match[1], match[2].split("@")) if match else (text, [])
    if not text.strip():
        raise ValueError("no file named; write [high=|low=|both=]FILE[:STRENGTH][@PART]")
    return {**parts, **({"only": only} if only else {}), "path": text}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
