"""A 400-module rank-32 pair, as Wan-14B's LoRAs are, in little memory. Run with -m slow; for the time there is
`tests/bench/bench_inspect.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from large_pair import write_pair

_CHILD = """
import re, sys
from pathlib import Path
import torch
from lapwan.diagnostics.lora_figures import measure, summarise
from lapwan.lora.formats import open_lora
def peak():
    return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.linalg.eigh(torch.eye(4, dtype=torch.float64))
before = peak()
for path in sys.argv[1:]:
    (lora,) = open_lora(Path(path)).values()
    assert summarise(measure(lora.modules)).modules == 400
print("mebibytes", (peak() - before) / 1024)
"""


@pytest.mark.slow
def test_a_pair_takes_little_memory(tmp_path: Path) -> None:
    paths = write_pair(tmp_path)
    child = subprocess.run([sys.executable, "-c", _CHILD, *map(str, paths)], capture_output=True, text=True, check=True)
    found = re.search(r"mebibytes ([0-9.]+)", child.stdout)
    assert found is not None and float(found[1]) <= 200, child.stdout
