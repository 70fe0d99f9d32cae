"""How a command runs, apart from what it computes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """The options every command has; they are not written into the resolved settings.

    `dry_run`: check everything that can be checked without the work, print the resolved settings and the plan.
    `overwrite`: replace an existing output.
    """

    dry_run: bool = False
    overwrite: bool = False
