"""The stored artefacts, a copy of them to work in, and lapwan's command line in this process."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

ARTEFACTS = Path(__file__).with_name("artefacts")
ROOT_MARK = "@net@"  # in stored text files: the folder that the artefacts were made in
CLIP_TIME = 1_700_000_000  # of the clips' files, seconds: an evaluation knows a video by its size and time of change
EXAMPLES = "examples_2026-11"

_SMALL = ("--model", "base", "--device", "cpu")
# 20 steps of every training command: with its defaults, and with many keys.
RUNS: dict[str, tuple[str, ...]] = {
    "train_lora_defaults": ("train-lora", *_SMALL, "--cache", "cache", "--steps", "10"),
    "train_lora": ("train-lora", "--config", "settings/train_lora.toml"),
    "train_moe_defaults": ("train-moe", *_SMALL, "--cache", "cache", "--steps", "10"),
    "train_moe": ("train-moe", "--config", "settings/train_moe.toml"),
    "train_moe_base_lora": ("train-moe", "--config", "settings/train_moe_base_lora.toml"),
    "srpo": ("srpo", "--config", "settings/srpo.toml"),
    "srpo_full": ("srpo", "--config", "settings/srpo_full.toml"),
}
STOPPED = ("train_lora", "train_moe", "srpo")  # of these: also a run folder that was interrupted
LORAS = ("comfy", "musubi", "diffusers")
_PAIR = ("high=stage1/lapwan_high_noise.safetensors", "low=stage1/lapwan_low_noise.safetensors")
STAGE1 = ("--lora", _PAIR[0], "--lora", _PAIR[1])
MIX = "hook=0.7,suction=0.3"
_GENERATE = ("generate", *_SMALL, "--seed", "9")
# Latents of one video each, sampled in four steps.
LATENTS: dict[str, tuple[str, ...]] = {
    "base": (*_GENERATE, "--prompt", "吸引清理术野"),
    "loras": (*_GENERATE, "--prompt", "吸引清理术野", *STAGE1, "--sampler", "euler"),
    "router": (*_GENERATE, "--prompt", "电凝钩切割组织。吸引止血。", *STAGE1, "--moe", "stage2/lapwan.safetensors"),
    "hint": (*_GENERATE, "--prompt", "清理术野", *STAGE1, "--moe", "stage2/lapwan.safetensors",
             "--instrument-hint", "hook:0.7,suction:0.3", "--alpha-expert", "hook=1.5,suction=0.5"),
    "base_lora": (*_GENERATE, "--prompt", "电凝钩切割组织", *STAGE1, "--moe", "stage2_base_lora/lapwan.safetensors",
                  "--alpha-base", "0.6"),
}
# What a mixture and a pair of LoRAs say of themselves.
INSPECTED: dict[str, tuple[str, ...]] = {
    "loras": ("stage1/lapwan_high_noise.safetensors", "stage1/lapwan_low_noise.safetensors", "--base", "base"),
    "mixture": ("stage2/lapwan.safetensors",),
    "mixture_base_lora": ("stage2_base_lora/lapwan.safetensors",),
    "run": ("runs/train_moe",),
}


def text_files(folder: Path) -> Iterator[Path]:
    """Files of a folder that may name the folder the artefacts were made in."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".toml", ".json", ".jsonl") and path.is_file():
            yield path


def copy_artefacts(target: Path) -> Path:
    """A copy to work in, whose text files name the copy and whose clips have the time they had."""
    shutil.copytree(ARTEFACTS, target)
    for path in text_files(target):
        text = path.read_text(encoding="utf-8")
        if ROOT_MARK in text:
            path.write_text(text.replace(ROOT_MARK, str(target)), encoding="utf-8")
    set_clip_times(target)
    return target


def set_clip_times(folder: Path) -> None:
    """Give the clips the time of change they had when the artefacts were made."""
    for path in (folder / "clips").glob("*.mp4"):
        os.utime(path, (CLIP_TIME, CLIP_TIME))


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


def figures_of_steps(run: Path) -> dict[str, list[float]]:
    """Loss, its terms, and lr of every step of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {"step": [row["step"] for row in rows], "noise_expert": [row["noise_expert"] for row in rows]}
    for key in ("loss", "loss/diffusion", "loss/roi", "loss/teacher_kl", "kl_proxy", "reward/margin", "lr"):
        if key in rows[0]:
            found[key] = [row[key] for row in rows]
    return found


def delta_weights(path: Path) -> dict[str, Tensor]:
    """ΔW = (alpha / r)·B·A in fp64 by module, of a LoRA in ComfyUI's layout."""
    found = tensors(path)
    modules = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
    assert len(found) == 3 * len(modules) > 0, f"{path} is no LoRA in ComfyUI's layout"
    deltas = {}
    for module in modules:
        down, up = (found[f"{module}.lora_{side}.weight"].double() for side in "AB")
        deltas[module] = float(found[f"{module}.alpha"]) / down.shape[0] * (up @ down)
    return deltas


def fingerprint(delta: Tensor) -> list[float]:
    """Frobenius norm, four entries, and a weighted sum that every entry moves."""
    rows, columns = delta.shape
    entries = [float(delta[i, j]) for i, j in ((0, 0), (rows - 1, 1), (rows // 2, columns // 3), (3, columns - 1))]
    weights = torch.cos(torch.arange(delta.numel(), dtype=torch.float64)).reshape(delta.shape)
    return [float(delta.norm()), *entries, float((weights * delta).sum())]


def fingerprints(path: Path) -> dict[str, list[float]]:
    """`fingerprint` of every module of a LoRA in ComfyUI's layout."""
    return {module: fingerprint(delta) for module, delta in sorted(delta_weights(path).items())}


def assert_figures(stored: Any, now: Any, rtol: float, atol: float = 0.0, at: str = "") -> None:
    """Everything stored is there now, numbers up to a tolerance; what is new beside it is allowed."""
    if isinstance(stored, Mapping):
        for key, value in stored.items():
            assert key in now, f"{at}.{key} is gone"
            assert_figures(value, now[key], rtol, atol, f"{at}.{key}")
    elif isinstance(stored, Sequence) and not isinstance(stored, str):
        assert len(stored) == len(now), at
        for index, (before, after) in enumerate(zip(stored, now, strict=True)):
            assert_figures(before, after, rtol, atol, f"{at}[{index}]")
    elif isinstance(stored, float) and not isinstance(now, str) and now is not None:
        assert math.isclose(stored, now, rel_tol=rtol, abs_tol=atol), f"{at}: stored {stored}, now {now}"
    else:
        assert stored == now, f"{at}: stored {stored!r}, now {now!r}"


def video_frames(path: Path) -> np.ndarray:
    """The decoded frames of a video, RGB [T, H, W, 3]."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.int16)
