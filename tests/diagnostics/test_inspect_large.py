"""A 400-module rank-32 pair, as Wan-14B's LoRAs are: seconds and memory. Run with -m slow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lapwan.lora.formats import write_lora
from lapwan.lora.state import LoraEntry, LoraState
from lapwan.names import PROJECTIONS

_CHILD = """
import re, sys, time
from pathlib import Path
import torch
from lapwan.diagnostics.figures import measure, summarise
from lapwan.lora.formats import open_lora
def peak():
    return int(re.search("VmHWM:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1])
torch.linalg.eigh(torch.eye(4, dtype=torch.float64))
before, wall, cpu = peak(), 1e9, 1e9
for _ in range(3):  # the shortest of three: other work on the machine only ever adds
    start, spent = time.monotonic(), time.process_time()
    for path in sys.argv[1:]:
        (lora,) = open_lora(Path(path)).values()
        assert summarise(measure(lora.modules)).modules == 400
    wall, cpu = min(wall, time.monotonic() - start), min(cpu, time.process_time() - spent)
mebibytes = (peak() - before) / 1024
start = time.process_time()
for module in list(lora.modules.values())[:10]:  # one block by forming the products
    delta = module.entry().delta()
    torch.linalg.vector_norm(delta, dtype=torch.float64)
print("wall", wall, "cpu", cpu, "mebibytes", mebibytes, "products", (time.process_time() - start) * 80)
"""


@pytest.mark.slow
def test_a_pair_takes_a_second_and_little_memory(tmp_path, record_property):
    busy = os.getloadavg()[0]
    generator = torch.Generator().manual_seed(0)
    paths: list[Path] = []
    for label in ("high", "low"):
        entries = {}
        for block in range(40):
            for original, path in PROJECTIONS.items():
                n_out, n_in = {"ffn.0": (13824, 5120), "ffn.2": (5120, 13824)}.get(original, (5120, 5120))
                down = torch.rand(32, n_in, generator=generator).sub_(0.5).bfloat16()
                up = torch.randn(n_out, 32, generator=generator).mul_(0.002).bfloat16()
                entries[f"blocks.{block}.{path}"] = LoraEntry(down, up, 32.0)
        paths.append(tmp_path / f"{label}_noise.safetensors")
        write_lora(paths[-1], LoraState(entries))
    child = subprocess.run([sys.executable, "-c", _CHILD, *map(str, paths)], capture_output=True, text=True, check=True)
    found = {name: float(value) for name, value in re.findall(r"(\w+) ([0-9.]+)", child.stdout)}
    for name, value in found.items():
        record_property(name, value)
    assert found["mebibytes"] <= 200, child.stdout
    # Measured on two free cores: 0.71 s, 1.3 s of processor time. Where other work shares the cores a second means
    # nothing, so there it is held against forming the products, measured in the same process.
    assert found["cpu"] * 8 < found["products"], child.stdout
    if busy < 0.5:
        assert found["wall"] <= 1.0, child.stdout
