"""`lapwan cache --dry-run` and `--preview` on a folder of 1,000 clips: seconds, CPU seconds, largest memory.

    python tests/bench/bench_preview.py [--clips 1000] [--distinct 120]

Clips are 2 s of 320x240, 320x180 or 240x320 at 16, 25 or 30 fps, H.264, made with PyAV; of each distinct one there are
hard links under other names. A fifth of them has boxes. The same is measured on a fifth of the clips: memory that grows
with their number would show.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

SIZES, RATES = ((320, 240), (320, 180), (240, 320)), (25, 30, 16)


def make_video(path: Path, number: int) -> None:
    """A moving bar over noise that differs from clip to clip."""
    (width, height), rate = SIZES[number % 3], RATES[number % 3]
    noise = np.random.default_rng(number).integers(0, 200, (height // 8, width // 8, 3), np.uint8)
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    picture = np.pad(picture, ((0, height - picture.shape[0]), (0, 0), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(2 * rate):
            pixels = picture.copy()
            pixels[:, 4 * index % width] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def make_dataset(folder: Path, clips: int, distinct: int) -> Path:
    """The clips and their JSONL."""
    rows = []
    for number in range(clips):
        path = folder / f"c{number:05d}.mp4"
        if number < distinct:
            make_video(path, number)
        else:
            os.link(folder / f"c{number % distinct:05d}.mp4", path)
        row: dict[str, object] = {"video_path": path.name, "caption": f"剪刀 {number}", "instrument_label": number % 4}
        if number % 5 == 0:
            row["roi"] = [{"frame": frame, "box": [0.3, 0.2, 0.6, 0.7]} for frame in range(0, 30, 5)]
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    dataset = folder / "clips.jsonl"
    dataset.write_text("".join(rows), encoding="utf-8")
    (folder / "few.jsonl").write_text("".join(rows[: clips // 5]), encoding="utf-8")
    return dataset


_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


def measure(dataset: Path, *arguments: str) -> str:
    """A table row's figures of one command, with those of the processes it started."""
    command = [sys.executable, "-m", "lapwan", "cache", "--dataset", str(dataset), "--model", "tiny-t2v", "-o",
               str(dataset.parent / "cache"), "--size", "80x112", "--num-frames", "17", "--overwrite", *arguments]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=True)
    code, cpu, memory = json.loads(done.stdout)
    assert code == 0
    return f"{time.perf_counter() - began:.1f} | {cpu:.1f} | {memory:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dataset = make_dataset(Path(name), options.clips, options.distinct)
        load = os.getloadavg()[0]
        print(f"{os.cpu_count()} cores, load {load:.1f}\n\n| command | clips | s | CPU s | largest process, MiB |")
        print("|---|---|---|---|---|")
        for path, count in ((dataset.with_name("few.jsonl"), options.clips // 5), (dataset, options.clips)):
            print(f"| --dry-run | {count} | {measure(path, '--dry-run')} |")
            for sheet in ("sheet.html", "sheet.png"):
                print(f"| --preview {sheet} | {count} | {measure(path, '--preview', str(path.with_name(sheet)))} |")


if __name__ == "__main__":
    main()
