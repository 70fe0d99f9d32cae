"""Seconds and peak memory of `lapwan merge --extract` on the two files of a 14B noise expert.

    python tests/bench/bench_extract.py --folder DIR [--rank 32 | --energy 0.95] [--device auto] [--blocks 40]

Makes both files from a seed, tensor by tensor straight to disk (2 x 28.6 GB in DIR, removed at the end), runs the
command as a process of its own, and samples that process. The files are in bf16 in the original layout; the tuned one
is the base plus an update of rank 16 with a decaying spectrum on every Linear.

Host memory is anonymous memory (RssAnon): pages of files that the kernel caches are not the process's. Torch and the
GPU's context are in it; the same command on a model of one small block gives their share. The page cache is dropped
before the command unless --cached is given. GPU memory is what the device reports in use, contexts included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

WIDTH, BLOCKS, TEXT, FREQ = 5120, 40, 4096, 256
RANK, STRENGTH, SMALL = 16, 1e-4, 128  # of the update; width of the small model
WRITERS, WAITING = 8, 16  # threads, and tensors in memory at a time
LORA_MARGIN = 1 << 30  # bytes of disk beside the two files

Shapes = dict[str, tuple[int, ...]]


def shapes(blocks: int, width: int) -> Shapes:
    """Every tensor of a T2V noise expert, in the original layout."""
    ffn = width * 27 // 10  # 13824 of 5120
    linears = {f"{kind}.{part}": (width, width) for kind in ("self_attn", "cross_attn") for part in "qkvo"}
    linears |= {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}
    outer = {"text_embedding.0": (width, TEXT), "text_embedding.2": (width, width), "time_embedding.0": (width, FREQ),
             "time_embedding.2": (width, width), "time_projection.1": (6 * width, width), "head.head": (64, width)}
    named = {**outer, **{f"blocks.{b}.{name}": shape for b in range(blocks) for name, shape in linears.items()}}
    tensors: Shapes = {"patch_embedding.weight": (width, 16, 1, 2, 2), "patch_embedding.bias": (width,),
                       "head.modulation": (1, 2, width)}
    for name, shape in named.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = shape, shape[:1]
    for b in range(blocks):
        norms = [f"{kind}.norm_{part}.weight" for kind in ("self_attn", "cross_attn") for part in "qk"]
        norms += ["norm3.weight", "norm3.bias"]
        tensors |= {f"blocks.{b}.{name}": (width,) for name in norms} | {f"blocks.{b}.modulation": (1, 6, width)}
    return tensors


def offsets(tensors: Shapes) -> tuple[dict[str, int], bytes, int]:
    """(each tensor's offset in a bf16 file, the file's header, its size)."""
    entries, starts, position = {}, {}, 0
    for name, shape in tensors.items():
        size = 2 * int(torch.Size(shape).numel())
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        starts[name], position = position, position + size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return {name: start + len(header) for name, start in starts.items()}, header, position + len(header)


def values(tensors: Shapes, device: torch.device) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, base, tuned) one after the other, on the device."""
    generator = torch.Generator(device).manual_seed(0)
    decay = 0.8 ** torch.arange(RANK, device=device)
    for name, shape in tensors.items():
        base = (torch.randn(shape, generator=generator, device=device) * 0.03).bfloat16()
        tuned = base
        if len(shape) == 2:
            left, right = (torch.randn(n, RANK, generator=generator, device=device) for n in shape)
            tuned = (base.float() + STRENGTH * (left * decay) @ right.T).bfloat16()
        yield name, base, tuned


def write_models(folder: Path, tensors: Shapes, device: torch.device) -> tuple[Path, Path]:
    """The tuned and the base file; no more than a few tensors are in memory."""
    paths = folder / "tuned_high_noise.safetensors", folder / "base_high_noise.safetensors"
    starts, header, _ = offsets(tensors)
    files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    try:
        for file in files:
            os.pwrite(file, header, 0)
        waiting: list[Future[None]] = []
        with ThreadPoolExecutor(WRITERS) as pool:
            for name, base, tuned in values(tensors, device):
                for file, value in zip(files, (tuned, base), strict=True):
                    data = value.cpu().contiguous().view(-1).view(torch.uint8).numpy()
                    waiting.append(pool.submit(_write, file, memoryview(data), starts[name]))
                while len(waiting) > WAITING:
                    waiting.pop(0).result()
            for future in waiting:
                future.result()
    finally:
        for file in files:
            os.close(file)
    return paths


def _write(file: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Write the files out and forget their pages, so that the next read is from disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


@dataclass
class Measured:
    """A run of the command: seconds, GiB of anonymous host memory and of GPU memory at their peak, and its output."""

    seconds: float
    host: float
    gpu: float
    output: str


def run(paths: tuple[Path, Path], output: Path, options: argparse.Namespace, limit: float) -> Measured:
    """`lapwan merge --extract` as a process; ends the program if it fails or takes longer than `limit` seconds."""
    line = [sys.executable, "-m", "lapwan", "merge", "--extract", "--model", str(paths[0]), "--base", str(paths[1]),
            "-o", str(output), "--device", options.device, "--overwrite"]
    line += ["--energy", str(options.energy)] if options.energy else ["--rank", str(options.rank)]
    print(" ".join(line[1:]), flush=True)
    used, host, gpu, start = _gpu_used(), 0.0, 0.0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as text:
        child = subprocess.Popen(line, stdout=text, stderr=subprocess.STDOUT)
        while child.poll() is None:
            host, gpu = max(host, _anonymous(child.pid)), max(gpu, _gpu_used() - used)
            if time.perf_counter() - start > limit:
                child.kill()
                child.wait()
                text.seek(0)
                sys.exit(f"{text.read()[-2000:]}\nstopped after {limit:.0f} s (host {host:.2f} GiB, GPU {gpu:.2f} GiB)")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        text.seek(0)
        printed = text.read()
    if child.returncode:
        sys.exit(printed)
    return Measured(seconds, host, gpu, printed)


def _anonymous(pid: int) -> float:
    """RssAnon of a process in GiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("RssAnon")), 0.0)


def _gpu_used() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Make, run and print."""
    begin = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = shapes(options.blocks, options.width)
    size = offsets(tensors)[2]
    if (free := shutil.disk_usage(folder).free) < 2 * size + LORA_MARGIN:
        sys.exit(f"{folder}: {free / 1e9:.1f} GB free, {(2 * size + LORA_MARGIN) / 1e9:.1f} GB needed; give --folder, "
                 f"or --blocks {max(1, int(options.blocks * (free - LORA_MARGIN) / (2 * size)))}")
    (folder / "small").mkdir()
    small = run(write_models(folder / "small", shapes(1, SMALL), device), folder / "small.safetensors", options, 120)
    print(f"small model, torch and the GPU's context: {small.seconds:.1f} s, host memory {small.host:.2f} GiB, GPU "
          f"memory {small.gpu:.2f} GiB", flush=True)
    start = time.perf_counter()
    paths = write_models(folder, tensors, device)
    print(f"made 2 x {size / 1e9:.2f} GB ({len(tensors)} tensors) in {time.perf_counter() - start:.1f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not options.cached:
        start = time.perf_counter()
        drop_from_cache(paths)
        print(f"written out and dropped from the page cache in {time.perf_counter() - start:.1f} s", flush=True)
    output = folder / "lora.safetensors"
    result = run(paths, output, options, options.limit - (time.perf_counter() - begin))
    print(result.output)
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{where}, torch {torch.__version__}, {options.blocks} blocks, {2 * size / 1e9:.1f} GB read"
          f"{' from the page cache' if options.cached else ''}, LoRA of {output.stat().st_size / 2**20:.0f} MiB: "
          f"{result.seconds:.1f} s with imports; host memory {result.host:.2f} GiB, {result.host - small.host:.2f} GiB "
          f"beyond the small model's; GPU memory {result.gpu:.2f} GiB; {time.perf_counter() - begin:.0f} s in all")
    if options.blocks < BLOCKS:
        seconds = small.seconds + BLOCKS / options.blocks * (result.seconds - small.seconds)
        print(f"multiplied to {BLOCKS} blocks, which counts the modules outside them too often: at most "
              f"{seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where the files are written; default: the temporary folder")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--energy", type=float)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--width", type=int, default=WIDTH, help="a multiple of 10, for trying this program")
    parser.add_argument("--cached", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--limit", type=float, default=530, help="seconds in all, after which the command is stopped")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options)


if __name__ == "__main__":
    main()
