"""Names that one file gives of another (shards, cached items) never lead out of their folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import run_lapwan
from hypothesis import given
from hypothesis import strategies as st

from lapwan.caching.read import load_index
from lapwan.errors import UserError
from lapwan.files import inside

OUTSIDE = ["../victim/model.safetensors", "/victim/model.safetensors", "sub/model.safetensors", "..", "", ".", None, 7,
           ["model.safetensors"], "..\\victim\\model.safetensors", "model\0.safetensors"]


@given(st.text(max_size=30))
def test_a_path_is_inside_or_refused(name: str) -> None:
    folder = Path("/models/transformer")
    try:
        path = inside(folder, name, folder / "index.json")
    except UserError:
        return
    assert path.parent == folder and path.name == name


@pytest.mark.parametrize("name", OUTSIDE)
def test_merge_replaces_nothing_outside_its_output(name, model_folder, pair, tmp_path) -> None:
    """A shard index from elsewhere named another model's file, and merge wrote there."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    victim = model / "victim" / "model.safetensors"
    victim.parent.mkdir()
    shutil.copyfile(next((model / "transformer").glob("*.safetensors")), victim)
    before = victim.read_bytes()
    index = {"metadata": {}, "weight_map": {"blocks.0.attn1.to_q.weight": name}}
    (model / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    loras = [word for noise_expert, path in pair.items() for word in ("--lora", f"{noise_expert.value}={path}")]
    code, _, error = run_lapwan("merge", "--model", model, *loras, "-o", tmp_path / "out")
    assert code == 2 and error.startswith("error: ") and f"names the file {name!r}" in error, error
    assert victim.read_bytes() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}])
def test_an_index_without_a_map_is_named(index, model_folder, pair, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    loras = [word for noise_expert, path in pair.items() for word in ("--lora", f"{noise_expert.value}={path}")]
    code, _, error = run_lapwan("merge", "--model", model, *loras, "-o", tmp_path / "out")
    assert code == 2 and "weight_map" in error


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name is not None])
@pytest.mark.parametrize("kind", ["latents", "text", "roi"])
def test_a_cache_index_names_files_of_its_folder(kind, name, t2v_cache, tmp_path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(t2v_cache, folder)
    path = folder / "lapwan_index.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines[1][kind] = name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match="plain file names"):
        load_index(folder)
