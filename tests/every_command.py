"""Every command on small inputs, for what must hold of all of them: signals, kills, permissions, repeated bytes."""

from __future__ import annotations

import re
from pathlib import Path

from cache_clips import make_video, write_jsonl
from command_line import run_successfully

TRAINING = ("--steps", "6", "--save-every", "2", "--set", "targets.last_blocks=1", "--set", "targets.ffn_last_blocks=1")

# What each command is given; OUT is its output, the other names are inputs.
COMMANDS = {
    "label": ("label", "CLIPS", "-o", "OUT.jsonl", "--report", "OUT.report.json"),
    "cache": ("cache", "--dataset", "CLIPS", "--model", "tiny-t2v", "-o", "OUT", "--size", "32x48", "--num-frames", "9",
              "--batch-size", "1", "--workers", "2"),
    "train-lora": ("train-lora", "--cache", "CACHE", "-o", "OUT", *TRAINING),
    "train-moe": ("train-moe", "--cache", "CACHE", "-o", "OUT", *TRAINING),
    "srpo": ("srpo", "--offline", "--cache", "CACHE", "--reward", "tiny", "-o", "OUT", "--steps", "4", "--save-every",
             "2", "--set", "held_out.count=1"),
    "merge": ("merge", "--model", "tiny-t2v", "--lora", "high=HIGH", "--lora", "low=LOW", "-o", "OUT"),
    "merge to a transformer": ("merge", "--dit", "DIT", "--lora", "HIGH", "-o", "OUT.safetensors"),
    "merge to a LoRA": ("merge", "--lora", "HIGH", "--lora", "HIGH", "-o", "OUT.safetensors"),
    "merge --extract": ("merge", "--extract", "--base", "tiny-t2v", "--model", "MERGED", "-o", "OUT.safetensors",
                        "--rank", "4"),
    "merge --average": ("merge", "--average", "RUN", "-o", "OUT.safetensors"),
    "generate": ("generate", "--model", "tiny-t2v", "--prompt", "hook", "--videos", "3", "--num-frames", "5",
                 "--steps", "4", "-o", "OUT.mp4"),
    "evaluate": ("evaluate", "--model", "tiny-t2v", "--cache", "CACHE", "--clips", "CLIPS", "--count", "2",
                 "--steps", "2", "--split", "all", "--lora", "high=HIGH", "-o", "OUT"),
    "inspect-weights": ("inspect-weights", "HIGH", "LOW", "--json", "OUT.json", "--plot", "OUT.png"),
    "merge --moe": ("merge", "--moe", "MIXTURE", "--mix", "hook=0.7,suction=0.3", "-o", "OUT.safetensors"),
    "doctor": ("doctor", "--memory", "16"),
    "demo": ("demo", "-o", "OUT", "--clips", "8", "--steps", "4"),
}



def write_inputs(folder: Path, cache: Path, mixture: Path, transformer: Path) -> dict[str, Path]:
    """The inputs of all commands: clips, a cache, a run with its LoRAs, a merged model, a mixture."""
    for index in range(6):
        make_video(folder / f"c{index}.mp4", frames=12, seed=index)
    clips = write_jsonl(folder / "clips.jsonl", [
        {"video_path": f"c{i}.mp4", "caption": f"剪刀 {i}"} for i in range(6)])
    run = folder / "run"
    run_successfully("train-lora", "--cache", cache, "-o", run, *TRAINING)
    loras = {name: run / f"lapwan_{name.lower()}_noise.safetensors" for name in ("HIGH", "LOW")}
    run_successfully("merge", "--model", "tiny-t2v", "--lora", f"high={loras['HIGH']}", "--lora", f"low={loras['LOW']}",
                     "-o", folder / "merged")
    return {"MIXTURE": mixture, "DIT": transformer, "CLIPS": clips, "CACHE": cache, "RUN": run,
            "MERGED": folder / "merged", **loras}


def words(name: str, inputs: dict[str, Path], folder: Path) -> list[str]:
    """The command with its inputs, writing to `folder`/out."""
    names = {**{name: str(path) for name, path in inputs.items()}, "OUT": str(folder / "out")}
    return [re.sub(r"\b(OUT|CLIPS|CACHE|RUN|MERGED|MIXTURE|DIT|HIGH|LOW)\b", lambda match: names[match[1]], word)
            for word in COMMANDS[name]]
