"""Settings of `lapwan label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from lapwan.settings.base import Flag, Settings, text_encoding


class LabelSettings(Settings):
    """Captions to instrument labels."""

    clips: Annotated[Path | None, Flag(positional=True, metavar="CLIPS")] = Field(
        None, description="The clips: JSONL, CSV, TSV or a JSON list with captions, a folder with a caption "
        "file beside each clip, or a musubi-tuner dataset.toml."
    )
    output: Annotated[Path | None, Flag("-o", metavar="FILE")] = Field(
        None, description="The labelled JSONL to write."
    )
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

    recursive: Annotated[bool, Flag()] = Field(False, description="Of a folder, read the sub-folders, too.")
    caption_encoding: Annotated[str, Flag(metavar="NAME")] = Field(
        "auto", description="Encoding of captions: auto (UTF-8, UTF-16 by its mark, GB18030 or Windows-1252 by what "
        "reads as text), or a name such as gb18030."
    )
    plot: Annotated[Path | None, Flag(metavar="FILE.png")] = Field(
        None, description="Draw the clips of each family, and how many to collect."
    )
    check_taxonomy: Annotated[str | None, Flag(metavar="NAME|FILE.toml")] = Field(
        None, description="Write no labels: list what is ambiguous in a taxonomy, and with CLIPS which of their "
        "captions match what."
    )
    skip_bad: Annotated[bool, Flag()] = Field(
        False, description="List lines that cannot be labelled, but do not fail."
    )

    _encoding = field_validator("caption_encoding")(text_encoding)

    @model_validator(mode="after")
    def _complete(self) -> LabelSettings:
        for name in ("clips", "output") if self.check_taxonomy is None else ():
            if getattr(self, name) is None:
                raise ValueError(f"'{name}' is required; only --check-taxonomy does without")
        for name in ("output", "plot") if self.check_taxonomy is not None else ():
            if (path := getattr(self, name)) is not None:
                raise ValueError(f"{name} = {str(path)!r}: --check-taxonomy writes no labels; leave --{name} out")
        return self

    @field_validator("taxonomy")
    @classmethod
    def _absolute(cls, value: str) -> str:
        # a file is kept as an absolute path, so that the written settings reproduce the run from anywhere
        return str(Path(value).absolute()) if value.endswith(".toml") else value
