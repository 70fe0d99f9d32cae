"""`python -m examples.comparison CONFIG -o DIR`: plain LoRAs against the mixture, fairly, from scenes to tables.

Every row (a training, an arm's test videos) is kept when it is done: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from lapwan import console, files
from examples.comparison.report import Results, summarise
from examples.comparison.rows import all_rows
from examples.comparison.run import run_rows
from examples.comparison.settings import ComparisonSettings
from examples.comparison.table import markdown
from examples.comparison.work import Place
from lapwan.data.clips import read_clips
from lapwan.errors import UserError
from lapwan.settings.base import to_toml
from lapwan.settings.load import load


def main(arguments: list[str] | None = None) -> int:
    """Run what is left, then write `result.json` and `result.md` of what is there."""
    parser = argparse.ArgumentParser(prog="python -m examples.comparison", description=__doc__)
    parser.add_argument("config", type=Path, help="the settings, such as examples/comparison/comparison.toml")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of rows, result.json and result.md")
    parser.add_argument("--processes", type=int, default=1, help="rows at a time, each in a process of its own")
    parser.add_argument("--minutes", type=float, help="start no row after so long; the same command goes on later")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, repeatable")
    parser.add_argument("--dry-run", action="store_true", help="list the rows")
    said = parser.parse_args(arguments)
    try:
        settings = load(ComparisonSettings, said.config, said.set)
        if said.processes < 1:
            raise UserError(f"--processes {said.processes}: must be 1 or more")
        if said.dry_run:
            for row in all_rows(settings):
                console.results.print(row.name, markup=False)
            return 0
        place = Place(said.output.absolute(), settings, said.device)
        files.write_text(place.root / "settings.toml", to_toml(settings))
        rows, left = run_rows(place, said.processes, None if said.minutes is None else 60 * said.minutes)
        command = shlex.join(["python", "-m", "examples.comparison", *(sys.argv[1:] if arguments is None else arguments)])
        write_result(place, rows, left, command)
    except UserError as error:
        console.warn(f"error: {error}")
        return 2
    return 0


def write_result(place: Place, rows: dict[str, dict[str, object]], left: list[str], command: str) -> None:
    """Both files, of what is done so far."""
    if "scenes test" not in rows:
        console.warn("nothing to report yet: run the same command again")
        return
    named = [str(clip.data["instrument"]) for clip in read_clips(place.clips("test"))]
    found = {**summarise(Results(place.settings, rows, named)), "command": command, "rows_left": left}
    files.write_text(place.root / "result.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    text = markdown(found, command)
    if left:
        text += f"\n{len(left)} rows are left; the same command goes on.\n"
    files.write_text(place.root / "result.md", text)
    console.results.print(text, markup=False)


if __name__ == "__main__":
    sys.exit(main())
