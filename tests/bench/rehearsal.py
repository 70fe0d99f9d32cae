"""A dress rehearsal: every command at A14B's size, as a user types it, on the device it takes by itself.

    python tests/bench/rehearsal.py make FOLDER              models of random weights (70 GB), clips and prompts
    python tests/bench/rehearsal.py run FOLDER -o rows.jsonl [--rows NAME ...] [--seconds 540]
    python tests/bench/rehearsal.py table rows.jsonl         a Markdown table of the rows

Each row is a process of its own; what it wrote is removed when no later row needs it. `run` appends to `rows.jsonl`, so
rows of several runs and machines stand in one file and the last run of a row counts. The weights are random: the
figures are of time and memory, not of quality. The folder needs 70 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

T2V, I2V = "Wan2.2-T2V-A14B-Diffusers", "Wan2.2-I2V-A14B-Diffusers"
PROMPT = "--prompt 剪刀剪断组织 --num-frames 81"
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A command line below the folder; `kill_at` is the step at which the process gets SIGKILL and is resumed."""

    name: str
    command: str
    gpus: int = 1
    kill_at: int = 0
    keeps: bool = False

    @property
    def output(self) -> str | None:
        """What the command writes."""
        match = re.search(r"(?:-o|--output) (\S+)", self.command)
        return match and match[1]


ROWS = (
    Row("label", "label clips/clips.jsonl -o labels.jsonl", keeps=True),
    Row("cache", f"cache --dataset labels.jsonl --model {T2V} --size 256x256 --num-frames 81 -o cache", keeps=True),
    Row("cache-i2v", f"cache --dataset labels.jsonl --model {I2V} --size 256x256 --num-frames 81 -o cache_i2v",
        keeps=True),
    Row("cache-480p", f"cache --dataset labels.jsonl --model {T2V} --size 480x832 --num-frames 81 -o cache_480p",
        keeps=True),
    Row("lora", f"train-lora --model {T2V} --cache cache --steps 24 --set save_every=8 -o run", kill_at=12,
        keeps=True),
    Row("lora-fp8-24", f"train-lora --model {T2V} --cache cache --steps 8 --dtype fp8 --memory 24 -o r"),
    Row("lora-fp8-16", f"train-lora --model {T2V} --cache cache --steps 8 --dtype fp8 --memory 16 -o r"),
    Row("lora-nf4-12", f"train-lora --model {T2V} --cache cache --steps 8 --dtype nf4 --memory 12 -o r"),
    Row("lora-int8-48-i2v", f"train-lora --model {I2V} --cache cache_i2v --steps 8 --dtype int8 --memory 48 -o r"),
    Row("lora-all-480p", f"train-lora --model {T2V} --cache cache_480p --steps 6 --set targets=all -o r"),
    Row("moe", f"train-moe --model {T2V} --cache cache --steps 24 --set save_every=8 -o moe", kill_at=12, keeps=True),
    Row("moe-fp8-16", f"train-moe --model {T2V} --cache cache --steps 8 --dtype fp8 --memory 16 -o r"),
    Row("moe-nf4-12", f"train-moe --model {T2V} --cache cache --steps 8 --dtype nf4 --memory 12 -o r"),
    Row("generate", f"generate --model {T2V} --moe moe/lapwan.safetensors {PROMPT} --size 256x256 --steps 40 "
        "-o out.mp4"),
    Row("generate-bf16-24", f"generate --model {T2V} {PROMPT} --size 256x256 --steps 8 --memory 24 -o out.mp4"),
    Row("generate-fp8-16", f"generate --model {T2V} {PROMPT} --size 256x256 --steps 10 --dtype fp8 --memory 16 "
        "-o out.mp4"),
    Row("generate-nf4-12", f"generate --model {T2V} {PROMPT} --size 480x832 --steps 4 --dtype nf4 --memory 12 "
        "-o out.mp4"),
    Row("generate-int8-8", f"generate --model {T2V} {PROMPT} --size 256x256 --steps 10 --dtype int8 --text-dtype int8 "
        "--memory 8 -o out.mp4"),
    Row("generate-i2v-480p", f"generate --model {I2V} --image clips/first.png {PROMPT} --size 480x832 --steps 4 "
        "-o out.mp4"),
    Row("srpo", f"srpo --model {T2V} --prompts prompts.txt --reward clip=clip --size 512x512 --num-frames 1 --steps 6 "
        "--set accumulate=4 --set save_every=2 --set held_out.count=1 -o r", kill_at=3),
    Row("merge", f"merge --model {T2V} --lora high=run/lapwan_high_noise.safetensors "
        "--lora low=run/lapwan_low_noise.safetensors -o merged"),
    Row("extract", f"merge --extract --model tuned/transformer --base {T2V}/transformer --rank 32 "
        "-o extracted.safetensors"),
    Row("lora-two-gpus", f"train-lora --model {T2V} --cache cache --steps 24 --set accumulate=2 -o r", gpus=2),
    Row("generate-two-gpus", f"generate --model {T2V} {PROMPT} --size 480x832 --steps 8 -o out.mp4", gpus=2),
)


class Watch:
    """Peaks of a process and its children, sampled: anonymous, shared (pinned by the GPU's driver) and mapped host
    memory, and what `nvidia-smi` says of the GPU; the time of each line on stderr."""

    def __init__(self, process: subprocess.Popen[str], gpu: str) -> None:
        self.peaks = dict.fromkeys(("RssAnon", "RssShmem", "RssFile", "gpu"), 0.0)
        self.lines: list[tuple[float, str]] = []
        self._process, self._gpu, self._started = process, gpu, time.monotonic()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._read, self._sample, self._sample_gpu)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until stderr is closed."""
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append((round(time.monotonic() - self._started, 1), line.rstrip()))

    def _sample(self) -> None:
        while self._process.poll() is None:
            total = dict.fromkeys(("RssAnon", "RssShmem", "RssFile"), 0.0)
            for pid in _with_children(self._process.pid):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                for key in total:
                    match = re.search(rf"{key}:\s+(\d+)", status)
                    total[key] += int(match[1]) / 2**20 if match else 0.0
            for key, value in total.items():
                self.peaks[key] = max(self.peaks[key], value)
            time.sleep(0.2)

    def _sample_gpu(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", self._gpu]
        while self._process.poll() is None:
            try:
                used = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
            except (OSError, subprocess.CalledProcessError):
                return
            self.peaks["gpu"] = max([self.peaks["gpu"], *(int(u) / 1024 for u in used)])
            time.sleep(0.3)


def _with_children(pid: int) -> list[int]:
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                pids += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return pids


def run_row(row: Row, folder: Path, gpu: str) -> dict[str, Any]:
    """The row's figures: exit code, seconds by phase, peaks, and what it printed."""
    start = f"torchrun --nproc-per-node {row.gpus} -m lapwan" if row.gpus > 1 else f"{sys.executable} -m lapwan"
    command = [*shlex.split(start), *shlex.split(row.command)]
    if row.output:
        _remove(folder / row.output)
    figures: dict[str, Any] = {"row": row.name, "command": f"lapwan {row.command}", "at": time.strftime("%F %T")}
    if row.kill_at:
        first = _run(command, folder, gpu, row, row.kill_at)
        figures["killed"] = {"seconds": first["seconds"], "exit": first["exit"], "steps": first["steps"]}
        command.append("--resume")
    figures |= _run(command, folder, gpu, row)
    if row.output and not row.keeps:
        _remove(folder / row.output)
    return figures


def _run(command: list[str], folder: Path, gpu: str, row: Row, kill_at: int = 0) -> dict[str, Any]:
    environment = os.environ if row.gpus > 1 else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    began, first_step = time.monotonic(), None
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    watch = Watch(process, gpu if row.gpus == 1 else "0,1")
    metrics = folder / str(row.output) / "metrics.jsonl"
    lines_before = _steps(metrics)
    while process.poll() is None:
        if first_step is None and _steps(metrics) > lines_before:
            first_step = time.monotonic() - began
        if kill_at and _steps(metrics) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    seconds = time.monotonic() - began
    watch.join()
    assert process.stdout is not None
    peaks = {key: round(value, 2) for key, value in watch.peaks.items()}
    return {"exit": process.returncode, "seconds": round(seconds, 1), "steps": _steps(metrics),
            "first_step": first_step and round(first_step, 1), "peaks": peaks,
            "step_seconds": _step_seconds(metrics), "stderr": watch.lines[-60:],
            "stdout": process.stdout.read().splitlines()[-15:]}


def _steps(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def _step_seconds(metrics: Path) -> float | None:
    """The median of the later half of the steps."""
    if not metrics.is_file():
        return None
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
    later = sorted(seconds[len(seconds) // 2:])
    return round(later[len(later) // 2], 3)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def table(rows: Path) -> str:
    """The last run of each row, in Markdown."""
    results = {r["row"]: r for r in map(json.loads, rows.read_text(encoding="utf-8").splitlines())}
    lines = ["| row | exit | seconds | first step | a step | host anonymous, shared, mapped GiB | GPU GiB | plan |",
             "|---|---|---|---|---|---|---|---|"]
    for row in ROWS:
        if (result := results.get(row.name)) is None:
            continue
        peaks, killed = result["peaks"], result.get("killed")
        plan = next((line for _, line in reversed(result["stderr"]) if "memory: peak" in line), "")
        seconds = f"{killed['seconds']} killed, {result['seconds']}" if killed else result["seconds"]
        lines.append(
            f"| `{result['command']}` | {result['exit']} | {seconds} | {result['first_step'] or ''} | "
            f"{result['step_seconds'] or ''} | {peaks['RssAnon']}, {peaks['RssShmem']}, {peaks['RssFile']} | "
            f"{peaks['gpu']} | {plan.removeprefix('memory: ')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=40)
    making.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("-o", "--output", type=Path, required=True)
    running.add_argument("--rows", nargs="*", choices=[row.name for row in ROWS], default=None)
    running.add_argument("--gpu", default="0")
    running.add_argument("--seconds", type=float, default=float("inf"), help="no row is started after so many seconds")
    commands.add_parser("table").add_argument("rows", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    if options.what == "make":
        from rehearsal_folder import make

        for part in make(options.folder, options.device, options.layers):
            print(f"{time.monotonic() - began:6.1f} s  {part}", flush=True)
    elif options.what == "run":
        for row in ROWS:
            if options.rows is not None and row.name not in options.rows:
                continue
            if time.monotonic() - began > options.seconds:
                print(f"{row.name}: not started, {options.seconds:.0f} s are over", flush=True)
                continue
            result = run_row(row, options.folder, options.gpu)
            with options.output.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result, ensure_ascii=False) + "\n")
            last = result["stderr"][-1][1] if result["stderr"] else ""
            print(f"{row.name}: exit {result['exit']}, {result['seconds']} s, first step {result['first_step']}, "
                  f"{result['peaks']}; {last}", flush=True)
    else:
        print(table(options.rows))


if __name__ == "__main__":
    main()
