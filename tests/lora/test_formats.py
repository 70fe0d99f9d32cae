"""LoRA files: what is written reads back with the same ΔW, and what is not understood is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import random_state, shapes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lapwan.checkpoints.fingerprints import merged_fingerprint
from lapwan.checkpoints.lora_keys import LAYOUTS, parse_key
from lapwan.checkpoints.wan_keys import OUTER_MODULES, PROJECTIONS
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora, read_lora, write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.names import NoiseExpert

OUTER = {path: (10, 6) for path in OUTER_MODULES.values() if path != "patch_embedding"}
SUBSETS = {
    "all": shapes(),
    "last block": shapes([2]),
    "two projections of one block": shapes([1], ["self_attn.q", "ffn.0"]),
    "with outer modules": shapes([0]) | OUTER,
}


def only(path: Path) -> AdapterState:
    (state,) = read_lora(path).values()
    return state


def same_delta(a: AdapterState, b: AdapterState, tolerance: float = 0.0) -> None:
    assert a.entries.keys() == b.entries.keys()
    for path in a.entries:
        error = (a.entries[path].delta(torch.float64) - b.entries[path].delta(torch.float64)).abs().max().item()
        assert error <= tolerance, (path, error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 1.0, 2.5])
@pytest.mark.parametrize("subset", SUBSETS)
def test_round_trip_keeps_delta(tmp_path: Path, layout: str, dtype: torch.dtype, alpha: float | None, subset: str):
    state = random_state(SUBSETS[subset], alpha=alpha, dtype=dtype)
    write_lora(tmp_path / "x.safetensors", state, layout=layout)
    back = only(tmp_path / "x.safetensors")
    # Folding a scale that is no power of two into B of the outer modules rounds once in the file's own dtype.
    folded = layout == "comfy" and subset == "with outer modules" and alpha == 2.5
    same_delta(back, state, 0.02 if folded else 0.0)
    if not folded and not (layout == "comfy" and subset == "with outer modules" and alpha is not None):
        assert back.fingerprint() == state.fingerprint()
        assert {p: e.alpha for p, e in back.entries.items()} == {p: e.alpha for p, e in state.entries.items()}
    assert all(e.up.dtype == dtype for e in back.entries.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_different_ranks_and_alphas_survive(tmp_path: Path, layout: str):
    entries = {}
    for n, (path, size) in enumerate(shapes([0, 1]).items()):
        entries |= random_state({path: size}, rank=2 + n % 3, alpha=1.0 + n % 4, seed=n).entries
    write_lora(tmp_path / "x.safetensors", AdapterState(entries), layout=layout)
    same_delta(only(tmp_path / "x.safetensors"), AdapterState(entries))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stored", "written"), [(torch.float32, None), (torch.bfloat16, torch.float32),
                                                 (torch.bfloat16, None)])
def test_folded_alpha_is_in_b_and_nowhere_else(tmp_path: Path, layout: str, stored, written):
    state = random_state(shapes([0]) | OUTER, alpha=3.0, dtype=stored)
    write_lora(tmp_path / "x.safetensors", state, layout, written, fold_alpha=True)
    alphas = {name: t.item() for name, t in load_file(tmp_path / "x.safetensors").items() if "alpha" in name}
    assert set(alphas.values()) == ({4.0} if layout == "musubi" else set())  # alpha = r, which readers of musubi's need
    back = only(tmp_path / "x.safetensors")
    assert all(entry.scale == 1.0 for entry in back.entries.values())
    same_delta(back, state, 1e-6 if (written or stored) is torch.float32 else 0.02)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["lapwan.fingerprint"] == back.fingerprint()  # of what is in the file


def test_the_stated_fingerprint_is_the_contents(tmp_path: Path):
    for layout in LAYOUTS:
        write_lora(tmp_path / "x.safetensors", random_state(shapes([0]) | OUTER, alpha=1.7), layout, torch.float16)
        back = only(tmp_path / "x.safetensors")
        assert back.metadata["lapwan.fingerprint"] == back.fingerprint()


def test_conversion_between_all_layouts_keeps_the_fingerprint(tmp_path: Path):
    state = random_state(shapes(), alpha=3.0, dtype=torch.bfloat16)
    path = tmp_path / "0.safetensors"
    write_lora(path, state)
    for n, layout in enumerate(("musubi", "diffusers", "comfy", "diffusers", "musubi"), 1):
        write_lora(tmp_path / f"{n}.safetensors", only(path), layout=layout)
        path = tmp_path / f"{n}.safetensors"
    assert only(path).fingerprint() == state.fingerprint()


def test_keys_are_the_ones_other_tools_use(tmp_path: Path):
    state = random_state(shapes([0], ["self_attn.q", "ffn.2"]))
    for layout, names in {
        "comfy": ["diffusion_model.blocks.0.ffn.2.alpha", "diffusion_model.blocks.0.ffn.2.lora_A.weight",
                  "diffusion_model.blocks.0.ffn.2.lora_B.weight", "diffusion_model.blocks.0.self_attn.q.alpha",
                  "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
                  "diffusion_model.blocks.0.self_attn.q.lora_B.weight"],
        "musubi": ["lora_unet_blocks_0_ffn_2.alpha", "lora_unet_blocks_0_ffn_2.lora_down.weight",
                   "lora_unet_blocks_0_ffn_2.lora_up.weight", "lora_unet_blocks_0_self_attn_q.alpha",
                   "lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.lora_up.weight"],
        "diffusers": ["transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.lora_B.weight",
                      "transformer.blocks.0.ffn.net.2.lora_A.weight", "transformer.blocks.0.ffn.net.2.lora_B.weight"],
    }.items():
        write_lora(tmp_path / f"{layout}.safetensors", state, layout=layout)
        assert sorted(load_file(tmp_path / f"{layout}.safetensors")) == names


def variants(path: str, original: str) -> list[tuple[str, str]]:
    flat = original.replace(".", "_")
    return [
        (f"diffusion_model.{original}.lora_A.weight", f"diffusion_model.{original}.lora_B.weight"),
        (f"diffusion_model.{original}.lora_down.weight", f"diffusion_model.{original}.lora_up.weight"),
        (f"model.diffusion_model.{original}.lora_A.weight", f"model.diffusion_model.{original}.lora_B.weight"),
        (f"{original}.lora_A.weight", f"{original}.lora_B.weight"),
        (f"{path}.lora_A.weight", f"{path}.lora_B.weight"),
        (f"transformer.{path}.lora_A.weight", f"transformer.{path}.lora_B.weight"),
        (f"transformer_2.{path}.lora_A.weight", f"transformer_2.{path}.lora_B.weight"),
        (f"transformer.{path}.lora.down.weight", f"transformer.{path}.lora.up.weight"),
        (f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"),
        (f"base_model.model.{original}.lora_A.default.weight", f"base_model.model.{original}.lora_B.default.weight"),
        (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"),
        (f"lora_unet__{flat}.lora_down.weight", f"lora_unet__{flat}.lora_up.weight"),
        (f"lora_unet_{path.replace('.', '_')}.lora_down.weight", f"lora_unet_{path.replace('.', '_')}.lora_up.weight"),
    ]


@pytest.mark.parametrize("variant", range(13))
def test_variants_people_have_are_read(tmp_path: Path, variant: int):
    state = random_state(shapes([0, 2]))
    tensors = {}
    for path, entry in state.entries.items():
        _, block, rest = path.split(".", 2)
        original = f"blocks.{block}." + next(o for o, d in PROJECTIONS.items() if d == rest)
        down, up = variants(path, original)[variant]
        tensors |= {down: entry.down.clone(), up: entry.up.clone()}
    save_file(tensors, tmp_path / "x.safetensors")
    (noise_expert, back), = read_lora(tmp_path / "x.safetensors").items()
    same_delta(back, state)
    assert noise_expert is (NoiseExpert.LOW if variant == 6 else None)
    assert all(entry.scale == 1.0 for entry in back.entries.values())  # no alpha anywhere: scale 1


@given(st.sampled_from(sorted(PROJECTIONS)), st.integers(0, 60), st.sampled_from(list(LAYOUTS)),
       st.sampled_from(["down", "up", "alpha"]))
def test_every_name_written_parses_back(projection: str, block: int, layout: str, part: str):
    path = f"blocks.{block}.{PROJECTIONS[projection]}"
    key = parse_key(LAYOUTS[layout].names(path, None)[part])
    assert key is not None and (key.path, key.part, key.layout) == (path, part, layout)


def test_two_noise_experts_in_one_file_are_split(tmp_path: Path):
    high, low = random_state(shapes([0]), seed=1), random_state(shapes([1]), seed=2)
    for first, second in (("diffusion_model.transformer_1", "diffusion_model.transformer_2"),
                          ("transformer", "transformer_2")):
        tensors = {}
        for prefix, state in ((first, high), (second, low)):
            for path, entry in state.entries.items():
                tensors[f"{prefix}.{path}.lora_A.weight"] = entry.down.clone()
                tensors[f"{prefix}.{path}.lora_B.weight"] = entry.up.clone()
        save_file(tensors, tmp_path / "x.safetensors")
        back = read_lora(tmp_path / "x.safetensors")
        assert list(back) == [NoiseExpert.HIGH, NoiseExpert.LOW]
        same_delta(back[NoiseExpert.HIGH], high)
        same_delta(back[NoiseExpert.LOW], low)
        assert back[NoiseExpert.LOW].metadata["lapwan.noise_expert"] == "low"


def test_noise_expert_from_metadata_range_and_name(tmp_path: Path, saved):
    assert list(read_lora(saved("a.safetensors", metadata={"lapwan.noise_expert": "low"}))) == [NoiseExpert.LOW]
    for metadata, noise_expert in [
        ({"modelspec.timestep_range": "875,1000"}, NoiseExpert.HIGH),
        ({"modelspec.timestep_range": "0,900"}, NoiseExpert.LOW),
        ({"modelspec.timestep_range": "0,1000"}, None),
        ({"ss_min_timestep": "0", "ss_max_timestep": "875"}, NoiseExpert.LOW),
        ({"ss_min_timestep": "None", "ss_max_timestep": "None"}, None),
    ]:
        assert list(read_lora(saved("b.safetensors", metadata=metadata))) == [noise_expert], metadata
    for name, noise_expert in [
        ("x_high_noise", NoiseExpert.HIGH), ("x_low_noise", NoiseExpert.LOW), ("wan22-LowNoise", NoiseExpert.LOW),
        ("Motion_HIGH_v2", NoiseExpert.HIGH), ("flow_highway", None), ("high_and_low", None), ("x", None),
    ]:
        path = saved(f"{name}.safetensors")
        assert list(read_lora(path)) == [noise_expert], name
        assert "lapwan.noise_expert" not in only(path).metadata  # a name is a guess, not a statement
        assert open_lora(path)[noise_expert].noise_expert_source == ("name" if noise_expert else "")
    contradicting = saved("y_low_noise.safetensors", metadata={"lapwan.noise_expert": "high"})
    assert list(read_lora(contradicting)) == [NoiseExpert.HIGH]


def test_metadata_is_kept_and_completed(tmp_path: Path):
    state = random_state(shapes(), alpha=2.0, metadata={
        "lapwan.noise_expert": "high", "lapwan.boundary": "0.875", "lapwan.step": "120", "ss_tag": "own"})
    write_lora(tmp_path / "x.safetensors", state)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.timestep_range"] == "875,1000" and metadata["lapwan.step"] == "120"
    assert metadata["ss_tag"] == "own" and (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["lapwan.fingerprint"] == state.fingerprint() and metadata["lapwan.format"] == "lora/1"


def test_peft_config_beside_the_file_and_rslora(tmp_path: Path):
    state = random_state(shapes([0], ["self_attn.q"]), rank=4)
    (path, entry), = state.entries.items()
    stem = f"base_model.model.{path}"
    save_file({f"{stem}.lora_A.weight": entry.down, f"{stem}.lora_B.weight": entry.up},
              tmp_path / "adapter_model.safetensors")
    for values, scale in [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0),
                          ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5)]:
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        assert only(tmp_path / "adapter_model.safetensors").entries[path].scale == scale
    (tmp_path / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(UserError, match="use_dora"):
        read_lora(tmp_path / "adapter_model.safetensors")


GOOD = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 6),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(6, 2)}


@pytest.mark.parametrize(("extra", "says"), [
    ({"diffusion_model.blocks.0.norm1.diff": torch.zeros(4)}, r"norm1\.diff' is not understood"),
    ({"diffusion_model.blocks.0.norm3.lora_A.weight": torch.zeros(2, 6)}, "norm3.*not understood"),
    ({"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.zeros(1, 5)}, "magnitude for each row"),
    ({"diffusion_model.blocks.0.self_attn.q.diff": torch.zeros(6, 6)}, "LoRA and full delta"),
    ({"diffusion_model.blocks.1.self_attn.q.lokr_w1": torch.zeros(2, 2)}, "no lokr_w2 factor beside it"),
    ({"diffusion_model.blocks.1.self_attn.q.lokr_t2": torch.zeros(2, 2)}, "no lokr_w1 factor"),
    ({"diffusion_model.blocks.0.self_attn.q.lora_B.bias": torch.zeros(4)}, "not a bias of 6 features"),
    ({"diffusion_model.blocks.1.self_attn.q.lora_B.bias": torch.zeros(6)}, "no low-rank pair of a Linear beside it"),
    ({"diffusion_model.blocks.0.self_attn.q.lora_A.bias": torch.zeros(2)}, "a bias inside a low-rank pair"),
    ({"diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 6)}, "VACE.*--common-modules"),
    ({"lycoris_blocks_1_self_attn_q.hada_w1_a": torch.zeros(4, 4)}, "no hada_w1_b factor"),
    ({"diffusion_model.patch_embedding.lora_A.weight": torch.zeros(2, 6)}, "patch_embedding.*no B matrix"),
    ({"diffusion_model.blocks.0.self_atn.q.lora_A.weight": torch.zeros(2, 6)}, "did you mean 'self_attn.q'"),
    ({"diffusion_model.blocks.1.self_attn.q.lora_A.weight": torch.zeros(2, 6)}, "no B matrix"),
    ({"diffusion_model.blocks.1.self_attn.q.lora_B.weight": torch.zeros(2, 6)}, "no A matrix"),
    ({"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(2, 6)}, "same tensor"),
    ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 6),
      "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.zeros(6, 3)}, r"\[2, 6\].*\[6, 3\]"),
    ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.zeros(3)}, "not one number"),
    ({"diffusion_model.transformer_2.blocks.1.self_attn.q.lora_A.weight": torch.zeros(2, 6)}, "split the file"),
    ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(2, 6, dtype=torch.int8),
      "diffusion_model.blocks.0.ffn.0.lora_B.weight": torch.zeros(6, 2)}, "is I8"),
])
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, extra: dict, says: str):
    save_file(GOOD, tmp_path / "good.safetensors")
    read_lora(tmp_path / "good.safetensors")
    save_file(GOOD | extra, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=says) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_files_that_are_no_lora(tmp_path: Path):
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(3, 3)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(UserError, match="is not a LoRA"):
        read_lora(tmp_path / "checkpoint.safetensors")
    save_file(GOOD, tmp_path / "mixture.safetensors", metadata={"lapwan.format": "mixture/1"})
    with pytest.raises(UserError, match="is a mixture; pass it with --moe"):
        read_lora(tmp_path / "mixture.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor file at all")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_lora(tmp_path / "text.safetensors")
    whole = (tmp_path / "mixture.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="truncated"):
        read_lora(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        read_lora(tmp_path)
    with pytest.raises(UserError, match="no modules"):
        write_lora(tmp_path / "empty.safetensors", AdapterState({}))


def test_entry_shapes_and_delta_by_definition():
    entry = LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]]), 0.5)
    assert (entry.rank, entry.scale, entry.shape) == (1, 0.5, (3, 2))
    assert entry.delta().tolist() == [[1.5, 3.0], [2.0, 4.0], [2.5, 5.0]]
    with pytest.raises(ValueError, match="A"):
        LowRank(torch.zeros(2, 3), torch.zeros(3, 4), 1.0)


def test_fingerprint_sees_every_part():
    def one(**change: object) -> str:
        state = random_state(shapes([0], ["self_attn.q"]), metadata={"a": "b"})
        entry = state.entries["blocks.0.attn1.to_q"]
        for name, value in change.items():
            setattr(entry, name, value)
        return state.fingerprint()

    entry = random_state(shapes([0], ["self_attn.q"])).entries["blocks.0.attn1.to_q"]
    prints = {one(), one(alpha=1.0), one(down=entry.down * 1.001), one(up=entry.up * 1.001)}
    assert len(prints) == 4 and one(up=entry.up.double()) in prints


def test_merged_fingerprint_ignores_order_and_sees_multipliers():
    a = merged_fingerprint("base", [("x", 1.0), ("y", 0.5)])
    assert a == merged_fingerprint("base", [("y", 0.5), ("x", 1.0)])
    others = [("base", [("x", 1.0), ("y", 0.6)]), ("other", [("x", 1.0), ("y", 0.5)]), ("base", [("x", 1.0)])]
    assert len({a, *(merged_fingerprint(base, loras) for base, loras in others)}) == 4
    assert merged_fingerprint("base", []) == "base"
