"""What cache files are called, whose they are, and that their bytes are the ones that were written."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from cache_clips import cache_tiny, make_video, strip_recipes, write_jsonl
from PIL import Image

from lapwan.caching.index import parse_index
from lapwan.caching.layout import checksum_matches, parse_latents_name, write_latents, write_text_features
from lapwan.caching.read import load_index, read_item
from lapwan.checkpoints.container import read_header
from lapwan.errors import UserError


@pytest.fixture
def dataset(tmp_path):
    for index in range(3):
        make_video(tmp_path / "clips" / f"c{index}.mp4", frames=12, seed=index)
    return write_jsonl(tmp_path / "clips.jsonl", [
        {"video_path": f"clips/c{i}.mp4", "caption": f"剪刀 {i}"} for i in range(3)])


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


def rename_as_before(folder, index_too=True):
    """The names that older versions gave: a video's latents by the size of its source."""
    for path in folder.glob("*_0048x0032_wan.safetensors"):
        path.rename(path.with_name(path.name.replace("_0048x0032_", "_0096x0064_")))
    index = folder / "lapwan_index.jsonl"
    if index_too:
        index.write_text(index.read_text(encoding="utf-8").replace("_0048x0032_", "_0096x0064_"), encoding="utf-8")
    else:
        index.unlink()


@pytest.mark.parametrize("index_too", [True, False])
def test_files_under_their_older_names_stay_valid(dataset, tmp_path, capsys, index_too):
    folder = cache_tiny(dataset, tmp_path / "cache")
    ids = [item.id for item in load_index(folder).items]
    rename_as_before(folder, index_too)
    before = stamps(folder)
    cache_tiny(dataset, folder)
    assert stamps(folder) == before
    items = load_index(folder).items
    assert [item.id for item in items] == ids, "what keys a clip's noise does not change with its files' names"
    assert all(item.latents.endswith("_0096x0064_wan.safetensors") for item in items)
    assert read_item(folder, items[0])["latents"].shape == (16, 3, 4, 6)


def test_a_stale_file_under_its_older_name_is_replaced(dataset, tmp_path):
    """musubi-tuner would take both for items."""
    folder = cache_tiny(dataset, tmp_path / "cache")
    rename_as_before(folder)
    make_video(tmp_path / "clips" / "c1.mp4", frames=12, seed=50)
    cache_tiny(dataset, folder)
    names = sorted(path.name for path in folder.glob("c*[0-9]_wan.safetensors"))
    assert names == [f"c{i}_00000-009_{size}_wan.safetensors" for i, size in
                     enumerate(["0096x0064", "0048x0032", "0096x0064"])]


def test_an_image_named_like_a_window_has_files_of_its_own(tmp_path):
    """`a_00000-009.png` of 48x32 would be the file of the first window of `a.mp4` in a bucket of 48x32."""
    make_video(tmp_path / "a.mp4", frames=12)
    noise = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a_00000-009.png")
    video, image = {"video_path": "a.mp4", "caption": "v"}, {"image_path": "a_00000-009.png", "caption": "i"}
    for order in ([video, image], [image, video]):
        folder = tmp_path / f"cache_{order[0]['caption']}"
        cache_tiny(write_jsonl(tmp_path / "clips.jsonl", order), folder)
        items = {item.caption: item for item in load_index(folder).items}
        assert len({item.latents for item in items.values()}) == len({item.text for item in items.values()}) == 2
        assert {caption: read_item(folder, item)["latents"].shape[1] for caption, item in items.items()} == {
            "v": 3, "i": 1}
        before = stamps(folder)
        cache_tiny(tmp_path / "clips.jsonl", folder)
        assert stamps(folder) == before


def test_equal_stems_keep_their_files_when_lines_move(tmp_path):
    names = [f"{place}/x.mp4" for place in "abc"]
    for name in names:
        make_video(tmp_path / name, frames=12, seed=ord(name[0]))
    rows = [{"video_path": name, "caption": name} for name in names]
    folder = cache_tiny(write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "cache")
    files = {item.caption: (item.latents, item.text) for item in load_index(folder).items}
    before = stamps(folder)
    for order in (rows[::-1], rows[1:], [*rows[1:], rows[0]]):  # moved; the first one away; back again
        cache_tiny(write_jsonl(tmp_path / "c.jsonl", order), folder)
        index = load_index(folder)
        assert {item.caption: (item.latents, item.text) for item in index.items}.items() <= files.items()
        assert [item.caption for item in index.items] == [row["caption"] for row in order]
    assert stamps(folder) == before


def test_stems_of_clips_that_failed_are_kept(tmp_path):
    """Only the index knows them: no item has their files."""
    for name in ("a/x.mp4", "b/x.mp4"):
        make_video(tmp_path / name, frames=12, seed=ord(name[0]))
    rows = [{"video_path": name, "caption": name} for name in ("a/x.mp4", "b/x.mp4")]
    folder = cache_tiny(write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "cache", text=False)
    before = stamps(folder)
    stems = load_index(folder, empty=True).stems
    assert sorted(stems) == [str(tmp_path / row["video_path"]) for row in rows]
    cache_tiny(write_jsonl(tmp_path / "c.jsonl", rows[::-1]), folder)
    assert {name: stamp for name, stamp in stamps(folder).items() if name in before} == before
    assert load_index(folder).stems == {}


def test_names_are_read_back():
    name = parse_latents_name("a_00000-017.x_00003-017_0112x0080_wan.safetensors")
    assert (name.stem, name.window, name.width, name.height) == ("a_00000-017.x", (3, 17), 112, 80)


def test_equal_content_is_equal_bytes(tmp_path):
    latents = torch.arange(128.0).reshape(16, 2, 2, 2)
    for name in "ab":
        write_latents(tmp_path / name, latents, latents.bfloat16(), (16, 16), 5, {"z": 1, "a": [2]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    from safetensors import safe_open

    with safe_open(tmp_path / "a", "pt") as file:
        assert file.get_tensor("latents_2x2x2_float32").equal(latents)
        assert file.get_tensor("latents_image_2x2x2_bfloat16").equal(latents.bfloat16())


def test_any_flipped_bit_is_found(tmp_path):
    """In the length, the header's keys and values, its padding, the checksum itself, and the tensors."""
    path = tmp_path / "x_wan.safetensors"
    write_latents(path, torch.randn(16, 1, 2, 2), None, (16, 16), 1, {"source": "剪", "size": [16, 16]})
    data = path.read_bytes()
    assert checksum_matches(read_header(path)) is True
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(UserError):  # the header says so already
            assert checksum_matches(read_header(path)) is False, f"bit {bit}"


def test_a_file_that_another_tool_rewrote_is_not_called_damaged(tmp_path):
    """musubi-tuner caches a caption again into the file and keeps our metadata, in JSON with spaces."""
    path = tmp_path / "x_wan_te.safetensors"
    write_text_features(path, torch.ones(3, 4), "a", {})
    file = read_header(path)
    entry = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
    text = json.dumps({"__metadata__": file.metadata, "varlen_t5_float32": entry}).encode()
    text += b" " * (-(len(text) + 8) % 256)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    assert checksum_matches(read_header(path)) is None


def test_verify_with_the_dataset_makes_damaged_files_again(dataset, tmp_path, capsys):
    folder = cache_tiny(dataset, tmp_path / "cache", batch_size=1)  # equal bits do not depend on the batch
    whole = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for name, offset in (("c0_00000-009_0048x0032_wan.safetensors", -7), ("c2_wan_te.safetensors", -1),
                         ("lapwan_prompts.safetensors", -40)):
        data = bytearray(whole[name])
        data[offset] ^= 1
        (folder / name).write_bytes(data)
    cache_tiny(dataset, folder)
    assert "nothing to do" in capsys.readouterr().out, "a plan reads headers only"
    with pytest.raises(UserError, match=r"3 of 7 files are damaged .*--config .*lapwan_settings.toml --verify` makes"):
        cache_tiny(None, folder, model=None, verify=True)
    assert "c2_wan_te.safetensors: its checksum does not match" in capsys.readouterr().out
    cache_tiny(dataset, folder, batch_size=1, verify=True)
    err = capsys.readouterr().err
    assert "c2_wan_te.safetensors: its checksum does not match" in err
    assert "1 latent, 1 caption, the empty and the negative prompt (damaged: its checksum does not match)" in " ".join(
        err.split())
    made_again = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    # Captions are encoded in batches padded to the longest, which may change a last bit.
    assert {n: b for n, b in made_again.items() if not n.endswith("_te.safetensors")} == {
        n: b for n, b in whole.items() if not n.endswith("_te.safetensors")}
    cache_tiny(dataset, folder, batch_size=1, verify=True)
    assert "all 7 files are intact" in capsys.readouterr().err


def test_verify_says_once_that_older_files_have_no_checksum(dataset, tmp_path, capsys):
    folder = cache_tiny(dataset, tmp_path / "cache")
    strip_recipes(folder)
    cache_tiny(dataset, folder)
    capsys.readouterr()
    cache_tiny(None, folder, model=None, verify=True)
    out, err = capsys.readouterr()
    assert "all 7 files are intact" in out
    assert err.count("6 of 7 files have no checksum") == 1


def test_reasons_are_grouped(dataset, tmp_path, capsys):
    folder = cache_tiny(dataset, tmp_path / "cache")
    for index in range(2):
        make_video(tmp_path / "clips" / f"c{index}.mp4", frames=12, seed=50 + index, size=(64, 64 + 16 * index))
    rows = [json.loads(line) | {"caption": "新"} for line in dataset.read_text(encoding="utf-8").splitlines()]
    write_jsonl(dataset, rows)
    capsys.readouterr()
    cache_tiny(dataset, folder)
    shown = " ".join(capsys.readouterr().err.split())
    assert "3 captions (caption changed) 2 latents (source changed)" in shown


def test_files_of_another_tool_are_used_and_never_pruned(dataset, tmp_path, capsys):
    folder = cache_tiny(dataset, tmp_path / "cache")
    strip_recipes(folder)
    stray = folder / "other_00000-009_0048x0032_wan.safetensors"
    shutil.copy(folder / "c0_00000-009_0048x0032_wan.safetensors", stray)
    before = stamps(folder)
    write_jsonl(dataset, [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()][:2])
    cache_tiny(dataset, folder, prune=True)
    assert before.items() <= stamps(folder).items()
    assert [item.id for item in load_index(folder).items] == [f"c{i}_00000-009_0096x0064" for i in range(2)]
    err = capsys.readouterr().err
    assert "4 files made by another tool" in err and "3 cache files of another tool that no clip uses" in err


LABELLED = {"instrument_taxonomy": "surgical4"}


def labelled(dataset, rows):
    lines = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()]
    return write_jsonl(dataset, [line | LABELLED | row for line, row in zip(lines, rows, strict=True)])


def test_labels_are_stored_by_family(dataset, tmp_path):
    from dataclasses import replace

    from lapwan.caching.families import labels_in_order
    from lapwan.data.taxonomy import load_taxonomy

    taxonomy = load_taxonomy("surgical4")
    weights = [(0.75, 0.25, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0)]
    names = [family.name for family in taxonomy.families]
    labelled(dataset, [{"instrument_label": k, "instrument_name": names[k], "instrument_logits": w}
                       for k, w in zip((0, 2, 1), weights, strict=True)])
    folder = cache_tiny(dataset, tmp_path / "cache")
    head, first, *_ = (json.loads(line) for line in (folder / "lapwan_index.jsonl").read_text("utf-8").splitlines())
    assert head["families"] == list(taxonomy.keys) and head["taxonomy_fingerprint"] == taxonomy.fingerprint
    assert first["label"] == taxonomy.keys[0]
    assert first["label_weights"] == {taxonomy.keys[0]: 0.75, taxonomy.keys[1]: 0.25}
    index = load_index(folder)
    assert [item.label_weights for item in index.items] == weights and [item.label for item in index.items] == [0, 2, 1]
    assert labels_in_order(index, index.items, taxonomy) == list(index.items)

    turned = replace(taxonomy, families=taxonomy.families[::-1])
    items = labels_in_order(index, index.items, turned)
    assert [item.label_weights for item in items] == [w[::-1] for w in weights]
    assert [item.label for item in items] == [3, 1, 2]
    fewer = replace(taxonomy, families=taxonomy.families[:3], default=0)
    with pytest.raises(UserError, match=r"has labels of the families .* cache again"):
        labels_in_order(index, index.items, fewer)
    # An older index has numbers only; the names of its labels say whether the order is still the same.
    older = replace(index, families=None, taxonomy_fingerprint=None)
    assert labels_in_order(older, older.items, taxonomy) == list(older.items)
    with pytest.raises(UserError, match="its order has changed"):
        labels_in_order(older, older.items, turned)


def test_labels_of_another_order_are_not_stored_as_if_they_were_known(dataset, tmp_path):
    labelled(dataset, [{"instrument_label": k, "instrument_name": "Suction"} for k in range(3)])
    index = load_index(cache_tiny(dataset, tmp_path / "cache"))
    assert index.families is None and [item.label for item in index.items] == [0, 1, 2]


@pytest.mark.parametrize(("number", "change", "message"), [
    (2, {"frames": "9"}, r'line 2 is damaged: frames = "9": input should be a valid integer'),
    (2, {"frames": 0}, "line 2 is damaged: frames = 0 must be at least 1"),
    (2, {"start": 10**30}, "line 2 is damaged: start = 1000000000000000000000000000000 must be at most"),
    (2, {"text": None}, "line 2 is damaged: text = null"),
    (2, {"latents": "../../x"}, "names the file '../../x'"),
    (2, {"roi": "/etc/passwd"}, "names the file '/etc/passwd'"),
    (2, {"label": "hook"}, '"hook" is not one of its families'),
    (2, {"label": 9, "label_weights": [0.5, 0.5]}, "label = 9, but there are 2 families"),
    (2, {"label_weights": [1, "a"]}, r"label_weights.1"),
    (2, {"facts": {"width": 1}}, "facts.height: field required"),
    (2, {"facts": []}, "facts = a list must be an object"),
    (2, '{"id": ' + "[" * 3000 + "]" * 3000 + "}", "line 2 is damaged: .* nested more than"),
    (2, f'{{"id": "a", "latents": "a", "text": "b", "caption": "c", "height": 8, "width": 8, "frames": {"9" * 5000}}}',
     "line 2 is damaged: .* a number of 5000 digits"),
    (2, "[1]", "line 2 is damaged: not an object"),
    (2, '{"id": NaN}', "line 2 is damaged: .* NaN is not JSON"),
    (1, {"fps": "16"}, 'line 1 is damaged: fps = "16"'),
    (1, {"families": [1]}, "line 1 is damaged: families = a list"),
    (1, {"stems": {"a": "../b"}}, "names the file '../b'"),
    (1, {"prompts": ".."}, "names the file '..'"),
    (1, {"lapwan_index": 99}, "lapwan_index = 99 is not a format"),
    (1, "", "line 1 is damaged: .* not valid JSON"),
])
def test_a_damaged_index_is_one_line_with_line_and_key(dataset, tmp_path, number, change, message):
    folder = tmp_path / "cache"
    folder.mkdir()
    rows = [{"lapwan_index": 1, "fps": 16.0}, {"id": "a", "latents": "a", "text": "b", "caption": "c", "frames": 9,
                                               "height": 8, "width": 8}]
    lines = [json.dumps(row) for row in rows]
    path = folder / "lapwan_index.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert parse_index(path).items[0].frames == 9
    lines[number - 1] = change if isinstance(change, str) else json.dumps(rows[number - 1] | change)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_index(folder)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
