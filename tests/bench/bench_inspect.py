"""Seconds for the figures of a 400-module rank-32 pair, beside forming the products.

    python tests/bench/bench_inspect.py

The shortest of five, since other work on the machine only ever adds; the products of one block, times 80.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "diagnostics"))

from large_pair import write_pair

from lapwan.diagnostics.lora_figures import measure, summarise
from lapwan.lora.formats import open_lora


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pair(Path(folder))
        times, cpu = [], []
        for _ in range(5):
            start, before = time.perf_counter(), time.process_time()
            for path in paths:
                (lora,) = open_lora(path).values()
                summarise(measure(lora.modules))
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - before)
        start = time.perf_counter()
        for module in list(lora.modules.values())[:10]:
            torch.linalg.vector_norm(module.entry().delta(), dtype=torch.float64)
        products = (time.perf_counter() - start) * 80
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    shown = ", ".join(f"{t:.2f}" for t in times)
    print(f"pair of 400 modules: {min(times):.2f} s (of {shown}), {min(cpu):.2f} s of CPU in two threads")
    print(f"by forming the products: {products:.0f} s")


if __name__ == "__main__":
    main()
