"""lapwan merge: into a model folder, into one file, into one LoRA; what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from lora_cases import BLOCKS, make_transformer, merge, random_state, shapes, velocity
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.fingerprints import checkpoint_fingerprint, merged_fingerprint
from lapwan.checkpoints.rewrite import merged_tensor, rewrite
from lapwan.checkpoints.wan_keys import to_original
from lapwan.errors import UserError
from lapwan.lora.assign import LoraRequest, assign
from lapwan.lora.formats import open_lora, read_lora, write_lora
from lapwan.lora.merge import ComponentPlan, LoraToMerge, plan_component, verify_merged, write_component
from lapwan.lora.state import Term
from lapwan.models.base import Base
from lapwan.models.merge import write_folder
from lapwan.models.spec import read_spec, weight_files
from lapwan.names import NoiseExpert
from lapwan.tiny.resolve import resolve


def add(transformer: WanTransformer3DModel, state, multiplier: float = 1.0) -> WanTransformer3DModel:
    """A copy of the transformer with multiplier · ΔW added by plain arithmetic in fp64."""
    copy = make_transformer(0)
    copy.load_state_dict(transformer.state_dict())
    copy.double()
    for path, entry in state.entries.items():
        copy.get_submodule(path).weight.data += multiplier * entry.delta(torch.float64)
    return copy


def test_merged_folder_is_base_plus_lora_in_diffusers(tmp_path, model_folder, transformers, pair):
    out = tmp_path / "merged"
    merge(model=str(model_folder), lora=[f"{e}={p}:0.5" for e, p in pair.items()], multiplier="0.8", output=out)
    pipe = WanPipeline.from_pretrained(out, vae=None, text_encoder=None, tokenizer=None)
    assert pipe.config.boundary_ratio == 0.875
    for noise_expert, path in pair.items():
        (state,) = read_lora(path).values()
        want = velocity(add(transformers[noise_expert], state, 0.4))
        got = velocity(getattr(pipe, noise_expert.component))
        assert (want - got).abs().max() < 1e-5
        unchanged = velocity(add(transformers[noise_expert], state, 0.0))
        assert (want - unchanged).abs().max() > 0.1  # the LoRA does something


def test_the_embedded_model_merged_loads_whole(tmp_path, saved):
    spec = resolve("tiny")
    config = json.loads((spec.component(NoiseExpert.LOW) / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    lora = saved("tiny.safetensors", sizes={"blocks.5.attn1.to_v": (width, width)}, layout="musubi")
    merge(model="tiny", lora=[f"low={lora}"], output=tmp_path / "merged")
    base, merged = (WanPipeline.from_pretrained(folder) for folder in (spec.path, tmp_path / "merged"))
    (state,) = read_lora(lora).values()
    (delta,) = (entry.delta() for entry in state.entries.values())
    for name, weight in merged.transformer_2.state_dict().items():
        before = base.transformer_2.state_dict()[name]
        if name == "blocks.5.attn1.to_v.weight":
            assert (weight - before - delta).abs().max() < 1e-6
        else:
            assert torch.equal(weight, before), name
    assert resolve(str(tmp_path / "merged")).noise_experts == spec.noise_experts


def test_a_merge_in_memory_is_the_merged_folder(tmp_path, saved):
    """The same weights, bit for bit, and the same fingerprint: an adapter trained on one runs on the other."""
    spec = resolve("tiny")
    width = json.loads((spec.component(NoiseExpert.LOW) / "config.json").read_text())["num_attention_heads"] * 48
    loras = [saved(f"{n}.safetensors", sizes={"blocks.5.attn1.to_v": (width, width)}, seed=n) for n in (1, 2)]
    requests = [LoraRequest("low", loras[0], 0.4), LoraRequest("low", loras[1], -1.5)]
    merge(model="tiny", lora=[f"low={request.path}:{request.strength}" for request in requests], output=tmp_path / "m")
    memory, folder = Base(spec, assign(requests, spec.noise_experts)), read_spec(tmp_path / "m")
    for noise_expert in NoiseExpert:
        assert memory.fingerprint(noise_expert) == folder.fingerprint(noise_expert)
        ours, theirs = (base.load(noise_expert).transformer.state_dict() for base in (memory, Base(folder)))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert memory.fingerprint(NoiseExpert.HIGH) == spec.fingerprint(NoiseExpert.HIGH)
    assert memory.fingerprint(NoiseExpert.LOW) != spec.fingerprint(NoiseExpert.LOW)


def test_merged_folder_keeps_every_other_file_and_says_where_it_comes_from(tmp_path, model_folder, pair):
    high = pair[NoiseExpert.HIGH]
    merge(model=str(model_folder), lora=[f"high={high}"], output=tmp_path / "merged")
    names = sorted(p.relative_to(model_folder) for p in model_folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path / "merged") for p in (tmp_path / "merged").rglob("*") if p.is_file())
    touched = {Path("transformer/diffusion_pytorch_model.safetensors")}
    for name in names:
        same = (model_folder / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
        assert same == (name not in touched), name
    base = weight_files(model_folder / "transformer")
    metadata = read_header(tmp_path / "merged" / "transformer/diffusion_pytorch_model.safetensors").metadata
    (state,) = read_lora(high).values()
    assert json.loads(metadata["lapwan.merged"]) == [
        {"fingerprint": state.fingerprint(), "multiplier": 1.0, "noise_expert": "high"}]
    fingerprint = merged_fingerprint(checkpoint_fingerprint(base), [(state.fingerprint(), 1.0)])
    assert metadata["lapwan.fingerprint"] == fingerprint == checkpoint_fingerprint(
        weight_files(tmp_path / "merged" / "transformer"))
    assert metadata["lapwan.base_fingerprint"] == checkpoint_fingerprint(base)


def plan_for(files: list[Path], lora: Path) -> ComponentPlan:
    (file,) = open_lora(lora).values()
    return plan_component(files, [LoraToMerge(file, 1.0, file.fingerprint())], NoiseExpert.HIGH)


class InexactTerm(Term):
    def prepare(self, dtype, base_rows):
        add_rows = super().prepare(dtype, base_rows)
        return lambda work, base, first: (add_rows(work, base, first), work.mul_(1.02))


def test_tiles_and_pieces_are_written_where_they_belong(tmp_path, model_folder, pair):
    plan = plan_for(weight_files(model_folder / "transformer"), pair[NoiseExpert.HIGH])
    source, (terms,) = plan.files[0], plan.terms
    pieces: list[int] = []
    tile = 5 * 24 * 4  # 5 rows: 24 and 40 rows end in a part
    rewrite(source, tmp_path / "out.safetensors", terms, {}, pieces.append, tile_bytes=tile, copy_bytes=100)
    assert max(pieces) <= tile and len(pieces) > 2 * len(terms)
    verify_merged(source, read_header(tmp_path / "out.safetensors"), terms, lambda _: None)
    merged = load_file(tmp_path / "out.safetensors")
    for name, updates in terms.items():
        assert torch.equal(merged[name], merged_tensor(source, name, updates, tile)), name


def test_untouched_bytes_are_identical_and_touched_ones_rounded_once(tmp_path, transformers):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weights = {k: v.to(dtype).clone() for k, v in transformers[NoiseExpert.HIGH].state_dict().items()}
        save_file(weights, tmp_path / "dit.safetensors", metadata={"format": "pt", "kept": "yes"})
        state = random_state(shapes([1], ["self_attn.k", "ffn.0", "ffn.2"]), alpha=1.5, dtype=torch.bfloat16)
        write_lora(tmp_path / "l.safetensors", state)
        merge(dit=tmp_path / "dit.safetensors", lora=[str(tmp_path / "l.safetensors")], overwrite=True,
              output=tmp_path / "out.safetensors")
        got = load_file(tmp_path / "out.safetensors")
        assert list(read_header(tmp_path / "out.safetensors").tensors) == list(
            read_header(tmp_path / "dit.safetensors").tensors)
        for name, weight in weights.items():
            entry = state.entries.get(name.removesuffix(".weight"))
            if entry is None:
                assert torch.equal(got[name], weight), name
                continue
            exact = weight.double() + entry.delta(torch.float64)
            error = (got[name].double() - exact).abs()
            half_ulp = exact.abs() * torch.finfo(dtype).eps / 2
            assert (error <= half_ulp * 1.01 + 1e-6 * (dtype != torch.float64)).all(), (dtype, name)
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            assert file.metadata()["kept"] == "yes"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_key_layout_is_kept(tmp_path, transformers, saved, prefix):
    source = transformers[NoiseExpert.LOW].state_dict()
    renamed = {
        prefix + ((to_original(k.removesuffix(".weight")) or k.removesuffix(".weight")) + ".weight"): v.clone()
        for k, v in source.items() if k.endswith(".weight")
    }
    save_file(renamed, tmp_path / "wan_low_noise.safetensors")
    lora = saved("l.safetensors", layout="diffusers", metadata={"lapwan.noise_expert": "low"})
    merge(dit=tmp_path / "wan_low_noise.safetensors", lora=[str(lora)], output=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == renamed.keys()
    (state,) = read_lora(lora).values()
    for path, entry in state.entries.items():
        name = f"{prefix}{to_original(path)}.weight"
        assert torch.allclose(got[name], renamed[name] + entry.delta(), atol=1e-6)
    changed = {name for name in got if not torch.equal(got[name], renamed[name])}
    assert len(changed) == 10 * BLOCKS


def test_a_folder_of_shards_as_one_transformer(tmp_path, model_folder, transformers, pair):
    folder = model_folder / "transformer_2"
    assert len(weight_files(folder)) > 2
    merge(dit=folder, lora=[str(pair[NoiseExpert.LOW])], output=tmp_path / "out")
    (state,) = read_lora(pair[NoiseExpert.LOW]).values()
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    assert (velocity(merged) - velocity(add(transformers[NoiseExpert.LOW], state))).abs().max() < 1e-5


def test_two_loras_add_up_and_both_means_both(tmp_path, model_folder, transformers, saved):
    a, b = saved("a.safetensors", seed=1), saved("b.safetensors", seed=2, sizes=shapes([0]), rank=2)
    merge(model=str(model_folder), lora=[f"both={a}:0.5", f"low={b}"], output=tmp_path / "merged")
    (one,), (two,) = read_lora(a).values(), read_lora(b).values()
    for noise_expert in NoiseExpert:
        want = add(transformers[noise_expert], one, 0.5)
        want = add(want, two) if noise_expert is NoiseExpert.LOW else want
        got = WanTransformer3DModel.from_pretrained(tmp_path / "merged" / noise_expert.component)
        assert (velocity(got) - velocity(want)).abs().max() < 1e-5


def test_large_unchanged_files_are_linked_or_copied_as_asked(tmp_path, model_folder, pair):
    source = tmp_path / "base"
    shutil.copytree(model_folder, source)
    (source / "vae" / "big.safetensors").write_bytes(bytes(2 << 20))
    (source / ".git").mkdir()
    (source / ".git" / "x").write_text("x")
    (source / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"unmerged")
    lora = [f"high={pair[NoiseExpert.HIGH]}"]
    merge(model=str(source), lora=lora, output=tmp_path / "linked")
    merge(model=str(source), lora=lora, output=tmp_path / "copied", link="false")
    assert (tmp_path / "linked/vae/big.safetensors").samefile(source / "vae/big.safetensors")
    assert not (tmp_path / "linked/vae/config.json").samefile(source / "vae/config.json")
    assert not (tmp_path / "copied/vae/big.safetensors").samefile(source / "vae/big.safetensors")
    assert (tmp_path / "copied/vae/big.safetensors").stat().st_size == 2 << 20
    assert not (tmp_path / "linked/.git").exists()
    assert not (tmp_path / "linked/transformer/diffusion_pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_verify_accepts_a_right_merge_and_not_a_wrong_one(tmp_path, transformers, saved, dtype, capsys):
    weights = {k: v.to(dtype).clone() for k, v in transformers[NoiseExpert.HIGH].state_dict().items()}
    save_file(weights, tmp_path / "dit.safetensors")
    asked = {"dit": tmp_path / "dit.safetensors", "verify": "true",
             "lora": [str(saved("a.safetensors", rank=16)), f"{saved('b.safetensors', seed=3, rank=8)}:0.3"]}
    merge(output=tmp_path / "out.safetensors", **asked)
    worst = float(re.search(r"30 merged weights within ([0-9.]+) ulp", capsys.readouterr().err)[1])
    assert worst <= 0.5 and (worst > 0.3 or dtype in (torch.float32, torch.float64))

    source, good = read_header(tmp_path / "dit.safetensors"), read_header(tmp_path / "out.safetensors")
    for name in ("blocks.1.attn1.to_k.weight", "blocks.0.scale_shift_table"):  # a touched weight, an untouched one
        content = bytearray((tmp_path / "out.safetensors").read_bytes())
        info = good.tensors[name]
        content[info.start + 8 : info.start + 16] = content[info.start : info.start + 8]
        (tmp_path / "bad.safetensors").write_bytes(content)
        terms = {"blocks.1.attn1.to_k.weight": [
            Term(next(iter(read_lora(tmp_path / f"{n}.safetensors").values())).entries["blocks.1.attn1.to_k"], m)
            for n, m in (("a", 1.0), ("b", 0.3))]}
        only = TensorFile(source.path, {}, {n: source.tensors[n] for n in (*terms, "blocks.0.scale_shift_table")},
                          source.data_start, source.size)
        verify_merged(only, good, terms, lambda _: None)
        with pytest.raises(UserError, match=re.escape(name)):
            verify_merged(only, read_header(tmp_path / "bad.safetensors"), terms, lambda _: None)

    plan = plan_for([tmp_path / "dit.safetensors"], tmp_path / "a.safetensors")
    wrong = tuple({name: [InexactTerm(t.module, t.multiplier) for t in terms] for name, terms in file_terms.items()}
                  for file_terms in plan.terms)
    with pytest.raises(UserError, match="is not base \\+ LoRA when read back"):
        write_component(replace(plan, terms=wrong), [tmp_path / "wrong.safetensors"], lambda _: None, verify=True)
    assert not (tmp_path / "wrong.safetensors").exists()


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("form", ["model", "dit"])
def test_an_interrupted_merge_leaves_nothing(tmp_path, model_folder, pair, form):
    before = files_below(tmp_path)
    plan = plan_for(weight_files(model_folder / "transformer"), pair[NoiseExpert.HIGH])
    left = plan.size // 2

    def interrupt_half_way(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if form == "model":
            write_folder(model_folder, tmp_path / "out", [plan], True, interrupt_half_way)
        else:
            write_component(plan, [tmp_path / "out.safetensors"], interrupt_half_way)
    assert left < 0 and files_below(tmp_path) == before


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, model_folder, pair, capsys):
    before = files_below(tmp_path)
    lora = [f"{e}={p}" for e, p in pair.items()]
    merge(model=str(model_folder), lora=lora, output=tmp_path / "out", dry_run=True)
    assert files_below(tmp_path) == before
    out, err = capsys.readouterr()
    assert "transformer: 30 weights" in err and "transformer_2: 30 weights" in err and "[[lora]]" in out


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_untouched_tensor_that_is_not_finite_is_refused(tmp_path, transformers, saved, value):
    weights = {k: v.clone() for k, v in transformers[NoiseExpert.HIGH].state_dict().items()}
    name = next(name for name in weights if name.endswith("norm2.bias"))
    weights[name].view(-1)[-1] = value
    save_file(weights, tmp_path / "dit.safetensors")
    with pytest.raises(UserError, match=rf"dit\.safetensors: '{name}' holds NaN or infinity"):
        merge(dit=tmp_path / "dit.safetensors", lora=[str(saved("a.safetensors"))], output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_refusals(tmp_path, model_folder, pair, saved, monkeypatch):
    high, low = pair.values()
    plain = saved("plain.safetensors")
    model = {"model": str(model_folder), "output": tmp_path / "out"}

    def refused(match: str, **options: object) -> None:
        before = files_below(tmp_path)
        with pytest.raises(UserError, match=match) as caught:
            merge(**{**model, **options})
        assert "\n" not in str(caught.value)
        assert files_below(tmp_path) == before

    refused("is for the low noise expert .*not for the high one", lora=[f"high={low}"])
    refused("does not say which noise expert", lora=[str(plain)])
    other = saved("other.safetensors", sizes=shapes([BLOCKS]))
    refused(r"module 'blocks\.3\.[^']*' is not in [^(]*, which has blocks 0 to 2; the LoRA was made for another",
            lora=[f"high={other}"])
    wide = saved("wide.safetensors", sizes={"blocks.0.attn1.to_q": (24, 32)})
    refused(r"\[24, 32\].*has \[24, 24\]", lora=[f"high={wide}"])
    refused("given twice", lora=[f"high={plain}", f"both={plain}"])
    refused("are nested", lora=[f"high={plain}"], output=model_folder / "merged")
    refused("nothing to merge", lora=[])
    refused("not both", lora=[f"high={plain}"], dit=high)
    refused("--rank applies only if the result is a LoRA", lora=[f"high={plain}"], rank="4")
    refused("no such file", lora=["high=nowhere.safetensors"])
    refused("did you mean 'high'", lora=[f"hihg={plain}"])
    nonfinite = saved("inf.safetensors", sizes={"blocks.0.attn1.to_q": (24, 24)}, alpha=float("inf"))
    refused("holds NaN or infinity", lora=[f"high={nonfinite}"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    refused("output exists", lora=[f"high={plain}"], output=tmp_path / "taken")
    refused("is a file, but this merge writes a folder", lora=[f"high={plain}"], output=plain)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refused(r"not enough disk .*GiB needed, 0\.000977 GiB free", lora=[f"high={plain}"])


def test_a_lora_of_another_task_boundary_or_base_is_merged_with_a_warning(tmp_path, model_folder, saved, capsys):
    fits = {"lapwan.noise_expert": "high", "lapwan.task": "t2v", "lapwan.boundary": "0.875",
            "lapwan.base_fingerprint": checkpoint_fingerprint(weight_files(model_folder / "transformer"))}
    differs = {"lapwan.task": "i2v", "lapwan.boundary": "0.9", "lapwan.base_fingerprint": "f" * 64}
    for key, value in [(None, None), *differs.items()]:
        lora = saved("x.safetensors", metadata=fits | ({key: value} if key else {}))
        merge(model=str(model_folder), lora=[str(lora)], output=tmp_path / f"out{key}")
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert len(warnings) == (key is not None), warnings
        assert key is None or value[:12] in warnings[0]


def test_a_second_merge_of_the_same_lora_is_refused(tmp_path, model_folder, pair, saved):
    high = pair[NoiseExpert.HIGH]
    merge(model=str(model_folder), lora=[f"high={high}"], output=tmp_path / "once")
    (state,) = read_lora(high).values()
    write_lora(tmp_path / "renamed.safetensors", state, layout="musubi")  # the same content under another name
    again = [f"high={tmp_path / 'renamed.safetensors'}"]
    with pytest.raises(UserError, match="already merged"):
        merge(model=str(tmp_path / "once"), lora=again, output=tmp_path / "twice")
    merge(model=str(tmp_path / "once"), lora=[f"high={saved('next.safetensors', seed=8)}"], output=tmp_path / "more")
    metadata = read_header(tmp_path / "more" / "transformer/diffusion_pytorch_model.safetensors").metadata
    assert len(json.loads(metadata["lapwan.merged"])) == 2
    assert metadata["lapwan.base_fingerprint"] == checkpoint_fingerprint(weight_files(model_folder / "transformer"))


def test_quantised_weights_and_other_checkpoints_are_refused(tmp_path, transformers, saved):
    weights = {k: v.clone() for k, v in transformers[NoiseExpert.HIGH].state_dict().items()}
    weights["blocks.0.attn1.to_q.weight"] = weights["blocks.0.attn1.to_q.weight"].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "fp8.safetensors")
    with pytest.raises(UserError, match="F8_E4M3"):
        merge(dit=tmp_path / "fp8.safetensors", lora=[str(saved())], output=tmp_path / "o.safetensors")
    save_file({"encoder.weight": torch.zeros(3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="not a Wan transformer"):
        merge(dit=tmp_path / "vae.safetensors", lora=[str(saved())], output=tmp_path / "o.safetensors")
    with pytest.raises(UserError, match="is not a LoRA"):
        merge(dit=tmp_path / "vae.safetensors", lora=[str(tmp_path / "fp8.safetensors")],
              output=tmp_path / "o.safetensors")


def test_dequantising_to_a_dtype_that_overflows_is_refused(tmp_path, transformers, saved):
    """fp8 · scale beyond fp16's 65504, in a weight that the LoRA changes and in one that it does not."""
    fp8, out = tmp_path / "fp8.safetensors", tmp_path / "o.safetensors"
    for name in ("blocks.0.attn1.to_q", "blocks.2.attn2.to_v"):
        weights = {k: v.clone() for k, v in transformers[NoiseExpert.HIGH].state_dict().items()}
        weights[f"{name}.weight"] = torch.full((24, 24), 400.0).to(torch.float8_e4m3fn)
        weights |= {f"{name}.scale_weight": torch.tensor(1e3), "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
        save_file(weights, fp8)
        lora = saved("a.safetensors", sizes={"blocks.0.attn1.to_q": (24, 24)})
        with pytest.raises(UserError, match=rf"{name}.weight'.* F16 cannot hold"):
            merge(dit=fp8, lora=[str(lora)], dtype="float16", output=out)
        assert not (out).exists()
        merge(dit=fp8, lora=[str(lora)], dtype="bfloat16", output=out)
        (out).unlink()


def test_parts_of_a_lora_in_a_model(tmp_path, model_folder, transformers, saved):
    lora = saved("a.safetensors", seed=4)
    merge(model=str(model_folder), lora=[f"high={lora}:0.5@blocks.1-2@self_attn.q"], output=tmp_path / "merged",
          verify=True)
    (state,) = read_lora(lora).values()
    chosen = {f"blocks.{b}.attn1.to_q" for b in (1, 2)}
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer").state_dict()
    for name, before in transformers[NoiseExpert.HIGH].state_dict().items():
        path = name.removesuffix(".weight")
        want = before + 0.5 * state.entries[path].delta() if path in chosen else before
        torch.testing.assert_close(merged[name], want, rtol=1e-6, atol=1e-7)
