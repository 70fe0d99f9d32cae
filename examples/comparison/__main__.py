"""`python -m examples.comparison CONFIG -o DIR`: plain LoRAs against the mixture, fairly, from scenes to tables.

Every row (a training, an arm's test videos) is kept when it is done: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from examples.comparison.report import Results, summarise
from examples.comparison.rows import all_rows
from examples.comparison.run import run_rows
from examples.comparison.settings import ComparisonSettings
from examples.comparison.table import markdown
from examples.comparison.workspace import Workspace
from lapwan import console, files
from lapwan.data.clip_file import read_clips
from lapwan.errors import UserError
from lapwan.settings.base import to_toml
from lapwan.settings.load import load

PROGRAM = "examples.comparison"


def main(arguments: list[str] | None = None) -> int:
    """Run what is left, then write `result.json` and `result.md` of what is there."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__)
    parser.add_argument("config", type=Path, help="the settings, such as examples/comparison/comparison.toml")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of rows, result.json and result.md")
    parser.add_argument("--processes", type=int, default=1, help="rows at a time, each in a process of its own")
    parser.add_argument("--minutes", type=float, help="start no row after so long; the same command goes on later")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, repeatable")
    parser.add_argument("--dry-run", action="store_true", help="list the rows")
    options = parser.parse_args(arguments)
    try:
        settings = load(ComparisonSettings, options.config, options.set)
        if options.processes < 1:
            raise UserError(f"--processes {options.processes}: must be 1 or more")
        if options.dry_run:
            for row in all_rows(settings):
                console.results.print(row.name, markup=False)
            return 0
        workspace = Workspace(options.output.absolute(), settings, options.device)
        files.write_text(workspace.root / "settings.toml", to_toml(settings))
        rows, left = run_rows(workspace, options.processes, None if options.minutes is None else 60 * options.minutes)
        command = shlex.join(["python", "-m", PROGRAM, *(sys.argv[1:] if arguments is None else arguments)])
        write_result(workspace, rows, left, command)
    except UserError as error:
        console.warn(f"error: {error}")
        return 2
    return 0


def write_result(workspace: Workspace, rows: dict[str, dict[str, object]], left: list[str], command: str) -> None:
    """Both files, of what is done so far."""
    if "scenes test" not in rows:
        console.warn("nothing to report yet: run the same command again")
        return
    named = [str(clip.data["instrument"]) for clip in read_clips(workspace.clips("test"))]
    summary = {**summarise(Results(workspace.settings, rows, named)), "command": command, "rows_left": left}
    files.write_text(workspace.root / "result.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    text = markdown(summary, command)
    if left:
        text += f"\n{len(left)} rows are left; the same command goes on.\n"
    files.write_text(workspace.root / "result.md", text)
    console.results.print(text, markup=False)


if __name__ == "__main__":
    sys.exit(main())
