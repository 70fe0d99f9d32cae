"""Bad input: a trial copies the artefacts, damages one thing, runs the command and looks at everything it left."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from calls import Kind, make_work, took_canary
from trial import Outcome, Server, changes, refusal_faults, run_program, tree


@dataclass
class Result:
    """A trial that was made, and what was wrong."""

    kind: Kind
    outcome: Outcome
    faults: list[str]

    @property
    def line(self) -> str:
        """For a table of faults."""
        return f"{self.kind.name}: {'; '.join(self.faults)}"


def arguments_of(kind: Kind, old_output: bool) -> tuple[str, ...]:
    """The command line of a kind; `--overwrite` where an old output is there."""
    overwrite = old_output and not kind.call.folder and kind.call.command not in ("doctor",)
    return (*kind.call.arguments, *(("--overwrite",) if overwrite else ()))


def try_kind(server: Server | None, template: Path, folder: Path, kind: Kind, seed: int, keep: bool = False) -> Result:
    """Make one trial in `folder`, which is removed afterwards; without a server in a program of its own."""
    old_output = bool(kind.rng(seed + 1).getrandbits(1)) and kind.file is not None
    work = make_work(template, folder, kind.call, old_output)
    try:
        kind.apply(work, seed)
        before = tree(folder)
        arguments = arguments_of(kind, old_output)
        try:
            if server is None:
                outcome = run_program(arguments, work)
            else:
                outcome = server.run(arguments, work, limits=dict(kind.limits))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            outcome = Outcome(2, "", "error: refused by the system", 0, 0, 0)
        faults = refusal_faults(outcome, kind.may_pass)
        if outcome.code != 0:
            # `label` and `cache` leave out bad lines, say so, and do the others.
            partial = "all others are" in outcome.last
            faults += changes(before, tree(folder), lambda path: kind.may_write(path) or (
                partial and kind.is_output(path)))
        if took_canary(work):
            faults.append("code was executed")
        return Result(kind, outcome, faults)
    finally:
        if not keep:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder whose names may be too long or whose links may be loops."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):  # a link to itself
        with contextlib.suppress(OSError):
            folder.unlink()


def main() -> None:
    """`python inputs.py NAME...`: repeat kinds by their whole names or parts of them, and show what they print."""
    import tempfile

    from calls import kinds, make_template

    seed = int(os.environ.get("SEED", "0"))
    with tempfile.TemporaryDirectory(prefix="lapwan-faults-") as name:
        root = Path(name)
        template = make_template(root / "template")
        server = Server({"LAPWAN_CACHE_DIR": str(root / "cache")})
        for index, kind in enumerate(kind for kind in kinds() if any(word in kind.name for word in sys.argv[1:])):
            result = try_kind(server, template, root / str(index), kind, seed)
            sys.stdout.write(f"{'WRONG' if result.faults else 'right'} {result.kind.name}: code {result.outcome.code} "
                             f"{result.faults}\n{result.outcome.err[-1500:]}\n")
        server.close()


if __name__ == "__main__":
    main()
