"""Bad input of every kind is one line on stderr and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Ran

from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.models.spec import ModelSpec
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.names import NoiseExpert
from lapwan.tiny.dataset import write_dataset

Run = Callable[..., str]


@pytest.fixture
def refused(lapwan: Callable[..., Ran]) -> Run:
    """Run a command that must fail; gives its last line of stderr."""

    def run(*arguments: object, lines: int | None = 1) -> str:
        ran = lapwan(*arguments)
        said = ran.err.strip().splitlines()
        assert ran.code == 2, said
        assert said[-1].startswith("error: ") and (lines is None or len(said) == lines), said
        return said[-1]

    return run


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "clips", clips=4, seed=1, size=(32, 32), frames=5)


def changed(clips: Path, line: int, **fields: object) -> Path:
    """A copy of the clips with fields of one line changed."""
    rows = [json.loads(text) for text in clips.read_text(encoding="utf-8").splitlines()]
    rows[line - 1] |= fields
    path = clips.with_name("changed.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def lora(tmp_path: Path, tiny_t2v: ModelSpec) -> Path:
    entry = LowRank(torch.randn(2, 192), torch.randn(192, 2), 2.0)
    state = AdapterState({"blocks.0.attn1.to_q": entry}, {"lapwan.noise_expert": "low"})
    write_lora(tmp_path / "a.safetensors", state)
    return tmp_path / "a.safetensors"


@pytest.fixture
def mixture(tmp_path: Path, tiny_t2v: ModelSpec) -> Path:
    bands = {noise_expert: (band.low, band.high) for noise_expert, band in tiny_t2v.bands.items()}
    entry = LowRank(torch.randn(2, 192), torch.randn(192, 2), 2.0)
    states = {e: {f: AdapterState({"blocks.0.attn1.to_q": entry}, {}) for f in "ab"} for e in NoiseExpert}
    spec = MixtureSpec(("a", "b"), {}, "t2v", bands, tiny_t2v.text_dim, base=dict.fromkeys(NoiseExpert, "f" * 64))
    write_mixture(tmp_path / "m.safetensors", Mixture(spec, states))
    return tmp_path / "m.safetensors"


def test_clips(refused, clips):
    text = clips.read_text(encoding="utf-8").splitlines()
    broken = clips.with_name("broken.jsonl")
    broken.write_text("\n".join([*text[:2], '{"caption": ', text[3]]), encoding="utf-8")
    assert "broken.jsonl, line 3: broken JSON" in refused("label", broken, "-o", "o1.jsonl", lines=None)
    assert "line 2: empty caption" in refused("label", changed(clips, 2, caption=" "), "-o", "o2.jsonl", lines=None)
    assert [len(Path(name).read_text(encoding="utf-8").splitlines()) for name in ("o1.jsonl", "o2.jsonl")] == [3, 3]
    assert "unknown taxonomy 'surgical5' (did you mean 'surgical4'?)" in refused(
        "label", clips, "-o", "o.jsonl", "--taxonomy", "surgical5")
    shape = ("--model", "tiny", "--size", "32x32", "--num-frames", "5", "--workers", "0")
    assert "line 3" in refused("cache", "--dataset", broken, "-o", "c", *shape, lines=None)
    assert not Path("o.jsonl").exists()


def test_videos_that_are_missing_or_unreadable_do_not_keep_the_others_from_being_cached(refused, clips):
    shape = ("--model", "tiny", "--size", "32x32", "--num-frames", "5", "--workers", "0")
    missing = changed(clips, 2, video_path="nowhere.mp4")
    assert "line 2: no such file: nowhere.mp4" in refused("cache", "--dataset", missing, "-o", "c1", *shape, lines=None)
    (clips.parent / "cut.mp4").write_bytes(b"\0" * 300)
    unreadable = changed(clips, 3, video_path="cut.mp4")
    said = refused("cache", "--dataset", unreadable, "-o", "c2", *shape, lines=None)
    assert "line 3 (cut.mp4): cannot be read as video" in said
    for folder in ("c1", "c2"):
        assert len(list(Path(folder).glob("*_0032x0032_wan.safetensors"))) == 3


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--num-frames", "6", "frames = 6: must be 4N+1 (1, 5, 9, ...); the nearest are 5 and 9"),
    ("--size", "60x64", "size 60x64 (height x width): both must be multiples of 16"),
    ("--size", "wide", "size = 'wide'"),
])
@pytest.mark.parametrize("command", ["cache", "generate"])
def test_frames_and_sizes(refused, clips, command, option, value, message):
    usual = {"cache": ("--dataset", clips, "--model", "tiny", "-o", "c"),
             "generate": ("--model", "tiny", "--prompt", "x", "-o", "x.mp4")}
    assert message in refused(command, *usual[command], option, value)


def test_adapters_in_the_wrong_place(refused, lora, mixture):
    generate = ("generate", "--model", "tiny", "--prompt", "x", "-o", "x.mp4")
    assert "is not a lapwan mixture; if it is a LoRA, pass it with --lora" in refused(*generate, "--moe", lora)
    assert "is a mixture; pass it with --moe" in refused(*generate, "--lora", mixture)
    assert "is a mixture; pass it with --moe" in refused("merge", "--model", "tiny", "--lora", mixture, "-o", "out")
    assert "is for the low noise expert" in refused(*generate, "--lora", f"high={lora}")
    assert "was trained on another base" in refused(*generate, "--moe", mixture)
    assert "no such file" in refused(*generate, "--moe", "nowhere.safetensors")
    assert not Path("x.mp4").exists() and not Path("out").exists()


def test_models_that_do_not_fit(refused, tiny_t2v, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_t2v.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer_2": [None, None]}))
    said = refused("generate", "--model", folder, "--prompt", "x", "-o", "x.mp4")
    assert "has a boundary_ratio (0.875) but no transformer_2" in said
    assert "give the first frame with --image" in refused(
        "generate", "--model", "tiny-i2v", "--prompt", "x", "-o", "x.mp4")
    assert "no model folder" in refused("generate", "--model", "nowhere", "--prompt", "x", "-o", "x.mp4")


def test_outputs_that_exist(refused, clips, t2v_cache, tmp_path):
    for name in ("labels.jsonl", "x.mp4"):
        (tmp_path / name).write_text("mine")
    assert "output exists: labels.jsonl" in refused("label", clips, "-o", "labels.jsonl")
    assert "output exists: x.mp4" in refused("generate", "--model", "tiny", "--prompt", "x", "-o", "x.mp4")
    assert "output exists: clips" in refused("train-lora", "--cache", t2v_cache, "--steps", "1", "-o", "clips")
    assert "output exists: clips" in refused("demo", "-o", "clips")
    assert all((tmp_path / name).read_text() == "mine" for name in ("labels.jsonl", "x.mp4"))
