"""Memory and descriptors over many steps, and over many lines."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from trial import Server, run_program


@dataclass
class Growth:
    """A process watched while it trains.

    Args:
        mib_per_1000: slope of a line through memory over steps, after the first fifth.
        descriptors: open files, least and most after the first fifth.
    """

    steps: int
    seconds: float
    first_mib: float
    last_mib: float
    mib_per_1000: float
    descriptors: tuple[int, int]
    code: int | None


def _usage(pid: int) -> tuple[float, int] | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20, len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except (OSError, IndexError):
        return None


def watch_training(server: Server, work: Path, command: str, steps: int, seconds: float) -> Growth:
    """Train `steps` steps of the two noise experts together in `work`, measured from outside."""
    settings = {"train-lora": "settings/train_lora.toml", "train-moe": "settings/train_moe.toml"}[command]
    run = work / "flat"
    running = server.start((command, "--config", settings, "-o", run, "--set", f"steps={steps // 2}", "--set",
                            "save_every=1000", "--set", "keep_last=2", "--set", "batch_size=1", "--set",
                            "validation.every=1000"), work, timeout=seconds)
    rows: list[tuple[int, float, int]] = []
    start = time.monotonic()
    metrics = run / "metrics.jsonl"
    done = position = 0
    while not running.ended.wait(0.5):
        if metrics.is_file():
            with metrics.open("rb") as file:
                file.seek(position)
                data = file.read()
            position += len(data)
            done += data.count(b"\n")
        if 0 < done < steps and (usage := _usage(running.pid)) and usage[1]:
            rows.append((done, *usage))
    outcome = running.wait()
    done = metrics.read_bytes().count(b"\n") if metrics.is_file() else done
    kept = [row for row in rows if row[0] >= rows[-1][0] / 5] if rows else []
    if len(kept) < 3:
        return Growth(done, time.monotonic() - start, 0, 0, float("nan"), (0, 0), outcome.code)
    mean_x = sum(row[0] for row in kept) / len(kept)
    mean_y = sum(row[1] for row in kept) / len(kept)
    slope = sum((x - mean_x) * (y - mean_y) for x, y, _ in kept) / max(
        1e-9, sum((x - mean_x) ** 2 for x, _, _ in kept))
    return Growth(done, time.monotonic() - start, kept[0][1], kept[-1][1], 1000 * slope,
                  (min(row[2] for row in kept), max(row[2] for row in kept)), outcome.code)


def label_many(folder: Path, lines: int) -> tuple[int | None, float, float]:
    """(exit code, seconds, MiB) of `lapwan label` on so many lines, a program of its own."""
    source = folder / "million.jsonl"
    captions = ("剪刀剪断组织。", "电凝钩切割血管", "吸引器清理术野", "A grasper holds the gallbladder.", "缝合止血")
    with source.open("w", encoding="utf-8") as file:
        for number in range(lines):
            file.write(f'{{"video_path": "clips/{number:07d}.mp4", "caption": "{captions[number % 5]} {number}"}}\n')
    outcome = run_program(("label", source, "-o", folder / "labels.jsonl"), folder, timeout=1800)
    for path in (source, folder / "labels.jsonl"):
        path.unlink(missing_ok=True)
    return outcome.code, outcome.seconds, outcome.rss_mib
