"""`lapwan merge --extract`: the difference of two models as a LoRA."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import pytest
import torch
from lora_cases import merge, random_state, shapes
from safetensors.torch import load_file, save_file

from lapwan.checkpoints.tensors import load_tensor, spacing
from lapwan.checkpoints.wan_keys import PROJECTIONS, to_original
from lapwan.checkpoints.weights import read_weights
from lapwan.errors import UserError
from lapwan.lora.extract import RankChoice, extract
from lapwan.lora.formats import open_lora, read_lora
from lapwan.lora.state import LowRank
from lapwan.lora.svd import leading_directions
from lapwan.names import NoiseExpert

WIDE, SIDE = 768, 640


def model_file(path: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    save_file({f"{name}.weight": value.to(dtype).contiguous() for name, value in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def update() -> dict[str, torch.Tensor]:
    """Base W and update of rank 5 of one large Linear; too large for the exact SVD."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(WIDE, SIDE, generator=generator) * 0.03
    delta = torch.randn(WIDE, 5, generator=generator) @ torch.randn(5, SIDE, generator=generator) * 3e-3
    return {"base": base, "delta": delta}


def extracted(folder: Path, base, tuned, choice=RankChoice(16), dtypes=(torch.float32, torch.float32), **more):
    name = "blocks.0.self_attn.q"
    files = [model_file(folder / f"{n}.safetensors", {name: value}, dtype)
             for n, value, dtype in (("tuned", tuned, dtypes[0]), ("base", base, dtypes[1]))]
    return extract([read_weights(files[0])], [read_weights(files[1])], choice, **more)


def test_leading_directions_are_those_of_an_exact_svd():
    generator = torch.Generator().manual_seed(0)
    decay = torch.randn(500, 500, generator=generator) * (torch.arange(1, 501) ** -1.0)
    matrix = decay @ torch.randn(500, 700, generator=generator) / 20
    u, v, s = leading_directions(matrix, 24)
    exact = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(s[:24].double(), exact[:24], rtol=5e-3, atol=0)
    best = math.sqrt(float(exact[24:].square().sum()))
    left = float((matrix - (u[:, :24] * s[:24]) @ v[:, :24].T).norm())
    assert best <= left * (1 + 1e-6) <= 1.01 * best


def test_a_low_rank_update_is_recovered_to_rounding(tmp_path, update):
    result = extracted(tmp_path, update["base"], update["base"] + update["delta"])
    entry = result.state.entries["blocks.0.attn1.to_q"]
    assert isinstance(entry, LowRank) and entry.rank == 5
    stored = (update["base"] + update["delta"]) - update["base"]  # fp32 rounds the sum
    assert float((entry.delta() - stored).norm() / stored.norm()) < 2e-6
    assert result.relative_error < 2e-6


@pytest.mark.parametrize("base_is_rounded", [True, False])
def test_the_floor_is_the_measured_rounding_noise(tmp_path, update, base_is_rounded):
    """Of a base that was rounded itself, and of one in bf16 from which the training started."""
    start = update["base"] if base_is_rounded else update["base"].bfloat16().float()
    result = extracted(tmp_path, update["base"], start + update["delta"], RankChoice(64, 0.95),
                       (torch.bfloat16, torch.bfloat16))
    (module,) = result.modules
    difference = (start + update["delta"]).bfloat16().float() - update["base"].bfloat16().float()
    noise = float((difference - update["delta"]).double().square().sum())
    assert module.floor == pytest.approx(noise, rel=0.1)
    assert module.signal == pytest.approx(float(update["delta"].double().square().sum()), rel=0.02)
    assert module.rank <= 5 and module.captured(module.rank) / module.signal >= 0.95
    assert module.captured(5) / module.signal == pytest.approx(1.0, abs=0.01)


def test_a_cast_alone_is_no_update(tmp_path, update):
    result = extracted(tmp_path, update["base"], update["base"], dtypes=(torch.bfloat16, torch.float32))
    assert (result.only_rounding, result.modules) == (1, [])
    same = extracted(tmp_path, update["base"], update["base"], dtypes=(torch.bfloat16, torch.bfloat16))
    assert (same.unchanged, same.modules) == (1, [])


def test_energy_chooses_the_smallest_rank_that_keeps_it(tmp_path):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 200, generator=generator)).Q for n in (WIDE, SIDE))
    squares = 0.97 ** torch.arange(200, dtype=torch.float64)
    delta = (left * squares.sqrt().float()) @ right.T
    share = squares.cumsum(0) / squares.sum()
    for energy in (0.5, 0.9, 0.98):
        result = extracted(tmp_path, torch.zeros(WIDE, SIDE), delta, RankChoice(200, energy))
        (module,) = result.modules
        smallest = int((share >= energy).nonzero()[0]) + 1
        assert smallest <= module.rank <= smallest + 1  # the last directions of a randomized SVD are not exact
        assert result.kept() >= energy and result.kept() == pytest.approx(float(share[module.rank - 1]), rel=2e-3)
        assert result.relative_error**2 == pytest.approx(1 - result.kept(), rel=5e-3)
    capped = extracted(tmp_path, torch.zeros(WIDE, SIDE), delta, RankChoice(8, 0.98))
    assert capped.modules[0].rank == 8
    curve = dict(capped.curve())
    assert list(curve) == [1, 2, 4, 8, 16, 24] and curve[8] == capped.kept()


def test_spacing_is_the_distance_to_the_next_number():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.tensor([1.0, 1.5, 0.03, 3.0, 1000.0]).to(dtype)
        following = torch.nextafter(values.float(), torch.tensor(torch.inf)) if dtype is torch.float32 else None
        if following is not None:
            torch.testing.assert_close(spacing(values), following - values, rtol=0, atol=0)
        else:
            bits = (values.view(torch.int16) + 1).view(dtype)
            torch.testing.assert_close(spacing(values), bits.float() - values.float(), rtol=0, atol=0)


@pytest.fixture
def tuned_folder(tmp_path, model_folder, transformers) -> Path:
    """The base with low-rank pairs, and with a bias, a norm and a modulation changed; low noise unchanged."""
    folder = tmp_path / "tuned"
    for noise_expert, transformer in transformers.items():
        state = {name: value.clone() for name, value in transformer.state_dict().items()}
        if noise_expert is NoiseExpert.HIGH:
            for path, entry in random_state(shapes(), rank=2).entries.items():
                state[f"{path}.weight"] += entry.delta()
            for name in ("blocks.1.attn1.to_q.bias", "blocks.0.attn1.norm_q.weight", "blocks.2.scale_shift_table"):
                state[name] += 0.1
        (folder / noise_expert.component).mkdir(parents=True)
        save_file(state, folder / noise_expert.component / "diffusion_pytorch_model.safetensors")
    return folder


def test_base_and_the_extracted_lora_are_the_tuned_model(tmp_path, model_folder, tuned_folder, capsys):
    """A run's folder against a model folder in shards; the unchanged noise expert has no file."""
    out = tmp_path / "lora.safetensors"
    merge(extract=True, model=str(tuned_folder), base=str(model_folder), rank="4", output=out,
          plot=str(tmp_path / "kept.png"))
    captured = capsys.readouterr()
    printed = captured.out
    assert "30 Linears changed, 3 other tensors kept" in printed and "relative error" in printed
    assert "read back lora_high_noise.safetensors: 33 of 33 modules, ΔW exact" in captured.err
    assert "low: 0 Linears changed" in printed and "no file is written" in printed
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    high = tmp_path / "lora_high_noise.safetensors"
    assert not (tmp_path / "lora_low_noise.safetensors").exists()
    (file,) = open_lora(high).values()
    assert (file.noise_expert, file.noise_expert_source) == (NoiseExpert.HIGH, "metadata")
    assert {"lapwan.base_fingerprint", "lapwan.extracted_from", "lapwan.boundary"} <= set(file.metadata)
    merge(model=str(model_folder), lora=[str(high)], output=tmp_path / "merged")
    want = load_file(tuned_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in load_file(next((tmp_path / "merged" / "transformer").glob("*.safetensors"))).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=5e-6)


def test_a_file_in_the_original_layout_against_a_folder(tmp_path, model_folder, tuned_folder):
    weights = load_file(tuned_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    original = {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        original[f"model.diffusion_model.{to_original(module)}.{leaf}" if to_original(module) else name] = value
    save_file(original, tmp_path / "wan_high.safetensors")
    out = tmp_path / "out.safetensors"
    merge(extract=True, model=str(tmp_path / "wan_high.safetensors"), base=str(model_folder), rank="2", output=out,
          format="musubi")
    ((noise_expert, state),) = read_lora(out).items()
    assert noise_expert is NoiseExpert.HIGH and len(state.entries) == 3 * len(PROJECTIONS)


@pytest.mark.parametrize(("options", "says"), [
    ({"model": "a"}, "needs two models"), ({"model": "a", "base": "b", "lora": ["x.safetensors"]}, "leave out --lora"),
    ({"model": "a", "base": "b", "multiplier": "2"}, "whole difference"),
])
def test_options_that_do_not_fit(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        merge(extract=True, output=tmp_path / "x.safetensors", **options)


def test_other_models_are_refused(tmp_path, model_folder, update):
    other = model_file(tmp_path / "high.safetensors", {"blocks.0.self_attn.q": update["base"]}, torch.float32)
    with pytest.raises(UserError, match="not the same model"):
        merge(extract=True, model=str(other), base=str(model_folder), output=tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="applies only with --extract"):
        merge(lora=[str(other)], energy="0.9", output=tmp_path / "x.safetensors")
    nan = model_file(tmp_path / "nan.safetensors", {"blocks.0.self_attn.q": update["base"] * math.nan}, torch.float32)
    with pytest.raises(UserError, match="not finite"):
        merge(extract=True, model=str(nan), base=str(other), output=tmp_path / "x.safetensors")


def fp8_file(path: Path, weights: dict[str, torch.Tensor], kind: torch.dtype, rows: bool | None) -> Path:
    """fp8 with a scale per row or per tensor; `rows` None: a cast without scales."""
    tensors = {}
    for name, value in weights.items():
        scale = value.abs().amax(1, keepdim=True) if rows else value.abs().max()
        scale = torch.ones(()) if rows is None else scale / torch.finfo(kind).max
        tensors[f"{name}.weight"] = (value / scale).to(kind)
        if rows is not None:
            tensors[f"{name}.weight_scale"] = scale
    save_file(tensors, path)
    return path


def gguf_file(path: Path, weights: dict[str, torch.Tensor], kind: str) -> Path:
    writer = gguf.GGUFWriter(str(path), "wan")
    for name, value in weights.items():
        quantised = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(value.numpy(), quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


QUANTISED = {
    "fp8 by tensor": lambda path, weights: fp8_file(path, weights, torch.float8_e4m3fn, False),
    "fp8 by row": lambda path, weights: fp8_file(path, weights, torch.float8_e4m3fn, True),
    "e5m2 by tensor": lambda path, weights: fp8_file(path, weights, torch.float8_e5m2, False),
    "e4m3 cast": lambda path, weights: fp8_file(path, weights, torch.float8_e4m3fn, None),
    **{kind: lambda path, weights, kind=kind: gguf_file(path, weights, kind) for kind in (
        "Q8_0", "Q4_0", "Q5_0", "Q5_1", "BF16")},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_floor_of_quantised_models_is_the_measured_rounding_noise(tmp_path, update, kind):
    """TUNED quantised against the BASE it started from, and both quantised; an update of a quantised base smaller than
    its rounding; a cast of one model is no update."""
    name, delta = "blocks.0.self_attn.q", 4 * update["delta"]
    whole = {n: {name: value} for n, value in (("base", update["base"]), ("tuned", update["base"] + delta))}
    plain = model_file(tmp_path / "base.safetensors", whole["base"], torch.float32)
    quantised = {n: QUANTISED[kind](tmp_path / f"{n}.bin", weights) for n, weights in whole.items()}
    files = {n: read_weights(path) for n, path in quantised.items()}
    values = {n: load_tensor(file, f"{name}.weight") for n, file in files.items()}
    for base, of_base in ((read_weights(plain), update["base"]), (files["base"], values["base"].float())):
        result = extract([files["tuned"]], [base], RankChoice(16))
        (module,) = result.modules
        noise = float((values["tuned"].float() - of_base - delta).double().square().sum())
        assert module.floor == pytest.approx(noise, rel=0.25)
        assert result.state.entries["blocks.0.attn1.to_q"].down.dtype == torch.bfloat16
    exact = model_file(tmp_path / "exact.safetensors", {name: values["base"].float() + update["delta"]}, torch.float32)
    (module,) = extract([read_weights(exact)], [files["base"]], RankChoice(16)).modules
    assert module.captured(5) == pytest.approx(float(update["delta"].double().square().sum()), rel=1e-3)
    cast = extract([files["base"]], [read_weights(plain)], RankChoice(16))
    assert (cast.only_rounding, cast.modules) == (1, [])


def test_quantised_files_and_folders_through_the_command(tmp_path, model_folder, tuned_folder, capsys):
    """An fp8 file and a GGUF file of the tuned transformer, against the base's folder: the update is that of the
    unquantised one within what quantising rounds; another model is refused in a dry run."""
    weights = load_file(tuned_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    linears = {n: v for n, v in weights.items() if to_original(n.removesuffix(".weight")) and "blocks" in n}
    rest = {n: v for n, v in weights.items() if n not in linears}
    fp8_file(tmp_path / "linears.safetensors", {n.removesuffix(".weight"): v for n, v in linears.items()},
             torch.float8_e4m3fn, True)
    save_file({**rest, **load_file(tmp_path / "linears.safetensors")}, tmp_path / "tuned_high.safetensors")
    merge(extract=True, model=str(tmp_path / "tuned_high.safetensors"), base=str(model_folder), rank="2",
          output=tmp_path / "fp8.safetensors")
    merge(extract=True, model=str(tuned_folder), base=str(model_folder), rank="2", output=tmp_path / "full.safetensors")
    ((_, quantised),), ((_, whole),) = (read_lora(tmp_path / f).items() for f in (
        "fp8.safetensors", "full_high_noise.safetensors"))
    assert quantised.entries.keys() == whole.entries.keys()
    for path, entry in whole.entries.items():
        if isinstance(entry, LowRank):
            error = (quantised.entries[path].delta().float() - entry.delta()).norm()
            assert error < 0.1 * linears[f"{path}.weight"].norm()
    del rest["scale_shift_table"]
    save_file(rest, tmp_path / "other_high.safetensors")
    with pytest.raises(UserError, match="not the same model"):
        merge(extract=True, model=str(tmp_path / "other_high.safetensors"), base=str(model_folder), dry_run=True,
              output=tmp_path / "x.safetensors")
    assert "tuned_high.safetensors is quantised (F8_E4M3)" in capsys.readouterr().err
