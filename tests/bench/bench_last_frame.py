"""Does a LoRA trained with last frames end on a given last frame? On the embedded model, paired over held-out clips.

    python tests/bench/bench_last_frame.py --work DIR [--steps 150] [--clips 96] [--videos 24]

Two LoRAs of the same settings, seeds and clips are trained on two caches that differ in `cache --last-image` only. Both
then generate the held-out clips from their first and last frames with the same noise; the base does so, too. A row is
the PSNR of the last generated frame against the given one, in dB, and the difference of the two LoRAs clip by clip with
its bootstrap interval. What is done stays in DIR, so a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lapwan import VideoGenerator
from lapwan.data.taxonomy import load_taxonomy
from lapwan.evaluation.bootstrap import bootstrap
from lapwan.evaluation.clips import EvaluationClip, VideoShape, read_eval_clips
from lapwan.tiny.dataset import write_dataset

SHAPE = VideoShape(9, (64, 64), 16)
SIZE = ["--size", "64x64", "--num-frames", "9"]
ARMS = {"without last frames": [], "with last frames": ["--last-image"]}


def lapwan(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lapwan", *arguments, "--device", "cpu"], check=True)


def adapter(work: Path, arm: str, clips: Path, steps: int) -> list[str]:
    """The two files of an arm's LoRA, cached and trained unless they are there."""
    folder = work / arm.replace(" ", "_")
    files = [folder / "run" / f"lapwan_{name}_noise.safetensors" for name in ("high", "low")]
    if not all(file.is_file() for file in files):
        lapwan("cache", "--dataset", str(clips), "--model", "tiny-i2v", *SIZE, "-o", str(folder / "cache"), *ARMS[arm])
        lapwan("train-lora", "--model", "tiny-i2v", "--cache", str(folder / "cache"), "--steps", str(steps), "--lr",
               "1e-3", "--batch-size", "4", "--seed", "1", "--set", "rank=16", "--set", "targets=all", "-o",
               str(folder / "run"), "--overwrite")
    return [f"{name}={file}" for name, file in zip(("high", "low"), files, strict=True)]


def psnr(work: Path, arm: str, loras: list[str], clips: list[EvaluationClip]) -> np.ndarray:
    """dB of the last frame, [P]."""
    results = work / f"{arm.replace(' ', '_')}.json"
    if not results.is_file():
        values = []
        with VideoGenerator("tiny-i2v", loras=loras, device="cpu") as generator:
            for number, clip in enumerate(clips):
                last = clip.last_frame(SHAPE)
                video = generator.generate(
                    clip.prompt, seed=number, image=clip.first_frame(SHAPE), last_image=last, size=SHAPE.size,
                    num_frames=SHAPE.frames, guidance=1.0)
                error = np.square(video.frames[-1].astype(float) - np.asarray(last, float)).mean()
                values.append(10 * float(np.log10(255**2 / error)))
        results.write_text(json.dumps(values))
    return np.array(json.loads(results.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150, help="of each noise expert")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--videos", type=int, default=24, help="held-out clips")
    options = parser.parse_args()
    began, work = time.monotonic(), options.work
    work.mkdir(parents=True, exist_ok=True)
    share = options.videos / (options.clips + options.videos)
    dataset = work / "clips.jsonl"
    if not dataset.is_file():
        write_dataset(work, options.clips + options.videos, 5, SHAPE.size, SHAPE.frames, test_share=share)
    train = work / "train.jsonl"
    rows = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()]
    train.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["split"] == "train"),
                     encoding="utf-8")
    held_out = read_eval_clips(dataset, load_taxonomy("surgical4"))
    scores = {arm: psnr(work, arm, adapter(work, arm, train, options.steps), held_out) for arm in ARMS}
    scores = {"base": psnr(work, "base", [], held_out), **scores}
    print(f"PSNR of the last frame against the given one, {len(held_out)} held-out clips of {SHAPE.size[0]}x"
          f"{SHAPE.size[1]}x{SHAPE.frames}, {options.steps} steps of each noise expert")
    for arm, values in scores.items():
        print(f"{arm}: {values.mean():.2f} dB")
    for arm in ("without last frames", "base"):
        difference = bootstrap(scores["with last frames"] - scores[arm])
        print(f"with last frames - {arm}: {difference.mean:+.2f} dB [{difference.low:+.2f}, {difference.high:+.2f}] "
              f"(95 %, {difference.n} clips)")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
