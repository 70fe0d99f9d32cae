"""Every command on a small TI2V-5B: one file, both modes, and messages that name no noise expert."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_clips import make_video, write_jsonl
from PIL import Image

SMALL = ("--size", "64x96", "--num-frames", "5", "--steps", "2", "--guidance", "1", "--overwrite")
TARGETS = ("--set", "targets.last_blocks=1", "--set", "targets.ffn_last_blocks=1")


@pytest.fixture
def model(ti2v) -> str:
    return str(ti2v.path)


def frames(path: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))])


def test_a_lora_from_training_to_merge(lapwan, succeed, model, ti2v_cache, tmp_path) -> None:
    Image.new("RGB", (96, 64), (200, 30, 30)).save("first.png")
    train = ("train-lora", "--model", model, "--cache", ti2v_cache, "--steps", "4", "-o", "run", *TARGETS,
             "--set", "optimizer.lr=0.05", "--save-every", "2", "--set", "preview.every=4", "--set", "preview.steps=2",
             "--set", 'preview.prompts=["a"]', "--set", 'preview.images=["first.png"]')
    planned = succeed(*train, "--dry-run")
    assert "given clean in 50 % of the draws" in planned.err and "predicted peak" in planned.err
    ran = succeed(*train)
    assert ran.out.strip() == "run/lapwan.safetensors" and Path("run/previews/step_000004_0.mp4").is_file()
    assert "noise expert" not in ran.err.replace("noise_expert", "") and "high noise" not in ran.err
    inspected = succeed("inspect-weights", "run")
    assert "one transformer for all noise: ratios of high and low" in " ".join(inspected.out.split())
    lora = ("--lora", "run/lapwan.safetensors")
    for name, extra in (("base", ()), ("text", lora), ("image", (*lora, "--image", "first.png"))):
        succeed("generate", "--model", model, "--prompt", "a", "-o", name, *SMALL, *extra)
    assert (frames(Path("base")) != frames(Path("text"))).any()
    succeed("merge", "--model", model, *lora, "-o", "merged")
    succeed("generate", "--model", "merged", "--prompt", "a", "-o", "merged_text", *SMALL)
    difference = frames(Path("merged_text")).astype(int) - frames(Path("text"))
    assert np.abs(difference).max() <= 1
    again = lapwan(*train, "--set", "low.alpha=2", "--overwrite")
    assert again.code == 2 and "[low]: only for a model of two noise experts" in again.err


def test_a_mixture_resumes_generates_and_becomes_a_lora(succeed, model, ti2v_cache) -> None:
    train = ("train-moe", "--model", model, "--cache", ti2v_cache, *TARGETS, "--set", "router.kind=linear",
             "--save-every", "1", "--set", "optimizer.lr=0.01", "--set", "first_frame=1.0")
    succeed(*train, "--steps", "2", "-o", "whole")
    succeed(*train, "--steps", "1", "-o", "parts")
    succeed(*train, "--steps", "2", "-o", "parts", "--resume", "--allow-changed")
    mixture = Path("whole/lapwan.safetensors")
    assert [path.name for path in Path("whole").glob("*.safetensors")] == ["lapwan.safetensors"]
    from safetensors.torch import load_file

    ours, resumed = load_file(mixture), load_file(Path("parts/lapwan.safetensors"))
    assert all(torch.equal(value, resumed[name]) for name, value in ours.items())
    ran = succeed("generate", "--model", model, "--prompt", "a hook", "-o", "a", *SMALL, "--moe", mixture)
    assert "gates by router" in ran.err
    merged = succeed("merge", "--moe", mixture, "--mix", "hook", "-o", "hook.safetensors")
    assert "high noise" not in merged.out and "LoRA: hook.safetensors" in merged.out
    succeed("generate", "--model", model, "--prompt", "a", "-o", "b", *SMALL, "--lora", "hook.safetensors")


def test_srpo_trains_the_transformer(succeed, model) -> None:
    Path("prompts.txt").write_text("a hook\na grasper\nscissors\n")
    for number, count in enumerate(("1", "5")):
        ran = succeed("srpo", "--model", model, "--prompts", "prompts.txt", "--reward", "tiny", "-o", f"run{number}",
                      "--size", "64x96", "--num-frames", count, "--steps", "1", "--set", "accumulate=1", *TARGETS,
                      "--set", "rollout.steps=2", "--set", "held_out.count=1")
        assert ran.out.strip() == f"run{number}/lapwan.safetensors" and "loading the transformer" in ran.err
        line = json.loads((Path(f"run{number}") / "metrics.jsonl").read_text().splitlines()[-1])
        assert line["grad_norm"] > 0


def test_evaluate_compares_with_and_without_a_first_frame(succeed, model, ti2v_cache, tmp_path) -> None:
    make_video(tmp_path / "a.mp4", frames=8, size=(96, 64), fps=24)
    clips = write_jsonl(tmp_path / "clips.jsonl", [{"video_path": "a.mp4", "caption": "a hook"}])
    losses = {}
    for task in ("t2v", "i2v"):
        ran = succeed("evaluate", "--model", model, "--task", task, "--cache", ti2v_cache, "--clips", clips, "-o", task,
                      "--steps", "2", "--set", "videos.size=64x96", "--set", "videos.num_frames=5", "--set",
                      "loss.bins=1", "--set", "interval.samples=100")
        assert ("the first frame given clean" in " ".join(ran.err.split())) == (task == "i2v")
        document = json.loads((tmp_path / task / "evaluation.json").read_text())
        losses[task] = document["loss"]["base"]["high"]["mean"]
        assert "psnr" in json.dumps(document) or task == "t2v"
    assert losses["t2v"] != losses["i2v"]
