"""A cache that musubi-tuner could have made trains stage 2 once labels are given for it."""

from __future__ import annotations

import subprocess
import sys

from cache_clips import cache_tiny, make_video, strip_recipes, write_jsonl


def test_a_foreign_cache_with_labels_trains_the_mixture(tmp_path):
    names = [f"c{i}" for i in range(4)]
    for index, name in enumerate(names):
        make_video(tmp_path / f"{name}.mp4", frames=6, seed=index)
    dataset = write_jsonl(tmp_path / "clips.jsonl", [{"video_path": f"{n}.mp4", "caption": "剪刀"} for n in names])
    folder = cache_tiny(dataset, tmp_path / "cache", model="tiny-i2v", num_frames=(5,))
    strip_recipes(folder)
    labels = write_jsonl(tmp_path / "labels.jsonl", [
        {"video_path": f"somewhere/{name}.mp4", "caption": "剪刀", "instrument_label": index,
         "instrument_name": "x", "instrument_logits": [float(i == index) for i in range(4)]}
        for index, name in enumerate(names)])
    command = [sys.executable, "-m", "lapwan", "train-moe", "--cache", str(folder), "--labels", str(labels), "--model",
               "tiny-i2v", "-o", str(tmp_path / "run"), "--steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run").glob("*.safetensors"))
    unlabelled = subprocess.run([*command[:6], *command[8:-4], "-o", str(tmp_path / "run2"), "--steps", "1"],
                                capture_output=True, text=True)
    assert unlabelled.returncode == 2 and "Traceback" not in unlabelled.stderr
