"""Adapters as other tools write them: each file is read with the ΔW that its tool means, or refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lora_cases import FFN, HIDDEN, make_transformer, merge, shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapwan.checkpoints.lora_keys import parse_key
from lapwan.checkpoints.wan_keys import PROJECTIONS
from lapwan.errors import UserError
from lapwan.lora.assign import LoraRequest, assign, report
from lapwan.lora.formats import open_lora, read_lora
from lapwan.lora.state import AdapterState
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import read_adapters
from lapwan.settings.lora_argument import LoraArgument
from lapwan.train.recipe import given_loras

PAIRS = {path: (torch.randn(4, columns) * 0.1, torch.randn(rows, 4) * 0.1)
         for path, (rows, columns) in shapes([0, 2]).items()}


def original(path: str) -> str:
    _, block, inner = path.split(".", 2)
    return f"blocks.{block}." + next(name for name, diffusers in PROJECTIONS.items() if diffusers == inner)


def flat(path: str) -> str:
    return original(path).replace(".", "_")


def file_of(name: Callable[[str], str], down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, Tensor]:
    tensors = {f"{name(path)}.{down}": a.clone() for path, (a, _) in PAIRS.items()}
    return tensors | {f"{name(path)}.{up}": b.clone() for path, (_, b) in PAIRS.items()}


def only(path: Path) -> AdapterState:
    (state,) = read_lora(path).values()
    return state


def same_pairs(state: AdapterState, tolerance: float = 0.0) -> None:
    for path, (a, b) in PAIRS.items():
        assert (state.entries[path].delta(torch.float64) - b.double() @ a.double()).abs().max() <= tolerance, path


@pytest.mark.parametrize("name", [
    *(lambda path, w=w: f"{w}{original(path)}" for w in (
        "pipe.dit.", "dit.", "unet.", "module.", "state_dict.module.", "_orig_mod.", "net.", "my_wrapper.x.",
        "base_model.model.pipe.dit.", "_fsdp_wrapped_module.model.diffusion_model.", "lora_unet.")),
    *(lambda path, w=w: f"{w}{path}" for w in ("pipe.", "base_model.model.transformer.", "module.transformer.")),
    *(lambda path, w=w: f"{w}{flat(path)}" for w in (
        "lora_unet__", "lora_dit_", "lora_wan_model_", "lora_unet_model_diffusion_model_", "base_model.model.", "")),
    lambda path: "lora_unet_" + original(path).replace("blocks.", "blocks_"),  # underscores and dots mixed
    lambda path: "diffusion_model." + original(path).replace("self_attn.", "self_attn_"),
])
def test_any_wrapper_before_modules_of_wan(tmp_path: Path, name: Callable[[str], str]) -> None:
    save_file(file_of(name), tmp_path / "x.safetensors")
    same_pairs(only(tmp_path / "x.safetensors"))


def test_a_wrapper_that_no_tool_is_known_for_is_named(tmp_path: Path) -> None:
    save_file(file_of(lambda path: f"my_wrapper.{original(path)}"), tmp_path / "x_low.safetensors")
    (file,) = open_lora(tmp_path / "x_low.safetensors").values()
    assert file.report() == "x_low.safetensors: 20 x LoRA, low noise, for width 24; wrapper 'my_wrapper.' stripped"


@pytest.mark.parametrize(("down", "up"), [
    ("lora_A", "lora_B"), ("lora_A.default", "lora_B.default"), ("lora_A.my-name.weight", "lora_B.my-name.weight"),
    ("lora_down", "lora_up"), ("lora.down.weight", "lora.up.weight"),
    ("lora_down.default.weight", "lora_up.default.weight"),
])
def test_ends_of_names(tmp_path: Path, down: str, up: str) -> None:
    save_file(file_of(lambda path: f"diffusion_model.{original(path)}", down, up), tmp_path / "x.safetensors")
    same_pairs(only(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("key", [
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",  # of Stable Diffusion
    "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "controlnet.blocks.0.attn1.to_q.lora_A.weight", "vace_blocks.0.self_attn.q.lora_A.weight",
    "lora_unet_vace_blocks_0_self_attn_q.lora_down.weight", "lora_unet_double_blocks_0_self_attn_q.lora_down.weight",
    "encoder.3.blocks.0.self_attn.q.lora_A.weight", "blocks.0.adapter.head.head.lora_A.weight",
    "text_encoder.blocks.0.ffn.0.lora_A.weight", "lora_te_blocks_0_ffn_0.lora_down.weight",
])
def test_modules_of_other_models_are_not_wans(key: str) -> None:
    assert parse_key(key) is None


@pytest.mark.parametrize(("key", "path"), [
    ("lora_unet_blocks_3_self_attn_norm_q.diff", "blocks.3.attn1.norm_q"),
    ("lora_unet_blocks_3_norm3.diff_b", "blocks.3.norm2.bias"),
    ("lora_unet_blocks_3.diff_m", "blocks.3.scale_shift_table"),
    ("lora_unet_blocks_3_modulation.diff", "blocks.3.scale_shift_table"),
    ("diffusion_model.blocks.3.modulation.diff", "blocks.3.scale_shift_table"),
    ("transformer.blocks.3.scale_shift_table.diff", "blocks.3.scale_shift_table"),
    ("lora_unet_head_modulation.diff", "scale_shift_table"), ("lora_unet_head.diff_m", "scale_shift_table"),
    ("lora_unet_head_head.diff_b", "proj_out.bias"), ("lora_unet_time_projection_1.diff",
                                                      "condition_embedder.time_proj"),
    ("unet.blocks.3.self_attn.q.weight.diff", "blocks.3.attn1.to_q"),
    ("unet.blocks.3.self_attn.q.bias.diff", "blocks.3.attn1.to_q.bias"),
    ("lora_unet_patch_embedding.diff", "patch_embedding"),
])
def test_names_of_differences(key: str, path: str) -> None:
    parsed = parse_key(key)
    assert parsed is not None and (parsed.path, parsed.part) == (path, "diff")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16,
                                   torch.float64])
def test_every_dtype_of_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in file_of(lambda p: f"diffusion_model.{p}").items()}
    tensors["diffusion_model.blocks.1.attn1.to_q.diff"] = torch.randn(HIDDEN, HIDDEN).to(dtype)
    tensors["diffusion_model.blocks.1.attn1.to_q.diff_b"] = torch.randn(HIDDEN).to(dtype)
    save_file(tensors, tmp_path / "x_high.safetensors")
    state = only(tmp_path / "x_high.safetensors")
    for path in PAIRS:
        a, b = (tensors[f"diffusion_model.{path}.lora_{x}.weight"].double() for x in "AB")
        assert torch.equal(state.entries[path].delta(torch.float64), b @ a)
    weights = make_transformer(3).state_dict()
    save_file(weights, tmp_path / "dit.safetensors")
    merge(dit=tmp_path / "dit.safetensors", lora=[f"{tmp_path / 'x_high.safetensors'}:0.5"], verify="true",
          output=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")["blocks.1.attn1.to_q.weight"]
    want = weights["blocks.1.attn1.to_q.weight"].double() + 0.5 * tensors[
        "diffusion_model.blocks.1.attn1.to_q.diff"].double()
    assert (got.double() - want).abs().max() < 1e-6
    merge(lora=[f"{tmp_path / 'x_high.safetensors'}:0.5", str(tmp_path / "x_high.safetensors")],
          output=tmp_path / "sum_high.safetensors", dtype="float32")
    assert torch.allclose(only(tmp_path / "sum_high.safetensors").entries["blocks.0.attn1.to_q"].delta(),
                          1.5 * state.entries["blocks.0.attn1.to_q"].delta(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_bias_of_b_is_added_to_the_modules_bias(tmp_path: Path, alpha: float | None) -> None:
    """PEFT's lora_bias: y = W x + b + alpha / r · (B (A x) + bias)."""
    path, bias = "blocks.0.attn1.to_q", torch.randn(HIDDEN).bfloat16()
    a, b = PAIRS[path]
    tensors = {f"transformer.{path}.lora_A.weight": a, f"transformer.{path}.lora_B.weight": b,
               f"transformer.{path}.lora_B.bias": bias}
    if alpha is not None:
        tensors[f"transformer.{path}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x_high.safetensors")
    scale, base = 1.0 if alpha is None else alpha / 4, make_transformer(3).state_dict()
    update = only(tmp_path / "x_high.safetensors").entries[f"{path}.bias"]
    assert (update.delta(torch.float64) - scale * bias.double()).abs().max() < 1e-6
    save_file(base, tmp_path / "dit.safetensors")
    merge(dit=tmp_path / "dit.safetensors", lora=[str(tmp_path / "x_high.safetensors")], verify="true",
          output=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    assert (got[f"{path}.bias"].double() - base[f"{path}.bias"].double() - scale * bias.double()).abs().max() < 1e-6


def peft_folder(folder: Path, config: dict, extra: dict[str, Tensor], pickled: bool) -> Path:
    folder.mkdir()
    tensors = file_of(lambda path: f"base_model.model.{path}") | extra
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **config}))
    return folder


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(("config", "scales"), [
    ({"lora_alpha": 16}, (4.0, 4.0)),
    ({"lora_alpha": 16, "use_rslora": True}, (8.0, 8.0)),
    ({"lora_alpha": 2, "alpha_pattern": {"ffn.net.2": 8}, "rank_pattern": {"ffn.net.2": 4}}, (0.5, 2.0)),
    ({"lora_alpha": 2, "alpha_pattern": {"ffn.net.2": 8}, "use_rslora": True}, (1.0, 4.0)),
    ({"lora_alpha": 8, "alpha_pattern": {r"^blocks\.\d+\.ffn\.net\.2": 4}}, (2.0, 1.0)),
])
def test_peft_folders(tmp_path: Path, config: dict, scales: tuple[float, float], pickled: bool) -> None:
    state = only(peft_folder(tmp_path / "adapter", config, {}, pickled))
    for path, (a, b) in PAIRS.items():
        want = scales[path.endswith("ffn.net.2")] * b.double() @ a.double()
        assert (state.entries[path].delta(torch.float64) - want).abs().max() < 1e-12, path


def test_a_peft_folder_with_dora(tmp_path: Path) -> None:
    extra = {f"base_model.model.{path}.lora_magnitude_vector": torch.rand(b.shape[0]) + 0.5
             for path, (_, b) in PAIRS.items()}
    state = only(peft_folder(tmp_path / "adapter", {"lora_alpha": 8, "use_dora": True}, extra, False))
    weights = make_transformer(3).state_dict()
    for path, (a, b) in PAIRS.items():
        weight = weights[f"{path}.weight"].double()
        moved = weight + 2 * b.double() @ a.double()
        magnitude = extra[f"base_model.model.{path}.lora_magnitude_vector"].double()[:, None]
        want = magnitude * moved / moved.norm(dim=1, keepdim=True) - weight
        assert (state.entries[path].delta(torch.float64, weight) - want).abs().max() < 1e-6
    with pytest.raises(UserError, match=r"use_dora = true, but module '.*' has no magnitude in the file"):
        read_lora(peft_folder(tmp_path / "without", {"use_dora": True}, {}, False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder; .* or a PEFT folder with adapter_model\.safetensors"):
        read_lora(tmp_path / "empty")


@pytest.mark.parametrize("nested", [
    lambda tensors: tensors, lambda tensors: {"state_dict": tensors}, lambda tensors: {"module": tensors, "step": 3},
    lambda tensors: {"lora": {"weights": tensors}, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_files_of_torch_save(tmp_path: Path, nested: Callable[[dict], dict], suffix: str) -> None:
    path = tmp_path / f"x_high{suffix}"
    torch.save(nested(file_of(lambda p: f"pipe.dit.{p}")), path)
    same_pairs(only(path))
    torch.save(nested(file_of(lambda p: f"pipe.dit.{p}")), path, _use_new_zipfile_serialization=False)
    same_pairs(only(path))


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return open, ("trap-was-run", "w")  # type: ignore[return-value]


def test_nothing_in_a_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**file_of(lambda p: p), "trap": Trap()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds more than plain tensors"):
        read_lora(tmp_path / "x.pt")
    assert not (tmp_path / "trap-was-run").exists()
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_lora(tmp_path / "y.pt")


FOREIGN = {
    "k_img": ("blocks.0.cross_attn.k_img.lora_A.weight", torch.ones(4, HIDDEN)),
    "k.img": ("blocks.0.cross_attn.v.img.lora_B.weight", torch.ones(HIDDEN, 4)),
    "norm": ("blocks.0.cross_attn.norm_k_img.diff", torch.ones(HIDDEN)),
    "img_emb": ("img_emb.proj.1.lora_A.weight", torch.ones(4, 8)),
    "diffusers": ("transformer.blocks.0.attn2.add_k_proj.lora_A.weight", torch.ones(4, HIDDEN)),
    "flat": ("lora_unet_blocks_0_cross_attn_k_img.lora_down.weight", torch.ones(4, HIDDEN)),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_the_image_branch_of_wan21_is_dropped_with_a_report_or_refused(tmp_path: Path, capsys, form: str) -> None:
    name, tensor = FOREIGN[form]
    save_file(file_of(lambda p: f"diffusion_model.{p}") | {name: tensor}, tmp_path / "x_high.safetensors")
    assigned = assign([LoraRequest(None, tmp_path / "x_high.safetensors", 1.0)], [NoiseExpert.HIGH])
    report(file for file, _ in assigned[NoiseExpert.HIGH])
    assert ("x_high.safetensors: 20 x LoRA, high noise, for width 24; dropped 1 of Wan2.1's image branch, which Wan2.2 "
            "lacks") in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="would be dropped, which --strict refuses"):
        open_lora(tmp_path / "x_high.safetensors", rule="strict")


def test_deltas_of_zeros_are_dropped_with_a_count(tmp_path: Path, capsys) -> None:
    zeros = {f"diffusion_model.blocks.{block}.norm3.{end}": torch.zeros(HIDDEN) for block in range(3)
             for end in ("diff", "diff_b")}
    one = {"diffusion_model.blocks.1.ffn.0.diff": torch.zeros(FFN, HIDDEN)}
    one["diffusion_model.blocks.1.ffn.0.diff"][-1, -1] = 1e-20
    save_file(file_of(lambda p: f"diffusion_model.{p}") | zeros | one, tmp_path / "x_high.safetensors")
    (file,) = assign([LoraRequest(None, tmp_path / "x_high.safetensors", 1.0)], [NoiseExpert.HIGH])[NoiseExpert.HIGH]
    assert file[0].dropped == {"all zero": 6} and "blocks.1.ffn.net.0.proj" in file[0].modules
    report([file[0]])
    assert "dropped 6 all-zero full deltas" in " ".join(capsys.readouterr().err.split())
    (strict,) = open_lora(tmp_path / "x_high.safetensors", rule="strict").values()
    assert len(strict.modules) == len(file[0].modules) + 6


@pytest.mark.parametrize(("key", "model"), [
    ("vace_blocks.0.self_attn.q", "VACE"), ("ref_conv", "Fun"), ("blocks.0.cam_injector", "camera control"),
    ("face_adapter.fuser_blocks.0.linear1_q", "Animate"), ("audio_injector.injector.0.q", "speech-to-video"),
])
def test_an_adapter_for_another_model_is_named_and_its_common_modules_apply(
    tmp_path: Path, key: str, model: str
) -> None:
    extra = {f"diffusion_model.{key}.lora_{x}.weight": torch.ones(HIDDEN, HIDDEN) for x in "AB"}
    lora = tmp_path / "x_high.safetensors"
    save_file(file_of(lambda p: f"diffusion_model.{p}") | extra, lora)
    with pytest.raises(UserError, match=rf"{model}.*--common-modules") as caught:
        open_lora(lora)
    assert "did you mean" not in str(caught.value)
    save_file(make_transformer(3).state_dict(), tmp_path / "dit.safetensors")
    for options, works in (({}, False), ({"strict": "true"}, False), ({"common_modules": "true"}, True)):
        if works:
            merge(dit=tmp_path / "dit.safetensors", lora=[str(lora)], output=tmp_path / "out.safetensors", **options)
        else:
            with pytest.raises(UserError, match=model):
                merge(dit=tmp_path / "dit.safetensors", lora=[str(lora)], output=tmp_path / "out.safetensors",
                      **options)
    (file,) = open_lora(lora, rule="common").values()
    assert sum(file.dropped.values()) == 2 and model in next(iter(file.dropped))


@pytest.mark.parametrize(("width", "words"), [
    (5120, "A14B or Wan2.1 14B"), (3072, "TI2V-5B"), (1536, "Wan2.1 1.3B"), (64, "width 64")])
@pytest.mark.parametrize("module", ["self_attn.q", "cross_attn.o", "ffn.0", "ffn.2"])
def test_the_model_that_a_lora_is_for(tmp_path: Path, width: int, words: str, module: str) -> None:
    stem, (rows, columns) = f"diffusion_model.blocks.0.{module}", {
        "ffn.0": (96, width), "ffn.2": (width, 96)}.get(module, (width, width))
    save_file({f"{stem}.lora_A.weight": torch.ones(1, columns), f"{stem}.lora_B.weight": torch.ones(rows, 1)},
              tmp_path / "x_high.safetensors")
    save_file(make_transformer(3).state_dict(), tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=rf"made for another model: {words}"):
        merge(dit=tmp_path / "dit.safetensors", lora=[str(tmp_path / "x_high.safetensors")],
              output=tmp_path / "out.safetensors")


# Names of other tools' files for models of one transformer: TI2V-5B, Wan2.1 14B and 1.3B.
PEERS = {
    "musubi-tuner": lambda p, part: f"lora_unet_{p.replace('.', '_')}.lora_{'down' if part == 'A' else 'up'}.weight",
    "ComfyUI": lambda p, part: f"diffusion_model.{p}.lora_{'down' if part == 'A' else 'up'}.weight",
    "ai-toolkit": lambda p, part: f"diffusion_model.{p}.lora_{part}.weight",
    "DiffSynth": lambda p, part: f"{p}.lora_{part}.default.weight",
    "DiffSynth, whole pipe": lambda p, part: f"pipe.dit.{p}.lora_{part}.default.weight",
    "diffusers": lambda p, part: f"transformer.{diffusers_path(p)}.lora_{part}.weight",
}


def diffusers_path(original: str) -> str:
    """`blocks.0.self_attn.q` -> `blocks.0.attn1.to_q`."""
    _, block, inner = original.split(".", 2)
    return f"blocks.{block}.{PROJECTIONS[inner]}"


@pytest.mark.parametrize("name", ["wan22_5b", "low_motion", "high_quality"])
@pytest.mark.parametrize("peer", PEERS)
def test_loras_for_one_transformer_are_for_it_whatever_their_names_say(
    tmp_path: Path, ti2v: ModelSpec, peer: str, name: str
) -> None:
    """Of generate, merge and a training over them: the same modules with the same ΔW as our own file gives."""
    shapes, generator = {"self_attn.q": (48, 48), "cross_attn.o": (48, 48), "ffn.0": (64, 48), "ffn.2": (48, 64)}, (
        torch.Generator().manual_seed(0))
    pairs = {f"blocks.1.{module}": (
        torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator))
        for module, (rows, columns) in shapes.items()}
    path = tmp_path / f"{name}.safetensors"
    save_file({PEERS[peer](module, part): tensor for module, pair in pairs.items()
               for part, tensor in zip("AB", pair, strict=True)}, path)
    _, adapters = read_adapters(Base(ti2v), [LoraArgument(path=path)], None)
    [use] = adapters.loras[NoiseExpert.HIGH]
    assert set(use.state.entries) == set(map(diffusers_path, pairs))
    for module, (down, up) in pairs.items():
        torch.testing.assert_close(use.state.entries[diffusers_path(module)].delta(torch.float32), up @ down)
    assert set(given_loras({NoiseExpert.HIGH: path}, Base(ti2v), "default")) == {NoiseExpert.HIGH}
    merge(model=str(ti2v.path), lora=[str(path)], output=tmp_path / "merged")
    assert (tmp_path / "merged" / "model_index.json").is_file()


def test_a_lora_of_a_noise_expert_on_one_transformer_is_warned_of(tmp_path: Path, ti2v: ModelSpec, capsys) -> None:
    """By its metadata; a file of two is refused."""
    stem, pair = "blocks.1.self_attn.q", (torch.ones(2, 48), torch.ones(48, 2))
    save_file({f"diffusion_model.{stem}.lora_{part}.weight": t for part, t in zip("AB", pair, strict=True)},
              tmp_path / "a.safetensors", {"modelspec.timestep_range": "0,875"})
    _, adapters = read_adapters(Base(ti2v), [LoraArgument(path=tmp_path / "a.safetensors")], None)
    assert len(adapters.loras[NoiseExpert.HIGH]) == 1
    assert "is for the low noise expert of a model of two (its metadata says so)" in " ".join(
        capsys.readouterr().err.split())
    save_file({f"diffusion_model.transformer_{n}.{stem}.lora_{part}.weight": t.clone() for n in (1, 2)
               for part, t in zip("AB", pair, strict=True)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds a LoRA for each of two noise experts, but this model has one"):
        read_adapters(Base(ti2v), [LoraArgument(path=tmp_path / "b.safetensors")], None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named_before_anything_is_written(tmp_path: Path, value: float) -> None:
    tensors = file_of(lambda p: f"diffusion_model.{p}")
    name = "diffusion_model.blocks.2.ffn.net.2.lora_B.weight"
    tensors[name][3, 1] = value
    save_file(tensors, tmp_path / "x_high.safetensors")
    for options in ({}, {"rank": "2"}, {"dtype": "float16"}):
        with pytest.raises(UserError, match=rf"'{name}' holds NaN or infinity"):
            merge(lora=[str(tmp_path / "x_high.safetensors")], output=tmp_path / "out.safetensors", **options)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("options", [{}, {"fold_alpha": "true"}, {"rank": "2"}])
def test_a_dtype_that_overflows_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    tensors = file_of(lambda p: f"diffusion_model.{p}")
    tensors = {name: tensor * 1e6 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x_high.safetensors")
    with pytest.raises(UserError, match=r"float16 cannot hold \(at most 65504\); use --dtype bfloat16 or float32"):
        merge(lora=[str(tmp_path / "x_high.safetensors")], output=tmp_path / "out.safetensors", dtype="float16",
              **options)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_text_encoders_lora_is_dropped_with_its_count(tmp_path: Path) -> None:
    tensors = file_of(lambda p: f"lora_unet_{flat(p)}", "lora_down.weight", "lora_up.weight")
    for stem in ("lora_te1_encoder_block_0_layer_0_SelfAttention_q", "text_encoder.encoder.block.0.layer.0.q"):
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "x_high.safetensors")
    (file,) = open_lora(tmp_path / "x_high.safetensors").values()
    assert file.dropped == {"a text encoder's LoRA, which lapwan does not apply": 4} and file.loses
    same_pairs(file.read())
    with pytest.raises(UserError, match=r"lora_te1_.*text encoder's LoRA.*which --strict refuses"):
        open_lora(tmp_path / "x_high.safetensors", rule="strict")


def test_dora_of_some_modules_only_is_refused_if_the_configuration_says_dora(tmp_path: Path) -> None:
    tensors = file_of(lambda p: f"base_model.model.{p}")
    first, *_ = PAIRS
    tensors[f"base_model.model.{first}.lora_magnitude_vector"] = torch.ones(shapes()[first][0])
    with pytest.raises(UserError, match=r"use_dora = true, but module '.*' has no magnitude"):
        save_file(tensors, tmp_path / "x.safetensors",
                  metadata={"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})})
        open_lora(tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "x.safetensors")
    (file,) = open_lora(tmp_path / "x.safetensors").values()
    assert [path for path, module in file.modules.items() if module.kind == "DoRA"] == [first]


@pytest.mark.parametrize(("kind", "parts"), [
    ("LOKR", {"lokr_w1": (4, 4), "lokr_w2": (6, 6)}),
    ("LOKR", {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)}),
    ("LOHA", {"hada_w1_a": (24, 2), "hada_w1_b": (2, 24), "hada_w2_a": (24, 2), "hada_w2_b": (2, 24)}),
])
@pytest.mark.parametrize("end", ["", ".default", ".default.weight"])
def test_lokr_and_loha_of_peft_are_scaled_by_its_configuration(
    tmp_path: Path, kind: str, parts: dict[str, tuple[int, int]], end: str
) -> None:
    """PEFT writes no alpha: it scales by alpha / r of the configuration, also where both factors are whole."""
    tensors = {f"base_model.model.blocks.0.attn1.to_q.{part}{end}": torch.randn(shape) for part, shape in parts.items()}
    folder = tmp_path / "adapter_high"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": kind, "r": 2, "alpha": 6, "alpha_pattern": {"to_k": 100}, "rank_pattern": {"attn1.to_q": 4}}))
    (file,) = open_lora(folder).values()
    assert file.noise_expert is NoiseExpert.HIGH  # by the folder's name
    values = [tensor.double() for tensor in tensors.values()]
    if kind == "LOHA":
        want = (values[0] @ values[1]) * (values[2] @ values[3])
    else:
        want = torch.kron(values[0], values[1] if len(values) == 2 else values[1] @ values[2])
    got = file.modules["blocks.0.attn1.to_q"].entry().delta(torch.float64)
    assert (got - 6 / 4 * want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize(("key", "words"), [
    ("ia3_l", "IA3"), ("on_input", "IA3"), ("vera_lambda_d", "VeRA"), ("hra_u", "HRA"), ("bone_block", "Bone"),
    ("oft_blocks", "OFT or BOFT"), ("boft_R", "OFT or BOFT"), ("set_weight", "a replacement of a whole weight"),
    ("modules_to_save.default.weight", "modules_to_save"), ("weight", "a whole weight beside an adapter"),
    ("lora_embedding_A", "a LoRA of an embedding"),
])
def test_adapters_of_other_kinds_are_refused_by_name(tmp_path: Path, key: str, words: str) -> None:
    tensors = file_of(lambda p: f"base_model.model.{p}")
    tensors[f"base_model.model.blocks.1.attn1.to_q.{key}"] = torch.ones(4)
    save_file(tensors, tmp_path / "x_high.safetensors")
    with pytest.raises(UserError, match=words):
        open_lora(tmp_path / "x_high.safetensors")


def test_names_that_mean_what_lapwan_reads(tmp_path: Path) -> None:
    """Pairs of old diffusers, norms of LyCORIS, a Linear as a convolution of kernel 1, alpha by PEFT's name, and the
    base's weights, saved beside the adapter."""
    tensors = file_of(lambda p: f"transformer.{p}", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
    tensors = {name: tensor[..., None, None] for name, tensor in tensors.items()}
    tensors |= {f"transformer.{path}.lora_alpha": torch.tensor([4.0]) for path in PAIRS}
    tensors |= {"lycoris_blocks_0_norm3.w_norm": torch.ones(HIDDEN),
                "lycoris_blocks_0_norm3.b_norm": torch.ones(HIDDEN),
                "transformer.blocks.0.attn1.to_q.base_layer.weight": torch.ones(HIDDEN, HIDDEN)}
    save_file(tensors, tmp_path / "x_high.safetensors")
    (file,) = open_lora(tmp_path / "x_high.safetensors").values()
    assert file.dropped == {"the base model's weights": 1}
    assert {path for path, module in file.modules.items() if module.kind == "full delta"} == {
        "blocks.0.norm2", "blocks.0.norm2.bias"}
    assert all(file.modules[path].stackable for path in PAIRS)
    same_pairs(file.read())


def test_an_empty_tensor_is_named(tmp_path: Path) -> None:
    tensors = file_of(lambda p: f"diffusion_model.{p}")
    tensors |= {"diffusion_model.blocks.1.attn1.to_q.lora_A.weight": torch.empty(0, HIDDEN),
                "diffusion_model.blocks.1.attn1.to_q.lora_B.weight": torch.empty(HIDDEN, 0)}
    save_file(tensors, tmp_path / "x_high.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.attn1\.to_q\.lora_A\.weight' \[0, 24\] is empty"):
        open_lora(tmp_path / "x_high.safetensors")
