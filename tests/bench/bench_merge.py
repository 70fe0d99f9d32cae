"""A streamed merge beside `cp` and a raw write of the same bytes to the same disk, each until they lie on it.

    python tests/bench/bench_merge.py [BLOCKS [ROUNDS]]      6 blocks of Wan-14B's Linears in bf16 are 4.2 GB

Nine of ten weights of a block change (rank 32). The source is dropped from the page cache before each, so that all of
it is read. The best of three in turns, since other work on the machine only ever adds. Seconds of CPU (of the merge
without the imports) say what it would be limited by on a faster disk; memory is beyond torch's import.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lora"))

from lora_cases import random_state
from test_merge_large import CHILD, write_checkpoint

from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.lora.formats import write_lora

_PIECE = 16 << 20


def main() -> None:
    blocks, rounds = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((1, 6), (2, 3)))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        folder = Path(name)
        source, lora, target = folder / "dit.safetensors", folder / "lora.safetensors", folder / "out.safetensors"
        shapes = write_checkpoint(source, blocks)
        touched = {f"blocks.{b}.{PROJECTIONS[o]}": shapes[f"blocks.{b}.{o}.weight"]
                   for b in range(blocks) for o in PROJECTIONS if o != "ffn.0"}
        write_lora(lora, random_state(touched, rank=32, alpha=0.5, dtype=torch.bfloat16))
        size = source.stat().st_size
        memory: list[str] = []

        def merge() -> tuple[float, float]:
            child = subprocess.run([sys.executable, "-c", CHILD, str(source), str(lora), str(target)],
                                   capture_output=True, text=True, check=True)
            seconds, cpu, mebibytes = map(float, child.stdout.split()[-3:])
            memory.append(f"{mebibytes:.0f}")
            return seconds, cpu

        strategies: dict[str, Callable[[], tuple[float, float]]] = {
            "raw write": lambda: _timed(lambda: _write(target, size)),
            "cp": lambda: _timed(lambda: _cp(source, target)),
            "merge": merge,
        }
        timings: dict[str, list[tuple[float, float]]] = {strategy: [] for strategy in strategies}
        for _ in range(rounds):
            for strategy, run in strategies.items():
                _forget(source)
                timings[strategy].append(run())
                target.unlink()
                os.sync()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
          f"{size / 1e9:.2f} GB")
    for strategy, runs in timings.items():
        seconds, cpu = [wall for wall, _ in runs], min(cpu for _, cpu in runs)
        print(f"{strategy:>9}: {min(seconds):.2f} s, {size / 1e9 / min(seconds):.2f} GB/s, {cpu:.2f} s of CPU "
              f"(of {', '.join(f'{s:.2f}' for s in seconds)} s)")
    best = {strategy: min(runs)[0] for strategy, runs in timings.items()}
    print(f"merge at {best['cp'] / best['merge']:.0%} of cp's speed, {best['raw write'] / best['merge']:.0%} of the "
          f"raw write's; {', '.join(memory)} MiB beyond torch")


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds, seconds of CPU), of this process and of those it started."""
    start, before = time.monotonic(), _cpu()
    work()
    return time.monotonic() - start, _cpu() - before


def _cpu() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def _write(target: Path, size: int) -> None:
    """The bytes from memory, in large pieces."""
    piece = os.urandom(_PIECE)
    with target.open("wb", buffering=0) as stream:
        for start in range(0, size, _PIECE):
            stream.write(piece[: size - start])
        os.fsync(stream.fileno())


def _cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    with target.open("rb") as stream:
        os.fsync(stream.fileno())


def _forget(path: Path) -> None:
    """Out of the page cache; only what lies on the disk can leave it."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
