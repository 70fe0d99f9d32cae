"""One file for both noise experts: equal ΔW in and out, metadata that keeps apart what differs, the commands' ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_cases import random_state, shapes
from safetensors import safe_open
from safetensors.torch import load_file

from lapwan import inspect_weights
from lapwan.checkpoints.wan_keys import OUTER_MODULES
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora, read_lora, write_both
from lapwan.lora.state import AdapterState
from lapwan.models.merge import merge
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
OUTER = {path: (10, 6) for path in OUTER_MODULES.values() if path != "patch_embedding"}
SUBSETS = {
    "all": (shapes(), shapes()),
    "other blocks": (shapes([0]), shapes([1, 2])),
    "other projections": (shapes([1], ["self_attn.q"]), shapes([1], ["ffn.0", "cross_attn.o"])),
    "with outer modules": (shapes([0]) | OUTER, OUTER),
}


def states(subset: str = "all", **random) -> dict[NoiseExpert, AdapterState]:
    return {noise_expert: random_state(sizes, seed=n, **random)
            for n, (noise_expert, sizes) in enumerate(zip(NoiseExpert, SUBSETS[subset], strict=True))}


def merged(output: Path, *loras: object, **options) -> list[str]:
    said = {"output": str(output), "lora": [str(lora) for lora in loras], **options}
    return list(merge(load(MergeSettings, options=said, environment={}), RunOptions()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 1.0, 2.5])
@pytest.mark.parametrize("subset", SUBSETS)
def test_round_trip_through_one_file_keeps_delta(tmp_path: Path, dtype: torch.dtype, alpha: float | None, subset: str):
    before = states(subset, alpha=alpha, dtype=dtype)
    write_both(tmp_path / "x.safetensors", before)
    back = read_lora(tmp_path / "x.safetensors")
    assert list(back) == [HIGH, LOW]
    for noise_expert, state in before.items():
        assert back[noise_expert].fingerprint() == state.fingerprint()  # paths, ranks, alphas, A and B: ΔW bit for bit
        assert all(e.up.dtype == e.down.dtype == dtype for e in back[noise_expert].entries.values())


def test_folded_alpha_is_in_b_and_nowhere_else(tmp_path: Path):
    before = states(alpha=3.0)
    write_both(tmp_path / "x.safetensors", before, fold_alpha=True)
    assert not any("alpha" in name for name in load_file(tmp_path / "x.safetensors"))
    for noise_expert, back in read_lora(tmp_path / "x.safetensors").items():
        for path, entry in back.entries.items():
            want = before[noise_expert].entries[path].delta(torch.float64)
            torch.testing.assert_close(entry.delta(torch.float64), want, rtol=0, atol=1e-6)


def test_the_names_are_the_ones_in_use(tmp_path: Path):
    write_both(tmp_path / "x.safetensors", states("other projections"))
    assert sorted(load_file(tmp_path / "x.safetensors")) == sorted(
        f"diffusion_model.{module}.{part}" for part in ("alpha", "lora_A.weight", "lora_B.weight") for module in (
            "transformer_1.blocks.1.self_attn.q", "transformer_2.blocks.1.ffn.0",
            "transformer_2.blocks.1.cross_attn.o"))


def test_metadata_that_differs_is_kept_apart(tmp_path: Path):
    both = states("other blocks")
    for noise_expert, state in both.items():
        state.metadata = {"lapwan.noise_expert": noise_expert.value, "lapwan.task": "t2v", "lapwan.boundary": "0.875",
                          "lapwan.base_fingerprint": f"base of {noise_expert.value}", "ss_tag": "own"}
    write_both(tmp_path / "x.safetensors", both)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = file.metadata()
    assert said["lapwan.task"] == "t2v" and said["ss_tag"] == "own"
    assert not {"lapwan.noise_expert", "modelspec.timestep_range", "lapwan.base_fingerprint"} & set(said)
    assert said["modelspec.timestep_range.high"] == "875,1000" and said["modelspec.timestep_range.low"] == "0,875"
    for noise_expert, file in open_lora(tmp_path / "x.safetensors").items():
        assert file.metadata["lapwan.base_fingerprint"] == f"base of {noise_expert.value}"
        assert file.metadata["lapwan.fingerprint"] == file.fingerprint() == both[noise_expert].fingerprint()
        assert file.metadata["lapwan.noise_expert"] == noise_expert.value and file.noise_expert_source == "keys"
        assert not any(key.endswith((".high", ".low")) for key in file.metadata)


def test_one_noise_expert_is_no_file_for_both(tmp_path: Path):
    with pytest.raises(UserError, match=r"x.safetensors as one file for both noise experts: there are LoRAs for: low"):
        write_both(tmp_path / "x.safetensors", {LOW: states()[LOW]})
    assert not (tmp_path / "x.safetensors").exists()


def test_merge_makes_one_file_of_two_and_two_of_one(tmp_path: Path, pair):
    together = tmp_path / "both.safetensors"
    lines = merged(together, f"high={pair[HIGH]}", f"low={pair[LOW]}", one_file=True)
    assert lines == [f"LoRA: {together}"]
    merged(tmp_path / "apart.safetensors", together, format="musubi")
    for noise_expert, path in pair.items():
        (before,) = read_lora(path).values()
        (after,) = read_lora(tmp_path / f"apart_{noise_expert.file_suffix}.safetensors").values()
        assert read_lora(together)[noise_expert].fingerprint() == after.fingerprint() == before.fingerprint()


def test_one_lora_for_both_and_sums_and_resizes_in_one_file(tmp_path: Path, saved):
    one, other = saved("a.safetensors", seed=1), saved("b.safetensors", seed=2)
    merged(tmp_path / "x.safetensors", f"both={one}:0.5", f"low={other}", one_file=True, rank=6)
    back = read_lora(tmp_path / "x.safetensors")
    (first,), (second,) = (read_lora(path).values() for path in (one, other))
    for path, entry in first.entries.items():
        half = 0.5 * entry.delta(torch.float64)
        want = {HIGH: half, LOW: half + second.entries[path].delta(torch.float64)}
        assert torch.linalg.matrix_norm(back[HIGH].entries[path].delta(torch.float64) - want[HIGH]) < 1e-5
        if want[LOW].shape[0] <= 6 or want[LOW].shape[1] <= 6:  # rank 6 holds all of it
            assert torch.linalg.matrix_norm(back[LOW].entries[path].delta(torch.float64) - want[LOW]) < 1e-5


@pytest.mark.parametrize(("options", "message"), [
    ({"format": "diffusers"}, r"one_file is written in comfy layout.*diffusers"),
    ({"format": "musubi"}, r"one_file is written in comfy layout.*musubi"),
    ({"model": "tiny"}, r"--one-file applies only if the result is a LoRA"),
])
def test_one_file_where_there_is_none_is_refused(tmp_path: Path, pair, options, message):
    with pytest.raises(UserError, match=message):
        merged(tmp_path / "x.safetensors", f"high={pair[HIGH]}", f"low={pair[LOW]}", one_file=True, **options)


def test_one_noise_experts_lora_cannot_become_a_file_for_both(tmp_path: Path, pair):
    with pytest.raises(UserError, match="--one-file needs a LoRA for each noise expert; these are for: high"):
        merged(tmp_path / "x.safetensors", f"high={pair[HIGH]}", one_file=True)
    assert not (tmp_path / "x.safetensors").exists()


def test_inspect_reads_both_out_of_one_file(tmp_path: Path, pair):
    merged(tmp_path / "x.safetensors", f"high={pair[HIGH]}", f"low={pair[LOW]}", one_file=True)
    found = [inspect_weights(*files) for files in ((tmp_path / "x.safetensors",), pair.values())]
    assert found[0]["experts"] == found[1]["experts"] and set(found[0]["experts"]) == {"high", "low"}
