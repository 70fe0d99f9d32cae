"""Stale files are known and say why; only what changed is encoded again; nothing is deleted unless asked."""

from __future__ import annotations

import json

import pytest
import torch
from cache_clips import cache_tiny, copied, make_image, make_video, strip_recipes, write_jsonl
from safetensors.torch import save_file

from lapwan.caching.read import load_index, read_item
from lapwan.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    for index in range(3):
        make_video(tmp_path / "clips" / f"c{index}.mp4", frames=12, seed=index)
    rows = [{"video_path": f"clips/c{i}.mp4", "caption": f"剪刀 {i}"} for i in range(3)]
    return write_jsonl(tmp_path / "clips.jsonl", rows)


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


def changed(before, folder):
    after = stamps(folder)
    return sorted(name for name in after if before.get(name) != after[name])


def edit(dataset, line, **fields):
    rows = [json.loads(text) for text in dataset.read_text(encoding="utf-8").splitlines()]
    rows[line] |= fields
    write_jsonl(dataset, rows)


def test_a_changed_caption_encodes_one_text(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    before = stamps(folder)
    edit(dataset, 1, caption="电凝钩")
    cache_tiny(dataset, folder)
    assert changed(before, folder) == ["c1_wan_te.safetensors"]
    assert load_index(folder).items[1].caption == "电凝钩"


def test_a_changed_label_encodes_nothing_and_reaches_the_index(dataset, tmp_path, capsys):
    folder = cache_tiny(dataset, tmp_path / "cache")
    before = stamps(folder)
    edit(dataset, 1, instrument_label=2, instrument_logits=[0, 0, 1, 0])
    cache_tiny(dataset, folder)
    assert changed(before, folder) == []
    assert "nothing to do" in capsys.readouterr().out
    assert load_index(folder).items[1].label_weights == (0, 0, 1, 0)


def test_a_changed_size_encodes_latents_only(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    before = stamps(folder)
    cache_tiny(dataset, folder, size=(48, 48))
    assert changed(before, folder) == [f"c{i}_00000-009_0048x0048_wan.safetensors" for i in range(3)]
    assert {item.bucket for item in load_index(folder).items} == {(9, 48, 48)}
    # musubi-tuner would take the old ones for items, too.
    assert set(before) - set(stamps(folder)) == {f"c{i}_00000-009_0048x0032_wan.safetensors" for i in range(3)}


def test_a_replaced_video_is_encoded_again(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    before = stamps(folder)
    make_video(tmp_path / "clips" / "c2.mp4", frames=12, seed=50)
    cache_tiny(dataset, folder)
    assert changed(before, folder) == ["c2_00000-009_0048x0032_wan.safetensors"]


def test_a_touched_video_is_not(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    before = stamps(folder)
    (tmp_path / "clips" / "c2.mp4").touch()
    cache_tiny(dataset, folder)
    assert changed(before, folder) == []


def test_i2v_needs_a_condition_t2v_accepts_one(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    assert not load_index(folder).items[0].condition
    cache_tiny(dataset, folder, model="tiny-i2v")
    assert load_index(folder).items[0].condition
    before = stamps(folder)
    cache_tiny(dataset, folder)
    assert not [name for name in changed(before, folder) if name.endswith("_wan.safetensors")]
    assert read_item(folder, load_index(folder).items[0])["condition"] is not None


def test_last_frames_are_in_the_condition_of_clips_and_caches_without_them_stay_valid(dataset, tmp_path, capsys):
    """An image among the clips has a first frame only; the condition without last frames is what it was before."""
    make_image(tmp_path / "still.png")
    edit(dataset, 2, video_path="still.png")
    folder = cache_tiny(dataset, tmp_path / "cache", model="tiny-i2v")
    clip, still = (load_index(folder).items[i] for i in (0, 2))
    assert (still.frames, clip.last_image, still.last_image) == (1, None, None)
    first = read_item(folder, clip)["condition"]
    before = stamps(folder)
    cache_tiny(dataset, folder, model="tiny-i2v", last_image=True)
    assert len(changed(before, folder)) == 2, "the clips' latents, not the image's"
    assert "last_image changed" in capsys.readouterr().err
    clip, still = (load_index(folder).items[i] for i in (0, 2))
    assert (clip.condition, clip.last_image, still.condition, still.last_image) == (True, True, True, None)
    both = read_item(folder, clip)["condition"]
    assert both[:4, 0].min() == both[3, -1].min() == 1 and both[:3, 1:].max() == both[3, 1:-1].max() == 0
    torch.testing.assert_close(both[4:, :-1], first[4:, :-1])  # the encoder is causal
    assert float((both[4:, -1] - first[4:, -1]).abs().mean()) > 0.1
    single = read_item(folder, still)
    assert torch.equal(single["condition"], torch.cat([torch.ones_like(single["latents"][:4]), single["latents"]]))
    before = stamps(folder)
    cache_tiny(dataset, folder, model="tiny-t2v")  # a condition that is not needed does no harm
    assert not [name for name in changed(before, folder) if name.endswith("_wan.safetensors")]
    cache_tiny(dataset, folder, model="tiny-i2v")
    torch.testing.assert_close(read_item(folder, load_index(folder).items[0])["condition"], first)


def test_a_mixed_cache_with_last_frames_trains_and_other_models_refuse_them(lapwan, dataset, tmp_path):
    make_image(tmp_path / "still.png")
    edit(dataset, 2, video_path="still.png")
    small = "--size", "32x48", "--num-frames", "9", "--device", "cpu"
    made = lapwan("cache", "--dataset", str(dataset), "--model", "tiny", "--last-image", *small, "-o", "cache")
    assert made.code == 0, made.err
    assert [item.last_image for item in load_index(tmp_path / "cache").items] == [True, True, None]
    run = lapwan("train-lora", "--model", "tiny-i2v", "--cache", "cache", "--steps", "4", "--device", "cpu",
                 "--set", "rank=2", "-o", "run")
    assert run.code == 0, run.err
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 8, "four of each noise expert"
    for more, reason in ((["--model", "tiny-t2v"], "is a text-to-video model; leave --last-image out"),
                         (["--model", "tiny", "--t2v"], "which --t2v leaves out")):
        refused = lapwan("cache", "--dataset", str(dataset), "--last-image", *more, *small, "-o", "other")
        assert refused.code == 2 and reason in refused.err, refused.err


def test_parts_apart_give_the_whole(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache", text=False)
    with pytest.raises(UserError, match="no cached items"):
        load_index(folder)
    before = stamps(folder)
    cache_tiny(dataset, folder, latents=False)
    assert len(load_index(folder).items) == 3
    assert all("wan.safetensors" not in name for name in changed(before, folder))


@pytest.mark.parametrize("damage", ["zero", "cut", "noise"])
def test_damaged_cache_files_are_made_again(dataset, tmp_path, damage):
    folder = cache_tiny(dataset, tmp_path / "cache")
    victim = folder / "c1_00000-009_0048x0032_wan.safetensors"
    data, tensors = victim.read_bytes(), copied(victim)
    victim.write_bytes({"zero": b"", "cut": data[:-100], "noise": b"\xff" * 500}[damage])
    index = load_index(folder)
    with pytest.raises(UserError, match="run lapwan cache again"):
        read_item(folder, index.items[1])
    cache_tiny(dataset, folder)
    torch.testing.assert_close(copied(victim), tensors)


def test_a_file_made_again_under_an_old_index_is_refused(dataset, tmp_path):
    """The name does not say from which frames it was made: an old index must not be taken for a new file."""
    folder = cache_tiny(dataset, tmp_path / "cache")
    old = load_index(folder)
    make_video(tmp_path / "clips" / "c0.mp4", frames=12, seed=50)
    cache_tiny(dataset, folder)
    with pytest.raises(UserError, match="not the file that the index refers to"):
        read_item(folder, old.items[0])


def test_removed_clips_stay_until_pruned(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    write_jsonl(dataset, [json.loads(text) for text in dataset.read_text(encoding="utf-8").splitlines()][:2])
    (folder / ".lapwan-tmp-12345678-x.safetensors").write_bytes(b"half")
    cache_tiny(dataset, folder)
    assert len(load_index(folder).items) == 2
    assert (folder / "c2_wan_te.safetensors").exists()
    cache_tiny(dataset, folder, prune=True)
    left = {p.name for p in folder.iterdir()}
    assert not any(name.startswith(("c2", ".lapwan-tmp")) for name in left)
    assert len([name for name in left if name.startswith(("c0", "c1"))]) == 4


def test_prune_spares_clips_that_only_cannot_be_read_now(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    (tmp_path / "clips" / "c2.mp4").rename(tmp_path / "away.mp4")
    (tmp_path / "clips" / "c1.mp4").write_bytes(b"")
    cache_tiny(dataset, folder, prune=True, skip_bad=True)
    assert len(list(folder.glob("c[12]_*.safetensors"))) == 4
    assert [item.id[:2] for item in load_index(folder).items] == ["c0"]


def test_another_dataset_does_not_take_a_folder_by_accident(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    make_video(tmp_path / "other.mp4", frames=12)
    other = write_jsonl(tmp_path / "other.jsonl", [{"video_path": "other.mp4", "caption": "x"}])
    with pytest.raises(UserError, match="is the cache of"):
        cache_tiny(other, folder)
    cache_tiny(other, folder, overwrite=True)
    assert [item.id for item in load_index(folder).items] == ["other_00000-009_0096x0064"]
    assert (folder / "c0_wan_te.safetensors").exists()


def test_equal_names_do_not_collide(tmp_path):
    for name in ("a/x.mp4", "b/x.mp4", "b/X.mp4"):
        make_video(tmp_path / name, frames=12, seed=ord(name[0]))
    rows = [{"video_path": n, "caption": n} for n in ("a/x.mp4", "b/x.mp4", "b/X.mp4")]
    folder = cache_tiny(write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "cache")
    items = load_index(folder).items
    assert len({item.id.casefold() for item in items}) == 3
    assert items[0].id == "x_00000-009_0096x0064"
    assert len({read_item(folder, item)["latents"].sum().item() for item in items[:2]}) == 2
    before = stamps(folder)
    cache_tiny(tmp_path / "c.jsonl", folder)
    assert changed(before, folder) == []


@pytest.fixture
def foreign(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache", model="tiny-i2v")
    strip_recipes(folder)
    return folder


def test_musubi_caches_are_read_as_they_are(foreign):
    index = load_index(foreign)
    assert not index.verified and index.task is None
    item = index.items[0]
    assert (item.id, item.bucket) == ("c0_00000-009_0048x0032", (9, 32, 48))
    assert (item.caption, item.condition) == ("剪刀 0", True)
    tensors = read_item(foreign, item)
    assert tensors["latents"].shape == (16, 3, 4, 6) and tensors["condition"].shape == (20, 3, 4, 6)
    with pytest.raises(UserError, match="no features of the empty prompt"):
        from lapwan.caching.read import read_empty_text

        read_empty_text(index)


def test_musubi_caches_are_accepted_as_unverified(foreign, dataset, capsys):
    before = stamps(foreign)
    cache_tiny(dataset, foreign, model="tiny-i2v")
    assert changed(before, foreign) == ["lapwan_prompts.safetensors"]
    assert "unverified" in capsys.readouterr().err
    edit(dataset, 0, caption="吸引")
    before = stamps(foreign)
    cache_tiny(dataset, foreign, model="tiny-i2v", size=(48, 48))
    expected = [*(f"c{i}_00000-009_0048x0048_wan.safetensors" for i in range(3)), "c0_wan_te.safetensors"]
    assert changed(before, foreign) == sorted(expected)
    assert set(before) <= set(stamps(foreign)), "files of another tool are not deleted"
    cache_tiny(dataset, foreign, model="tiny-i2v", size=(48, 48), prune=True)
    assert set(before) <= set(stamps(foreign)), "nor pruned"


def test_labels_join_by_stem(foreign, tmp_path):
    labels = write_jsonl(tmp_path / "labels.jsonl", [
        {"video_path": f"elsewhere/c{i}.mp4", "caption": "x", "instrument_label": i, "instrument_name": f"n{i}",
         "instrument_logits": [float(j == i) for j in range(4)]} for i in (2, 1, 0)])
    index = load_index(foreign, labels=labels)
    assert [item.label for item in index.items] == [0, 1, 2]
    assert index.items[2].label_weights == (0.0, 0.0, 1.0, 0.0)
    with labels.open("a") as file:
        file.write('{"video_path": "more/c1.mp4", "caption": "x", "instrument_label": 3}\n')
    with pytest.raises(UserError, match=r"lines 2, 4 all match item 'c1'"):
        load_index(foreign, labels=labels)
    write_jsonl(labels, [{"video_path": "c0.mp4", "caption": "x", "instrument_label": 3}])
    with pytest.raises(UserError, match="no line for 2 of 3 items: c1, c2"):
        load_index(foreign, labels=labels)
    write_jsonl(labels, [{"video_path": "c0.mp4", "caption": "x"}])
    with pytest.raises(UserError, match="line 1 has no instrument_label"):
        load_index(foreign, labels=labels)


def test_a_foreign_cache_without_text_is_refused(foreign):
    (foreign / "c1_wan_te.safetensors").unlink()
    with pytest.raises(UserError, match=r"c1.*has no text"):
        load_index(foreign)


def test_what_a_kill_left_under_a_temporary_name_is_no_item(foreign):
    (foreign / ".lapwan-tmp-0123abcd-c9_00000-009_0048x0032_wan.safetensors").write_bytes(b"half")
    assert len(load_index(foreign).items) == 3


def test_an_unfinished_cache_is_not_taken_for_a_foreign_one(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    (folder / "lapwan_index.jsonl").unlink()
    with pytest.raises(UserError, match="has no index: lapwan cache was interrupted"):
        load_index(folder)


def test_verify_finds_what_is_wrong(dataset, tmp_path):
    folder = cache_tiny(dataset, tmp_path / "cache")
    cache_tiny(None, folder, model=None, verify=True)
    name = folder / "c0_00000-009_0048x0032_wan.safetensors"
    from safetensors import safe_open

    with safe_open(name, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    broken = {key: torch.where(torch.arange(value.numel()).reshape(value.shape) == 7, torch.nan, value)
              for key, value in tensors.items()}
    save_file(broken, name, metadata)
    (folder / "c1_wan_te.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 7 files are damaged"):
        cache_tiny(None, folder, model=None, verify=True)


def test_preview_shows_the_clips(dataset, tmp_path):
    import numpy as np
    from PIL import Image

    edit(dataset, 0, roi=[{"frame": i, "box": [0, 0, 0.5, 1]} for i in range(12)])
    folder = cache_tiny(dataset, tmp_path / "cache", preview=2)
    with Image.open(folder / "lapwan_preview.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * (32 + 4), 6 * (48 + 4), 3)
    yellow = (pixels == (255, 220, 0)).all(axis=-1)
    # Of the first frame of the first row, half is inside the box: its outline, and nothing in the second row.
    assert yellow[:32, :24].sum() == 2 * 24 + 2 * 30 and not yellow[:32, 24:48].any() and not yellow[36:].any()


def test_long_names_fit_the_file_system(tmp_path):
    name = "电凝钩切割胆囊床血管" * 7  # 210 bytes
    for suffix in ("一", "二"):
        make_video(tmp_path / f"{name}{suffix}.mp4", frames=12)
    rows = [{"video_path": f"{name}{s}.mp4", "caption": s} for s in ("一", "二")]
    folder = cache_tiny(write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "cache")
    items = load_index(folder).items
    assert len({item.id for item in items}) == 2
    assert all(read_item(folder, item)["latents"] is not None for item in items)
