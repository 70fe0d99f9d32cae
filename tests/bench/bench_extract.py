"""Seconds and peak memory of `lapwan merge --extract` on two single files of a 14B-shaped noise expert.

    python tests/bench/bench_extract.py [--blocks 40] [--device cuda] [--rank 64 | --energy 0.95] [--folder DIR]

Both files are bf16 in the original layout, 5120 wide; the tuned one is the base plus an update of rank 32 with a
decaying spectrum and of full rank. With fewer blocks than 40 the time of the blocks is multiplied, and said so. Each
run is a process of its own; host memory is its peak beyond torch, lapwan and the GPU's context, GPU memory is torch's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, TEXT, BLOCKS = 5120, 13824, 4096, 40

# Anonymous memory: pages of the files that the kernel caches are not the process's.
CHILD = """
import json, resource, sys, threading, time
import torch
from lapwan.models.extract import extract_models
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 2**20

options = json.loads(sys.argv[1])
settings = load(MergeSettings, options=options, environment={})
device = options["device"]
if device == "cuda":
    warm = torch.randn(512, 512, device=device)
    torch.linalg.svd(torch.linalg.qr(warm @ warm).R.double())  # loads the libraries
    torch.cuda.synchronize()
before, peak, stop = anonymous(), 0.0, threading.Event()

def watch():
    global peak
    while not stop.wait(0.01):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
lines = list(extract_models(settings, RunOptions(overwrite=True)))
seconds = time.perf_counter() - start
stop.set()
watcher.join()
gpu = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
print(json.dumps({"seconds": seconds, "host": peak - before, "gpu": gpu, "lines": lines}))
"""


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Weights and biases of a noise expert of T2V-A14B."""
    linears = {f"{kind}.{part}": (WIDTH, WIDTH) for kind in ("self_attn", "cross_attn") for part in "qkvo"}
    linears |= {"ffn.0": (FFN, WIDTH), "ffn.2": (WIDTH, FFN)}
    outer = {"text_embedding.0": (WIDTH, TEXT), "text_embedding.2": (WIDTH, WIDTH), "time_embedding.0": (WIDTH, 256),
             "time_embedding.2": (WIDTH, WIDTH), "time_projection.1": (6 * WIDTH, WIDTH), "head.head": (64, WIDTH)}
    named = {**outer, **{f"blocks.{b}.{name}": shape for b in range(blocks) for name, shape in linears.items()}}
    tensors: dict[str, tuple[int, ...]] = {}
    for name, shape in named.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = shape, shape[:1]
    return tensors | {f"blocks.{b}.modulation": (1, 6, WIDTH) for b in range(blocks)}


def write_models(folder: Path, blocks: int, device: str) -> tuple[Path, Path]:
    """Two files, made tensor by tensor on the device."""
    generator = torch.Generator(device).manual_seed(0)
    base: dict[str, torch.Tensor] = {}
    tuned: dict[str, torch.Tensor] = {}
    for name, shape in shapes(blocks).items():
        weight = (torch.randn(shape, generator=generator, device=device) * 0.03).bfloat16()
        update = torch.randn(shape, generator=generator, device=device)
        if len(shape) == 2:
            left, right = (torch.randn(n, 32, generator=generator, device=device) for n in shape)
            update = (left * 0.9 ** torch.arange(32, device=device)) @ right.T + 0.1 * update
        base[name] = weight.cpu()
        tuned[name] = (weight.float() + 1e-4 * update).bfloat16().cpu()
    paths = folder / "tuned_high_noise.safetensors", folder / "base_high_noise.safetensors"
    for path, tensors in zip(paths, (tuned, base), strict=True):
        save_file(tensors, path)
    return paths


def measure(folder: Path, blocks: int, options: argparse.Namespace) -> dict:
    """One extraction as a process."""
    tuned, base = write_models(folder, blocks, options.device)
    settings = {"extract": True, "model": str(tuned), "base": str(base), "output": str(folder / "lora.safetensors"),
                "device": options.device, "rank": options.rank, "energy": options.energy}
    start = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", CHILD, json.dumps({k: v for k, v in settings.items() if v})],
                           capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stderr)
    result = json.loads(child.stdout.splitlines()[-1])
    result |= {"process": time.perf_counter() - start, "gib": sum(f.stat().st_size for f in (tuned, base)) / 2**30,
               "lora": (folder / "lora.safetensors").stat().st_size / 2**20}
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--energy", type=float)
    parser.add_argument("--folder", help="where the two files are written: 2 x 28 GB at 40 blocks")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(Path(name), options.blocks, options)
        print("\n".join(result["lines"]))
        print(f"{where}, torch {torch.__version__}, {options.blocks} blocks, {result['gib']:.1f} GiB read: "
              f"{result['seconds']:.1f} s ({result['process']:.1f} s with imports), host memory {result['host']:.2f} "
              f"GiB, GPU memory {result['gpu']:.2f} GiB, LoRA of {result['lora']:.0f} MiB")
        if options.blocks < BLOCKS:
            factor = BLOCKS / options.blocks
            print(f"multiplied to {BLOCKS} blocks, which counts the modules outside them too often: at most "
                  f"{factor * result['seconds']:.0f} s and a LoRA of {factor * result['lora']:.0f} MiB, which is in "
                  "host memory")


if __name__ == "__main__":
    main()
