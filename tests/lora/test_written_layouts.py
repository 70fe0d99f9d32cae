"""What `merge` writes: any ranks, alphas and dtypes in every layout, products and deltas as low-rank pairs, read back.

ΔW is compared with the fp64 sum that is computed here.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import FFN, HIDDEN, merge, random_state, shapes
from safetensors.torch import load_file, save_file
from test_kinds import normal, only, wild, written
from torch import Tensor

from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.lora_keys import LAYOUTS
from lapwan.errors import UserError
from lapwan.lora.combine import combine
from lapwan.lora.formats import read_lora, write_both, write_lora
from lapwan.lora.kinds import FullDelta
from lapwan.lora.lycoris import LoKr
from lapwan.lora.read_back import compare_written, reader, relative_error
from lapwan.lora.state import AdapterState, LowRank
from lapwan.lora.svd import leading_directions
from lapwan.names import NoiseExpert

Q, FIRST, K = "blocks.0.attn1.to_q", "blocks.0.ffn.net.0.proj", "blocks.1.attn2.to_k"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a factor's rounding, both factors and their product.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@given(layout=st.sampled_from(sorted(LAYOUTS)), ranks=st.tuples(*[st.integers(1, 9)] * 3),
       alphas=st.tuples(*[st.floats(0.5, 64, width=32) | st.floats(-3, -0.01)] * 3), stored=st.sampled_from(DTYPES),
       dtype=st.none() | st.sampled_from(DTYPES), fold=st.booleans(), seed=st.integers(0, 9))
def test_every_layout_keeps_the_update(tmp_path_factory, layout, ranks, alphas, stored, dtype, fold, seed):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    entries = {}
    for rank, alpha, (module, size) in zip(ranks, alphas, {Q: (24, 24), FIRST: (40, 24), "proj_out": (64, 24)}.items(),
                                           strict=True):
        entries |= random_state({module: size}, rank, alpha, stored, seed).entries
    state, checked = AdapterState(entries), []
    write_lora(path, state, layout, dtype, fold, check=lambda file: checked.append(
        compare_written(file, {None: state}, path)))
    (result,) = checked
    assert result.modules == 3 and result.error <= TOLERANCE[dtype or stored]
    for module, update in only(path).entries.items():
        wanted = entries[module].delta(torch.float64)
        assert (update.delta(torch.float64) - wanted).norm() <= TOLERANCE[dtype or stored] * wanted.norm(), module
        assert update.scale == 1.0 or not fold
    if not fold and dtype in (None, stored) and layout != "comfy":
        assert result.error == 0.0 and result.path == ""


def summed(tmp_path: Path, *kinds: str) -> tuple[AdapterState, dict[str, Tensor]]:
    """One adapter of several kinds, and its ΔW by path in fp64."""
    total = AdapterState({})
    for kind in kinds:
        total.entries |= only(written(tmp_path, kind)).entries
    return total, {path: update.delta(torch.float64) for path, update in total.entries.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_products_become_low_rank_pairs_of_any_layout(tmp_path, kind, layout, capsys):
    source = written(tmp_path, kind)
    wanted = {path: update.delta(torch.float64) for path, update in only(source).entries.items()}
    if layout == "musubi":
        tensors = {name: t for name, t in load_file(source).items() if "patch_embedding" not in name}
        save_file(tensors, source)
        wanted.pop("patch_embedding", None)
    merge(lora=[str(source)], rank="64", format=layout, output=tmp_path / "full.safetensors", fold_alpha=True)
    state = only(tmp_path / "full.safetensors")
    assert set(state.entries) == set(wanted)
    for path, update in state.entries.items():
        difference = update.delta(torch.float64).reshape(wanted[path].shape) - wanted[path]
        assert isinstance(update, LowRank) and difference.norm() < 1e-6 * wanted[path].norm()
    ran = capsys.readouterr()
    assert "rank 64 keeps 100.0000% of the energy" in ran.out
    assert re.search(rf"read back full.safetensors: {len(wanted)} of {len(wanted)} modules", ran.err)
    merge(lora=[str(source)], rank="2", format=layout, output=tmp_path / "two.safetensors")
    two, kept = only(tmp_path / "two.safetensors"), {}
    for path, update in two.entries.items():
        matrix = wanted[path].flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert update.rank == 2 and (update.delta(torch.float64).reshape(best.shape) - best).norm() < 1e-5 * s[0]
        kept[path] = (s[:2].square().sum() / s.square().sum()).item()
    worst = min(kept, key=lambda path: kept[path])
    assert f"least in {worst}: {kept[worst]:.4%}" in capsys.readouterr().out


def test_a_patch_embedding_becomes_a_convolution_pair(tmp_path):
    state, wanted = summed(tmp_path, "full delta")
    low, energy = combine([(state, 1.0)], rank=64)
    pair = low.entries["patch_embedding"]
    assert pair.parts()["down"].shape[1:] == (16, 1, 2, 2) and pair.parts()["up"].shape[2:] == (1, 1, 1)
    assert energy.unchanged == sum(isinstance(update, FullDelta) for update in low.entries.values()) == 8
    assert "8 changes of biases, norms or modulation are kept" in energy.describe(64)
    write_lora(tmp_path / "x.safetensors", low, check=reader(tmp_path / "x.safetensors", {None: low}))
    for path, update in only(tmp_path / "x.safetensors").entries.items():
        assert (update.delta(torch.float64) - wanted[path]).norm() < 1e-2 * wanted[path].norm(), path  # it is bf16
    for layout in ("musubi", "diffusers"):
        with pytest.raises(UserError, match="which this layout does not have; write the comfy layout, or merge"):
            write_lora(tmp_path / "y.safetensors", low, layout)


def test_sums_of_mixed_kinds(tmp_path):
    pair, product, delta = random_state({Q: (HIDDEN, HIDDEN), FIRST: (FFN, HIDDEN)}, seed=1), AdapterState({
        FIRST: LoKr({"lokr_w1": normal(8, 4, scale=1), "lokr_w2": normal(5, 6, scale=1)}, None)}), AdapterState({
            Q: FullDelta(normal(HIDDEN, HIDDEN)), K: FullDelta(normal(HIDDEN, HIDDEN))})
    terms = [(pair, 0.5), (product, 2.0), (delta, -1.0)]
    wanted: dict[str, Tensor] = {}
    for state, multiplier in terms:
        for path, update in state.entries.items():
            wanted[path] = wanted.get(path, 0) + multiplier * update.delta(torch.float64)
    for rank in (24, 3):
        low, _ = combine(terms, rank)
        for path, update in low.entries.items():
            u, s, vh = torch.linalg.svd(wanted[path], full_matrices=False)
            best = u[:, :rank] * s[:rank] @ vh[:rank]
            assert (update.delta(torch.float64) - best).norm() < 1e-5 * best.norm()
    exact, energy = combine([(pair, 0.5), (delta, -1.0)])
    assert energy is None and isinstance(exact.entries[Q], FullDelta) and isinstance(exact.entries[FIRST], LowRank)
    assert (exact.entries[Q].delta(torch.float64) - wanted[Q]).norm() < 1e-6 * wanted[Q].norm()
    with pytest.raises(UserError, match=r"is a LoRA .* and a LoKr .*: their sum has no exact form .* --rank N"):
        combine([(pair, 1.0), (product, 1.0)])
    with pytest.raises(UserError, match=r"is a DoRA, whose ΔW depends on the model's weights"):
        combine([(only(written(tmp_path, "DoRA")), 1.0)], rank=2)


def test_the_svd_of_a_large_matrix_is_nearly_the_best():
    matrix = (normal(300, 64) @ torch.diag(0.85 ** torch.arange(64)) @ normal(64, 400, seed=3))
    exact = torch.linalg.svdvals(matrix.double())
    u, v, s = (part.double() for part in leading_directions(matrix, 8, iterations=4))
    assert torch.allclose(s[:8], exact[:8], rtol=1e-4)
    rest = (matrix.double() - u[:, :8] * s[:8] @ v[:, :8].T).norm()
    assert rest <= 1.0001 * exact[8:].norm()


@pytest.mark.parametrize("options", [{"rank": "3"}, {"fold_alpha": True}, {"second": True}, {}])
def test_the_error_of_rounding_is_printed(tmp_path, saved, capsys, options):
    a = saved("a.safetensors", seed=1, rank=4, alpha=3.0, metadata={"lapwan.noise_expert": "high"})
    b = [saved("b.safetensors", seed=2, metadata={"lapwan.noise_expert": "high"})] if options.pop("second", 0) else []
    capsys.readouterr()
    merge(lora=list(map(str, [a, *b])), dtype="bfloat16", output=tmp_path / "x.safetensors", **options)
    error = re.search(r"30 of 30 modules, largest relative error of ΔW ([\d.e-]+) in blocks", capsys.readouterr().err)
    assert error and 1e-4 < float(error[1]) < 1e-2
    assert {t.dtype for name, t in load_file(tmp_path / "x.safetensors").items() if "lora" in name and "alpha" not in
            name} == {torch.bfloat16}


def test_values_that_do_not_fit_are_refused(tmp_path, saved):
    state = random_state(shapes([0], ["self_attn.q"]), rank=2, alpha=2.0)
    state.entries[Q].up.mul_(1e6)
    for options in ({}, {"fold_alpha": True}):
        with pytest.raises(UserError, match=rf"'{Q}': the B matrix of the LoRA has values that float16 cannot hold "
                                            r"\(at most 65504\); use --dtype bfloat16 or float32"):
            write_lora(tmp_path / "x.safetensors", state, "musubi", torch.float16, **options)
        assert not (tmp_path / "x.safetensors").exists()
    write_lora(tmp_path / "big.safetensors", state)
    for more in ({}, {"lora": [str(tmp_path / "big.safetensors"), str(saved("b.safetensors"))]}):
        with pytest.raises(UserError, match=r"float16 cannot hold .*--dtype bfloat16"):
            merge(**{"lora": [str(tmp_path / "big.safetensors")], **more}, dtype="float16",
                  output=tmp_path / "x.safetensors")


@pytest.mark.parametrize("options", [{}, {"rank": "2"}, {"dtype": "float16"}, {"format": "diffusers"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_with_their_file(tmp_path, options, value):
    tensors, _ = wild("LoKr") if not options else ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": normal(4, 24),
                                                   "diffusion_model.blocks.0.ffn.0.lora_B.weight": normal(40, 4)}, None)
    next(iter(tensors.values()))[1, 1] = value
    save_file(tensors, tmp_path / "bad_high.safetensors")
    with pytest.raises(UserError, match=r"bad_high.safetensors: '.*blocks.0.*' holds NaN or infinity"):
        merge(lora=[str(tmp_path / "bad_high.safetensors")], output=tmp_path / "x.safetensors", **options)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_that_is_not_what_was_written_is_an_error(tmp_path):
    state, _ = summed(tmp_path, "LoKr", "full delta")
    path = tmp_path / "x.safetensors"

    def damage(end: str, file: Path) -> None:
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(end))
        tensors[name].view(-1)[-1] += 0.01
        save_file(tensors, file, read_header(file).metadata)
        reader(path, {None: state})(file)

    ends = ("cross_attn.k.diff", "lokr_w2_a", "modulation.diff", "diff_b", "self_attn.q.lora_A.weight", "ffn.0.alpha")
    for end in ends:
        match = r"module '.+' is not what was written when read back; the file is not kept"
        with pytest.raises(UserError, match=match):
            write_lora(path, state, check=partial(damage, end))
        assert not path.exists()
    fewer = AdapterState(dict(list(state.entries.items())[1:]))
    with pytest.raises(UserError, match="is not what was written"):
        write_lora(path, fewer, check=reader(path, {None: state}))


def test_both_noise_experts_in_one_file_and_dora_are_read_back(tmp_path):
    states = {NoiseExpert.HIGH: only(written(tmp_path, "DoRA")), NoiseExpert.LOW: random_state(shapes([1]), alpha=3.0)}
    path, checked = tmp_path / "both.safetensors", []
    write_both(path, states, torch.bfloat16, True, lambda file: checked.append(compare_written(file, states, path)))
    assert checked[0].modules == sum(len(state.entries) for state in states.values()) and 0 < checked[0].error < 0.01
    swapped = dict(zip(states, reversed(states.values()), strict=True))
    with pytest.raises(UserError, match="is not what was written"):
        compare_written(path, swapped, path)
    assert read_lora(path).keys() == set(NoiseExpert)


@given(st.integers(1, 40), st.sampled_from(DTYPES), st.integers(0, 99))
def test_rounding_is_told_from_a_wrong_value(rank, dtype, seed):
    update = random_state({Q: (24, 24)}, rank, 0.7 * rank, seed=seed).entries[Q]
    rounded = update.map(lambda tensor: tensor.to(dtype))
    assert relative_error(update, rounded) <= TOLERANCE[dtype] * (1 + rank)
    wrong = LowRank(rounded.down, rounded.up, 1.02 * rounded.alpha)
    assert relative_error(update, wrong) is None


@pytest.mark.parametrize(("kind", "options", "says"), [
    ("full delta", {"format": "musubi"}, "full delta, which this layout does not have"),
    ("full delta", {"format": "diffusers", "rank": "4"}, "norm_k' is a full delta, which this layout does not have"),
    ("LoKr", {"format": "diffusers"}, "add --rank N to write it as a low-rank pair"),
    ("DoRA", {"format": "musubi"}, "DoRA, which this layout does not have"),
    ("DoRA", {"rank": "4"}, "whose ΔW depends on the model's weights"),
    ("convolution LoRA", {"format": "musubi"}, "convolution LoRA, which this layout does not have"),
    ("LoHa", {"format": "musubi", "rank": "4"}, "module 'patch_embedding' is a convolution LoRA"),
])
def test_what_a_layout_cannot_hold_is_refused_before_the_work(tmp_path, monkeypatch, kind, options, says):
    """At --dry-run, and without it before any SVD."""
    file = written(tmp_path, kind)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=says):
            merge(dry_run=dry_run, lora=[str(file)], output=tmp_path / "x.safetensors", **options)
        monkeypatch.setattr(torch.linalg, "svd", None)


@pytest.mark.parametrize("options", [{}, {"rank": "4"}, {"format": "musubi", "rank": "4"}])
def test_the_dry_run_of_a_sum_accepts_what_the_merge_writes(tmp_path, saved, options):
    files = [str(written(tmp_path, "convolution LoRA")), str(saved("b_high.safetensors")),
             str(saved("c_high.safetensors", rank=2))]
    files = files[1:] if "format" in options else files
    merge(dry_run=True, lora=files, output=tmp_path / "x.safetensors", **options)
    merge(lora=files, output=tmp_path / "x.safetensors", **options)


def test_the_dry_run_of_a_sum_without_an_exact_form_refuses_it(tmp_path):
    """A LoKr and a pair on one module: neither a pair nor a full delta."""
    product = {"lora_unet_blocks_0_self_attn_q.lokr_w1": normal(4, 4), "lora_unet_blocks_0_self_attn_q.lokr_w2":
               normal(6, 6)}
    save_file(product, tmp_path / "a_high.safetensors")
    write_lora(tmp_path / "b_high.safetensors", random_state({Q: (HIDDEN, HIDDEN)}))
    files = [str(tmp_path / f"{name}_high.safetensors") for name in "ab"]
    with pytest.raises(UserError, match=r"their sum has no exact form .* --rank N"):
        merge(dry_run=True, lora=files, output=tmp_path / "x.safetensors")
    merge(dry_run=True, lora=files, rank="2", output=tmp_path / "x.safetensors")
    save_file({name: torch.full_like(tensor, float("nan")) for name, tensor in product.items()},
              tmp_path / "a_high.safetensors")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        merge(dry_run=True, lora=files, rank="2", output=tmp_path / "x.safetensors")
