"""Layouts of checkpoints that other tools write: each gives the tensors that its formula says, or is refused by kind.

References are computed from the stored codes and scales in fp64.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from adapter_cases import MODULES, random_lora
from command_line import Ran
from layout_cases import (
    BROKEN,
    F8,
    HIGH,
    LOW,
    SCALES,
    Tensors,
    dequantised,
    files_of,
    is_linear,
    original,
    pair_of,
    per_group,
    per_tensor,
    read_all,
    scaled,
    stored,
    with_config,
    write_gguf,
    write_q8,
    write_scaled,
)
from safetensors.torch import load_file, save_file

from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.fingerprints import checkpoint_fingerprint
from lapwan.checkpoints.tensors import load_rows
from lapwan.checkpoints.wan_keys import (
    tensor_to_diffusers,
    transformer_shapes,
)
from lapwan.checkpoints.weights import read_weights, rounding_steps
from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.models.base import Base, resolve_base
from lapwan.models.spec import ModelSpec, component_config, read_spec, weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.wan.quantise.load import Recipe
from lapwan.wan.text import load_text_encoder


def assert_equal(ours: Tensors, meant: Tensors) -> None:
    assert ours.keys() == meant.keys()
    for name, value in meant.items():
        assert torch.equal(ours[name].float(), value.float()), name


@pytest.mark.parametrize("dialect", ["a", "b"])
@pytest.mark.parametrize("rule", SCALES)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_fp8_with_scales(dialect, rule, prefix, tiny_t2v, tmp_path) -> None:
    tensors, meant = scaled(stored(tiny_t2v, HIGH), dialect, SCALES[rule], prefix)
    save_file({n: v.contiguous() for n, v in tensors.items()}, tmp_path / "a.safetensors")
    assert_equal(read_all(tmp_path / "a.safetensors"), meant)


def test_plain_fp8_is_a_cast(tiny_t2v, tmp_path) -> None:
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        tensors = {n: v.to(kind) if is_linear(n) else v.bfloat16() for n, v in stored(tiny_t2v, LOW).items()}
        save_file({original(n): v for n, v in tensors.items()}, tmp_path / "a.safetensors")
        assert_equal(read_all(tmp_path / "a.safetensors"), tensors)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_gguf(kind, tiny_t2v, tmp_path) -> None:
    for prefix in ("", "model.diffusion_model."):
        meant = write_gguf(tmp_path / "a.gguf", stored(tiny_t2v, HIGH), gguf.GGMLQuantizationType[kind], prefix)
        assert_equal(read_all(tmp_path / "a.gguf"), meant)


def test_every_gguf_type_that_its_library_knows(tmp_path) -> None:
    """Codes of each type, a tile of rows, and the steps between the values; other types are refused by name."""
    generator = np.random.default_rng(0)
    read = []
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name in ("F16", "F32", "F64", "BF16") or (kind.name.startswith("I") and kind.name[1:].isdigit()):
            continue
        codes = generator.integers(0, 60, (4, 512 // block * size), dtype=np.uint8)  # small: no NaN among the scales
        writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "wan")
        writer.add_tensor("a.weight", codes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:
            wanted = torch.from_numpy(np.array(gguf.dequantize(codes, kind), dtype=np.float32)).nan_to_num()
        except NotImplementedError:
            with pytest.raises(UserError, match=f"GGUF type {kind.name}"):
                read_weights(tmp_path / "a.gguf")
            continue
        file = read_weights(tmp_path / "a.gguf")
        rows = load_rows(file, "a.weight", 1, 2)
        assert torch.equal(rows.nan_to_num(), wanted[1:3]), kind.name
        assert rounding_steps(file, "a.weight", rows, 1).shape == rows.shape
        read.append(kind.name)
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q8_0"} <= set(read)


def test_any_part_of_a_tensor_is_the_same_numbers(tiny_t2v, tmp_path) -> None:
    """A merge reads tiles of rows that do not end where a group or a block ends."""
    weights = {n: v for n, v in stored(tiny_t2v, HIGH).items() if n.startswith("blocks.0.ffn")}
    tensors, _ = scaled(weights, "a", per_group)
    save_file({n: v.contiguous() for n, v in tensors.items()}, tmp_path / "a.safetensors")
    write_gguf(tmp_path / "a.gguf", weights, gguf.GGMLQuantizationType.Q8_0)
    for file in (read_weights(tmp_path / "a.safetensors"), read_weights(tmp_path / "a.gguf")):
        whole = bytes(file.read("blocks.0.ffn.0.weight"))
        for first, count in ((0, 4), (4 * 7, 4 * 1001), (4 * 190, 4 * 5), (len(whole) - 4, 4)):
            assert bytes(file.read("blocks.0.ffn.0.weight", first, count)) == whole[first : first + count]


@pytest.mark.parametrize(("write", "suffix"), [(write_scaled, ".safetensors"), (write_q8, ".gguf")])
def test_a_base_of_quantised_files(write, suffix, own_cache, tiny_t2v, tmp_path) -> None:
    """The transformer has the dequantised weights; quantised for training too, and with a LoRA merged at load."""
    base, meant = pair_of(tiny_t2v, tmp_path / "files", write, suffix)
    loaded = base.load(LOW).transformer
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, meant[LOW][name].float()), name
    trained = base.load(LOW, recipe=Recipe(Precision.INT8), dtype=torch.bfloat16).transformer
    row = meant[LOW]["blocks.3.ffn.net.2.weight"].float()
    layer = trained.get_submodule("blocks.3.ffn.net.2")
    assert torch.equal(layer.codes, torch.round(row / (row.abs().amax(1, keepdim=True) * (1 / 127))).to(torch.int8))
    assert base.fingerprint(LOW) != tiny_t2v.fingerprint(LOW)


def test_both_dialects_have_one_fingerprint(tiny_t2v, tmp_path) -> None:
    names = []
    for dialect in ("a", "b"):
        tensors, _ = scaled(stored(tiny_t2v, HIGH), dialect, per_tensor)
        names.append(tmp_path / f"{dialect}.safetensors")
        save_file(tensors, names[-1])
    changed = {**tensors, "blocks.0.ffn.0.weight_scale": tensors["blocks.0.ffn.0.weight_scale"] * 2}
    save_file(changed, tmp_path / "c.safetensors")
    a, b, c = (checkpoint_fingerprint([f]) for f in (*names, tmp_path / "c.safetensors"))
    assert a == b != c


def refused(tensors: Tensors, tmp_path: Path, *words: str, metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "bad.safetensors")
    assert all(word in str(error.value) for word in words), error.value


def test_other_quantised_formats_are_refused_by_kind(tmp_path) -> None:
    name, codes = "blocks.0.ffn.0", torch.zeros(4, 8, dtype=F8)
    one, w = torch.tensor(1.0), torch.ones(4, 8)
    refused({f"{name}.weight": w, f"{name}.scale_weight": one * 2}, tmp_path, "scale_weight", "F32, not fp8")
    refused({f"{name}.scale_weight": one}, tmp_path, "no such weight")
    refused({f"{name}.weight": codes, f"{name}.scale_weight": torch.ones(3)}, tmp_path, "[3]", "[4, 8]")
    refused({f"{name}.weight": codes, "scaled_fp8": torch.zeros(2, dtype=F8)}, tmp_path, "1 weights lack theirs")
    partly = {f"{name}.weight": codes, f"{name}.weight_scale": one, "blocks.1.ffn.0.weight": codes.clone()}
    refused(partly, tmp_path, "1 weights lack theirs", "blocks.1")
    refused({f"{name}.weight": codes.view(torch.uint8), f"{name}.weight_scale_2": one}, tmp_path, "nvfp4")
    refused({f"{name}.weight": torch.zeros(4, 8, dtype=torch.int8)}, tmp_path, "I8")
    quant = torch.tensor(list(b'{"format":"mxfp8"}'), dtype=torch.uint8)
    refused({f"{name}.weight": codes, f"{name}.weight_scale": one, f"{name}.comfy_quant": quant}, tmp_path, "mxfp8")
    layers = json.dumps({"layers": {name: {"format": "svdquant_int4"}}})
    refused({f"{name}.weight": codes, f"{name}.weight_scale": one}, tmp_path, "svdquant_int4",
            metadata={"_quantization_metadata": layers})


def test_a_scale_of_one_beside_an_unquantised_weight_changes_nothing(tmp_path) -> None:
    for one in (torch.ones(()), torch.ones(1, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float16)):
        save_file({"a.weight": torch.ones(4, 8) * 3, "a.scale_weight": one}, tmp_path / "a.safetensors")
        assert_equal(read_all(tmp_path / "a.safetensors"), {"a.weight": torch.ones(4, 8) * 3})


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_downloads_are_named(kind, tmp_path) -> None:
    (tmp_path / "a.safetensors").write_bytes(BROKEN[kind])
    with pytest.raises(UserError, match=kind):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["Git LFS pointer", "HTML page", "empty file"])
def test_a_broken_pth_is_named(kind, tiny_t2v, tmp_path) -> None:
    (tmp_path / "vae.pth").write_bytes(BROKEN[kind])
    with pytest.raises(UserError, match=kind):
        resolve_base(files_of(tiny_t2v, high=tiny_t2v.component(HIGH), low=tiny_t2v.component(LOW),
                              vae=tmp_path / "vae.pth"))


def test_a_cut_gguf_file_is_named(tiny_t2v, tmp_path) -> None:
    write_q8(tmp_path / "a.gguf", stored(tiny_t2v, HIGH))
    whole = (tmp_path / "a.gguf").read_bytes()
    for size in (30, 2000, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "a.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated"):
            read_weights(tmp_path / "a.gguf")


def without_weights(spec: ModelSpec, root: Path, part: str) -> Path:
    """A model folder without the weights of one component, whose folder is returned."""
    root.mkdir()
    for item in spec.path.iterdir():
        if item.name != part:
            (root / item.name).symlink_to(item)
    (root / part).mkdir()
    shutil.copy(spec.path / part / "config.json", root / part)
    return root / part


@pytest.mark.parametrize("names", [
    ("diffusion_pytorch_model.fp16.safetensors",),
    tuple(f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)),
    tuple(f"diffusion_pytorch_model-0000{n}-of-00002.bf16.safetensors" for n in (1, 2)),
])
@pytest.mark.parametrize("index", [None, "diffusion_pytorch_model.safetensors.index.{}.json",
                                   "diffusion_pytorch_model.safetensors.{}.index.json"])
def test_variants_of_a_diffusers_folder(names, index, tiny_t2v, tmp_path) -> None:
    part = without_weights(tiny_t2v, tmp_path / "m", "transformer")
    tensors = list(stored(tiny_t2v, HIGH).items())
    half = len(tensors) // len(names) + 1
    where = {}
    for number, name in enumerate(names):
        shard = dict(tensors[number * half : (number + 1) * half])
        save_file(shard, part / name)
        where |= dict.fromkeys(shard, name)
    if index is not None:
        variant = "fp16" if "fp16" in names[0] else "bf16"
        (part / index.format(variant)).write_text(json.dumps({"weight_map": where}))
    spec = read_spec(tmp_path / "m")
    for name, parameter in Base(spec).load(HIGH).transformer.named_parameters():
        assert torch.equal(parameter, dict(tensors)[name]), name
    assert spec.fingerprint(HIGH) == tiny_t2v.fingerprint(HIGH)


def test_of_several_variants_the_plain_one(tiny_t2v, tmp_path) -> None:
    part = without_weights(tiny_t2v, tmp_path / "m", "transformer")
    for variant in ("fp16", "bf16"):
        save_file(stored(tiny_t2v, LOW), part / f"diffusion_pytorch_model.{variant}.safetensors")
    with pytest.raises(UserError, match="bf16, fp16; keep one"):
        weight_files(part)
    save_file(stored(tiny_t2v, HIGH), part / "diffusion_pytorch_model.safetensors")
    assert [f.name for f in weight_files(part)] == ["diffusion_pytorch_model.safetensors"]


def text_weights(spec: ModelSpec) -> Tensors:
    (file,) = weight_files(spec.path / "text_encoder")
    return load_file(file)


GGUF_T5 = {"SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k", "SelfAttention.v": "attn_v",
           "SelfAttention.o": "attn_o", "SelfAttention.relative_attention_bias": "attn_rel_b",
           "0.layer_norm": "attn_norm", "1.layer_norm": "ffn_norm", "DenseReluDense.wi_0": "ffn_gate",
           "DenseReluDense.wi_1": "ffn_up", "DenseReluDense.wo": "ffn_down"}


def gguf_t5(name: str) -> str:
    outer = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    if name in outer:
        return outer[name]
    block = name.split(".")[2]
    (inner,) = [ours for theirs, ours in GGUF_T5.items() if f"{theirs}.weight" in name]
    return f"enc.blk.{block}.{inner}.weight"


@pytest.mark.parametrize("kind", ["spiece_model", "fp8_scaled", "e4m3", "gguf"])
def test_text_encoders(kind, tiny_t2v, tmp_path) -> None:
    meant, tensors = text_weights(tiny_t2v), {}
    path = tmp_path / ("a.gguf" if kind == "gguf" else "a.safetensors")
    writer = gguf.GGUFWriter(str(path), "t5encoder")
    for name, value in list(meant.items()):
        matrix = value.dim() == 2 and "shared" not in name and "relative" not in name
        tensors[name] = value
        if kind == "gguf":
            writer.add_tensor(gguf_t5(name), value.numpy())
        elif matrix and kind == "e4m3":
            tensors[name] = value.to(F8)
            meant[name] = tensors[name].float()
        elif matrix and kind == "fp8_scaled":
            scale = per_tensor(value)
            tensors[name] = (value / scale).to(F8)
            tensors[name.replace(".weight", ".scale_weight")] = scale
            meant[name] = dequantised(tensors[name], scale)
    if kind == "spiece_model":
        tensors["spiece_model"] = torch.zeros(100, dtype=torch.uint8)
    if kind == "fp8_scaled":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=F8)
    if kind == "gguf":
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        save_file(tensors, path)
    base = resolve_base(files_of(tiny_t2v, high=tiny_t2v.component(HIGH), low=tiny_t2v.component(LOW),
                                 text_encoder=path))
    meant["encoder.embed_tokens.weight"] = meant["shared.weight"]
    model = load_text_encoder(base.spec).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, meant[name]), name


def test_high_and_low_the_wrong_way_round(tiny_t2v, tmp_path) -> None:
    for names, metadata in (
        (("wan2.2_t2v_high_noise_14B", "wan2.2_t2v_low_noise_14B"), ({}, {})),
        (("HighNoise/model", "LowNoise/model"), ({}, {})),
        (("a", "b"), ({"lapwan.noise_expert": "high"}, {"lapwan.noise_expert": "low"})),
    ):
        paths = [with_config(tiny_t2v, (tmp_path / f"{name}.safetensors").parent) / f"{Path(name).name}.safetensors"
                 for name in names]
        for path, noise_expert, extra in zip(paths, NoiseExpert, metadata, strict=True):
            save_file(stored(tiny_t2v, noise_expert), path, extra)
        resolve_base(files_of(tiny_t2v, high=paths[0], low=paths[1]))
        with pytest.raises(UserError, match="wrong way round"):
            resolve_base(files_of(tiny_t2v, high=paths[1], low=paths[0]))


def test_heads_of_another_width_need_a_config(tiny_t2v, tmp_path) -> None:
    """192 is no multiple of 128: one head of 192 would generate noise without a word."""
    save_file(stored(tiny_t2v, HIGH), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"config\.json beside it"):
        resolve_base(files_of(tiny_t2v, high=tmp_path / "a.safetensors", low=tmp_path / "a.safetensors"))


def test_folders_that_are_no_components_are_named(tiny_t2v, tmp_path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"folder without config\.json.*Wan2\.1_VAE\.pth"):
        resolve_base(files_of(tiny_t2v, high=tiny_t2v.component(HIGH), low=tiny_t2v.component(LOW), vae=tmp_path))


@pytest.mark.parametrize(("write", "suffix"), [(write_scaled, ".safetensors"), (write_q8, ".gguf")])
def test_merging_into_a_quantised_file(write, suffix, lapwan: Callable[..., Ran], tiny_t2v, tmp_path) -> None:
    """Refused with the line that works; with it, each weight is its dequantised one plus ΔW, within one ulp."""
    dit = tmp_path / f"dit_high{suffix}"
    meant = write(dit, stored(tiny_t2v, HIGH))
    state = random_lora(1)
    write_lora(tmp_path / "l_high_noise.safetensors", state)
    line = ("merge", "--dit", str(dit), "--lora", "l_high_noise.safetensors", "-o", "m.safetensors", "--verify")
    ran = lapwan(*line, "--dry-run")
    assert ran.code == 2 and "add --dtype bfloat16" in ran.err
    ran = lapwan(*line, "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    merged = {tensor_to_diffusers(n): v for n, v in load_file(tmp_path / "m.safetensors").items()}
    assert merged.keys() == meant.keys()
    for name, value in meant.items():
        if not is_linear(name):
            assert torch.equal(merged[name], value), name
            continue
        module = name.removesuffix(".weight")
        exact = value.double()
        if module in MODULES:
            exact = exact + state.entries[module].delta(torch.float64)
        assert merged[name].dtype == torch.bfloat16
        assert ((merged[name].double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all(), name


def test_the_shapes_of_a_transformer_are_those_of_diffusers(tiny_t2v, tiny_i2v) -> None:
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    for spec in (tiny_t2v, tiny_i2v):
        config = component_config(spec.component(HIGH))
        with init_empty_weights():
            model = WanTransformer3DModel.from_config(config)
        assert transformer_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("blocks.5.attn1.to_k.bias"), "lacks 1 of 231 tensors"),
    (lambda t: t.update({"vace_blocks.0.x.weight": torch.ones(2)}), "has 1 tensors that T2V-A14B does not"),
    (lambda t: t.update({"proj_out.bias": torch.ones(2)}), r"'proj_out.bias' has shape \[2\]"),
])
def test_incomplete_weights_are_refused_from_the_header(change, message, tiny_t2v, tmp_path) -> None:
    part = without_weights(tiny_t2v, tmp_path / "m", "transformer")
    tensors = stored(tiny_t2v, HIGH)
    change(tensors)
    save_file(tensors, part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=message):
        resolve_base(str(tmp_path / "m"))


def test_gguf_needs_its_package(tiny_t2v, tmp_path, monkeypatch) -> None:
    write_q8(tmp_path / "a.gguf", stored(tiny_t2v, HIGH))
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'lapwan\[gguf\]'"):
        read_weights(tmp_path / "a.gguf")


@pytest.mark.parametrize(("write", "suffix"), [(write_scaled, ".safetensors"), (write_q8, ".gguf")])
def test_training_over_quantised_files(write, suffix, succeed, t2v_cache, tiny_t2v, tmp_path) -> None:
    with_config(tiny_t2v, tmp_path)
    for noise_expert in NoiseExpert:
        write(tmp_path / f"{noise_expert.value}{suffix}", stored(tiny_t2v, noise_expert))
    files = files_of(tiny_t2v, high=tmp_path / f"high{suffix}", low=tmp_path / f"low{suffix}")
    lines = [f"{key} = {json.dumps(value)}" for key, value in files.model_dump(mode="json", exclude_none=True).items()]
    (tmp_path / "c.toml").write_text("\n".join(["[model]", *lines, "[data]", f"cache = {json.dumps(str(t2v_cache))}"]))
    line = ("train-lora", "--config", "c.toml", "-o", "run", "--steps", "1", "--set", "dtype=int8")
    succeed(*line, "--dry-run")
    assert not (tmp_path / "run").exists()
    succeed(*line)
    made = sorted((tmp_path / "run").glob("*_noise.safetensors"))
    assert [read_header(f).metadata["lapwan.base_fingerprint"] for f in made] == [
        checkpoint_fingerprint([tmp_path / f"{e.value}{suffix}"]) for e in NoiseExpert]
