"""A merge of a 4 GiB file: memory stays at a tile, untouched bytes stay as they are. Run with -m slow."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_cases import random_state

from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import load_tensor
from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.lora.formats import write_lora

WIDTH, FFN, BLOCKS = 5120, 13824, 6

CHILD = """
import re, sys, time
from pathlib import Path
import torch
from lapwan.commands.merge import run
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings
from lapwan.settings.base import RunOptions
def peak():  # not ru_maxrss, which a child inherits from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak()
start, cpu = time.monotonic(), time.process_time()
run(load(MergeSettings, options={"dit": sys.argv[1], "lora": [sys.argv[2]], "output": sys.argv[3]}, environment={}),
    RunOptions())
seconds = time.monotonic() - start
print(seconds, time.process_time() - cpu, (peak() - before) / 1024)
"""


def write_checkpoint(path: Path, blocks: int = BLOCKS) -> dict[str, tuple[int, int]]:
    """Blocks of Wan-14B's Linears in bf16, streamed, six are 4.2 GB; [out, in] by name."""
    shapes = {
        f"blocks.{b}.{o}.weight": {"ffn.0": (FFN, WIDTH), "ffn.2": (WIDTH, FFN)}.get(o, (WIDTH, WIDTH))
        for b in range(blocks) for o in PROJECTIONS
    }
    header, offset = {}, 0
    for name, (rows, columns) in shapes.items():
        size = rows * columns * 2
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # bf16 of magnitude about 0.02 with random mantissas and signs: bits 0x3C80..0x3CFF and their negatives.
    noise = np.random.default_rng(0).integers(0, 1 << 16, 1 << 22, dtype=np.uint16)
    values = (noise & 0x807F) | 0x3C80
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        left = offset
        while left:
            piece = values.tobytes()[: min(left, values.nbytes)]
            stream.write(piece)
            left -= len(piece)
    return shapes


@pytest.mark.slow
def test_memory_time_and_bytes_of_a_4_gib_merge(tmp_path, record_property):
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("needs 12 GiB of disk")
    source, lora, out = tmp_path / "dit.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    shapes = write_checkpoint(source)
    touched = {f"blocks.{b}.{PROJECTIONS[o]}": shapes[f"blocks.{b}.{o}.weight"]
               for b in range(BLOCKS) for o in PROJECTIONS if o != "ffn.0"}
    state = random_state(touched, rank=32, alpha=0.5, dtype=torch.bfloat16)
    write_lora(lora, state)
    child = subprocess.run([sys.executable, "-c", CHILD, str(source), str(lora), str(out)], capture_output=True,
                           text=True, check=True)
    seconds, _, megabytes = map(float, child.stdout.split()[-3:])
    record_property("seconds", seconds)
    record_property("mebibytes_beyond_imports", megabytes)
    assert 10 < megabytes < 800, f"{megabytes:.0f} MiB beyond the imports"
    before, after = read_header(source), read_header(out)
    assert list(before.tensors) == list(after.tensors)
    for block in range(BLOCKS):
        name = f"blocks.{block}.ffn.0.weight"
        assert before.read(name) == after.read(name)
    for path in ("blocks.0.attn1.to_q", "blocks.5.ffn.net.2"):
        name = f"blocks.{path.split('.')[1]}." + {"to_q": "self_attn.q", "2": "ffn.2"}[path.split(".")[-1]] + ".weight"
        want = load_tensor(before, name).double() + state.entries[path].delta(torch.float64)
        error = (load_tensor(after, name).double() - want).abs()
        assert (error <= want.abs() * 2**-8 * 1.01 + 1e-7).all()
