"""Wall and CPU seconds of every --help, of an unknown command and of a completion: new processes, median of five.

    python tests/bench/bench_help.py

CPU seconds are those of user and system together, which other work on the machine changes less than the wall.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time

from lapwan.commands.table import COMMANDS

REPEATS = 5


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, **environment})
    _, _, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = 0  # waited for above
    return wall, usage.ru_utime + usage.ru_stime


def main() -> None:
    program = shutil.which("lapwan")
    if program is None:
        sys.exit("lapwan is not on PATH")
    rows: list[tuple[str, list[str], dict[str, str]]] = [
        ("--help", ["--help"], {}),
        *((f"{command.name} --help", [command.name, "--help"], {}) for command in COMMANDS),
        ("nonsense", ["nonsense"], {}),
        ("gen<TAB>", [], {"_LAPWAN_COMPLETE": "complete_bash", "COMP_WORDS": "lapwan gen", "COMP_CWORD": "1"}),
    ]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
          f"Python {platform.python_version()}")
    print(f"{'lapwan':24}  wall s  CPU s")
    for name, arguments, environment in rows:
        seconds([program, *arguments], environment)  # the first reads the files
        figures = [seconds([program, *arguments], environment) for _ in range(REPEATS)]
        wall, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:24}  {wall:6.3f}  {cpu:5.3f}", flush=True)


if __name__ == "__main__":
    main()
