"""Settings of `lapwan label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from lapwan.settings.base import Flag, Settings


class LabelSettings(Settings):
    """Captions to instrument labels."""

    clips: Annotated[Path, Flag(positional=True, metavar="CLIPS")] = Field(
        description="The clips: JSONL with a 'caption' on every line."
    )
    output: Annotated[Path, Flag("-o", metavar="FILE")] = Field(description="The labelled JSONL to write.")
    taxonomy: Annotated[str, Flag(metavar="NAME|FILE.toml")] = Field(
        "surgical4", description="The instrument families: surgical4, cholec6, or a TOML file of your own."
    )
    soft_labels: Annotated[bool, Flag("--soft-labels/--hard-labels")] = Field(
        True, description="Soft labels: the weights of all families (instrument_logits) besides the main family. "
        "Hard labels: the main family only. Default: soft."
    )
    report: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        None, description="Write counts, co-occurrence and advice as JSON."
    )
    strict: Annotated[bool, Flag()] = Field(
        False, description="Fail, and write no labels, if a caption names no instrument."
    )

    @field_validator("taxonomy")
    @classmethod
    def _absolute(cls, value: str) -> str:
        # a file is kept as an absolute path, so that the written settings reproduce the run from anywhere
        return str(Path(value).absolute()) if value.endswith(".toml") else value
