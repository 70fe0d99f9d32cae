"""A cache that musubi-tuner could have made trains stage 2 once labels are given for it."""

from __future__ import annotations

from cache_clips import cache_tiny, make_video, strip_recipes, write_jsonl


def test_a_foreign_cache_with_labels_trains_the_mixture(lapwan, tmp_path):
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
    command = ["train-moe", "--cache", folder, "--model", "tiny-i2v", "--steps", "1"]
    result = lapwan(*command, "--labels", labels, "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert list((tmp_path / "run").glob("*.safetensors"))
    unlabelled = lapwan(*command, "-o", tmp_path / "run2")
    assert unlabelled.code == 2 and "Traceback" not in unlabelled.err
