"""A cache, a video and an interrupted evaluation of 2026-11 are read, repeated and finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run_successfully
from net_cases import STAGE1, assert_figures, read_json, tensors, video_frames

import lapwan

CACHE = ("cache", "--dataset", "clips/labels.jsonl", "--model", "base", "--workers", "0", "--device", "cpu")


def test_the_stored_cache_needs_nothing(net: Path) -> None:
    before = {path.name: path.read_bytes() for path in (net / "cache").glob("*.safetensors")}
    outcome = run_successfully(*CACHE, "-o", "cache")
    assert "all 8 items are cached; nothing to do" in outcome.out
    assert {path.name: path.read_bytes() for path in (net / "cache").glob("*.safetensors")} == before
    assert "files are intact" in run_successfully("cache", "--verify", "-o", "cache").out


def test_caching_the_clips_again_gives_the_stored_features(net: Path) -> None:
    run_successfully(*CACHE, "-o", "now")
    names = sorted(path.name for path in (net / "cache").glob("*.safetensors"))
    # Then a video's latents were named after the source's size, now after the size they are of, as musubi-tuner does.
    now_names = {name: name.replace("_0080x0064_", "_0032x0048_") for name in names}
    assert sorted(now_names.values()) == sorted(path.name for path in (net / "now").glob("*.safetensors"))
    assert len(names) == 21
    for name in names:
        now = tensors(net / "now" / now_names[name])
        for key, value in tensors(net / "cache" / name).items():
            torch.testing.assert_close(now[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, at=name: f"{at}: {text}")


def test_labels_are_the_stored_ones(net: Path) -> None:
    run_successfully("label", "clips/clips.jsonl", "-o", "clips/now.jsonl")
    stored = (net / "clips" / "labels.jsonl").read_text(encoding="utf-8")
    assert (net / "clips" / "now.jsonl").read_text(encoding="utf-8") == stored


@pytest.mark.parametrize("folder", ["base", "elsewhere"])
def test_a_video_repeats_from_the_settings_it_carries(net: Path, folder: str) -> None:
    """The files it names are not where they were, so they are given again."""
    if folder != "base":
        shutil.copytree("base", folder)
    outcome = run_successfully("generate", "--from", "videos/hook.mp4", "--model", folder, *STAGE1, "--moe",
                      "stage2/lapwan.safetensors", "-o", "again.mp4")
    stored, now = video_frames(net / "videos" / "hook.mp4"), video_frames(net / "again.mp4")
    assert stored.shape == now.shape == (5, 48, 32, 3)
    elsewhere = [text for text in ("the machine has changed", "has changed (") if text in outcome.err]
    assert elsewhere or "the frames are identical to those of videos/hook.mp4" in outcome.err, outcome.err
    assert np.abs(stored - now).mean() < 1  # the encoder does not always give the same bytes for the same frames


def test_an_interrupted_evaluation_is_finished(net: Path) -> None:
    finished = {path: path.read_bytes() for path in (net / "evaluation" / "videos").rglob("*.json")}
    assert 0 < len(finished) < 16
    made = {path.with_suffix(".mp4"): path.with_suffix(".mp4").stat().st_mtime_ns for path in finished}
    run_successfully("evaluate", "--config", "settings/evaluate.toml", "--resume", "-o", "evaluation")
    assert len(list((net / "evaluation" / "videos").rglob("*.json"))) == 16
    if lapwan.__version__ == "0.1.0":  # of another version no video is used
        assert {path: path.read_bytes() for path in finished} == finished
        assert {path: path.stat().st_mtime_ns for path in made} == made
    assert_figures(read_json(net / "expected" / "evaluation.json"), read_json(net / "evaluation" / "evaluation.json"),
                   rtol=1e-3, atol=5e-4)  # temporal figures are of frames rounded to 8 bits
