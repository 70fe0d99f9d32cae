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
from lapwan.data.musubi_dataset import read_musubi_dataset
from lapwan.errors import UserError
from lapwan.files import check_targets, inside, is_plain_name
from lapwan.models.merge import carried_files
from lapwan.models.spec import weight_files
from lapwan.sampling.jobs import line_jobs, make_video_jobs
from lapwan.settings.generate import GenerateSettings

OUTSIDE = ["../victim/model.safetensors", "/victim/model.safetensors", "sub/model.safetensors", "..", "", ".", None, 7,
           ["model.safetensors"], "..\\victim\\model.safetensors", "model\0.safetensors", "C:model.safetensors",
           "x" * 300, "\ud800.safetensors", "字" * 100]


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
    assert code == 2 and error.startswith("error: ") and f"names the file {name!r}"[:120] in error, error
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


NAMES = st.one_of(
    st.text(max_size=20), st.sampled_from(OUTSIDE),
    st.builds("/".join, st.lists(st.sampled_from(
        ["..", ".", "~", "a", "", "／", "\u2215", "C:", "\0", "\n", "x" * 200, "..\\"]), max_size=4)))


@given(NAMES)
def test_names_of_files_to_read_and_write_are_plain_everywhere(tmp_path_factory, name: object) -> None:
    """Shards of an index, outputs of a prompts file and of a typed line: a file in the folder, or a line."""
    folder = tmp_path_factory.getbasetemp() / "places"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    row = json.dumps({"prompt": "x", "output": name})
    (folder / "prompts.jsonl").write_text(row + "\n")
    settings = GenerateSettings(model="tiny", prompts=folder / "prompts.jsonl", output=folder / "out")
    places = {
        "shards": lambda: weight_files(folder),
        "prompts": lambda: [job.output for job in make_video_jobs(settings)],
        "line": lambda: [job.output for job in line_jobs(settings, row, folder / "out")],
    }
    for place, paths in places.items():
        try:
            given_paths = paths()
        except UserError as error:
            assert len(str(error).splitlines()) == 1, place
            continue
        assert name is None or is_plain_name(name), place
        assert all(path.parent in (folder, folder / "out") for path in given_paths), place


@pytest.mark.parametrize("extension", ["/../../x", "a/b", "..\\x", "/etc/passwd", ""])
def test_a_caption_extension_is_the_end_of_a_name(extension: str, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"")
    (tmp_path / "dataset.toml").write_text(
        f'[[datasets]]\nvideo_directory = "clips"\ncache_directory = "c"\n'
        f"caption_extension = {json.dumps(extension)}\n")
    with pytest.raises(UserError, match="caption_extension"):
        read_musubi_dataset(tmp_path / "dataset.toml", None, 16, 4)


def test_links_that_leave_a_model_are_not_copied(model_folder: Path, tmp_path: Path) -> None:
    model, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(model_folder, model)
    (outside / "vae").mkdir(parents=True)
    for name in ("secret", "vae/config.json"):
        (outside / name).write_text("{}")
    (model / "secret").symlink_to(outside / "secret")
    (model / "notes").symlink_to(outside, target_is_directory=True)
    (model / "within.txt").symlink_to(model / "model_index.json")
    (model / "gone.json").symlink_to(outside / "nothing")
    (model / "round.json").symlink_to(model / "round.json")
    shutil.rmtree(model / "vae")
    (model / "vae").symlink_to(outside / "vae", target_is_directory=True)  # a component that is stored elsewhere
    carried, left_out = carried_files(model, [])
    assert {Path("vae/config.json"), Path("within.txt")} <= set(carried)
    assert {str(path) for path in left_out} == {"secret", "notes/secret", "notes/vae/config.json"}
    assert all("outside the model" in reason for reason in left_out.values())


@pytest.mark.parametrize("target", ["model", "model/vae"])
def test_a_folder_that_contains_itself_is_named(target: str, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "vae" / "again").symlink_to(tmp_path / target, target_is_directory=True)
    with pytest.raises(UserError, match="leads back to"):
        carried_files(tmp_path / "model", [])


def test_a_snapshot_of_the_hub_is_copied_through_its_links(tmp_path: Path) -> None:
    hub = tmp_path / "models--a"
    snapshot = hub / "snapshots" / "1"
    (snapshot / "assets").mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "b").write_text("{}")
    for name in ("model_index.json", "assets/logo.png"):
        (snapshot / name).symlink_to(hub / "blobs" / "b")
    (snapshot / "assets" / "passwords").symlink_to("/etc/passwd")
    carried, left_out = carried_files(snapshot, [])
    assert set(map(str, carried)) == {"model_index.json", "assets/logo.png"}
    assert set(map(str, left_out)) == {"assets/passwords"}


def test_targets_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    check_targets(tmp_path / "out", [tmp_path / "out" / "a" / "b"])
    for target in ("../a", "link/a", "/etc/a"):
        with pytest.raises(UserError, match="leads out of the output"):
            check_targets(tmp_path / "out", [tmp_path / "out" / target])
