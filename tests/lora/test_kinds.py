"""Every kind of update: its ΔW by an independent formula in fp64, its files, its merge, and where it is refused.

Files are made as the tools that people have write them, with names of the small transformer of `lora_cases`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import FFN, HIDDEN, TEXT, make_transformer, merge, random_state, shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapwan.checkpoints.container import TensorFile, read_header
from lapwan.checkpoints.lora_keys import LAYOUTS
from lapwan.checkpoints.rewrite import rewrite
from lapwan.checkpoints.wan_keys import parameter_name, target_path
from lapwan.errors import UserError
from lapwan.lora.attach import Group, attach, initial_state
from lapwan.lora.combine import combine
from lapwan.lora.formats import open_lora, read_lora, write_both, write_lora
from lapwan.lora.kinds import DoRA, FullDelta, GLoRA, build_update
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.state import AdapterState, LowRank, Term, WeightUpdate
from lapwan.names import NoiseExpert

Reference = Callable[[Tensor], Tensor]  # W in fp64 -> ΔW in fp64


def normal(*shape: int, seed: int = 0, scale: float = 0.1, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * scale).to(dtype)


def lokr(
    names: tuple[str, str], shapes: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[dict[str, Tensor], Reference]:
    """A LoKr: each factor `whole`, or a `pair` of rank 3."""
    tensors: dict[str, Tensor] = {}
    factors, rank = [], None
    for n, (form, (rows, columns)) in enumerate(zip(names, shapes, strict=True), 1):
        if form == "whole":
            tensors[f"lokr_w{n}"] = factor = normal(rows, columns, seed=n, scale=0.5)
            factors.append(factor.double())
        else:
            a, b = normal(rows, 3, seed=n, scale=0.5), normal(3, columns, seed=n + 7, scale=0.5)
            tensors |= {f"lokr_w{n}_a": a, f"lokr_w{n}_b": b}
            factors.append(a.double() @ b.double())
            rank = 3
    scale = 1.0 if rank is None else 2.0 / rank
    return {**tensors, "alpha": torch.tensor(2.0)}, lambda _: scale * torch.kron(*factors)


def loha(out: int, columns: int) -> tuple[dict[str, Tensor], Reference]:
    a1, b1, a2, b2 = normal(out, 2), normal(2, columns), normal(out, 2, seed=5), normal(2, columns, seed=6)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(3.0)}
    return tensors, lambda _: 1.5 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())


def dora(out: int, columns: int, magnitude: str) -> tuple[dict[str, Tensor], Reference]:
    a, b = normal(4, columns, dtype=torch.bfloat16), normal(out, 4, dtype=torch.bfloat16)
    m = torch.rand(out, generator=torch.Generator().manual_seed(out)) + 0.5
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "alpha": torch.tensor(2.0)}
    tensors[magnitude] = m[:, None].clone() if magnitude == "dora_scale" else m

    def reference(weight: Tensor) -> Tensor:
        moved = weight + 0.5 * b.double() @ a.double()
        return m.double()[:, None] * moved / moved.square().sum(1, keepdim=True).sqrt() - weight

    return tensors, reference


def dora_by_column(out: int, columns: int) -> tuple[dict[str, Tensor], Reference]:
    a, b, m = normal(4, columns), normal(out, 4), normal(1, columns).abs() + 0.5

    def reference(weight: Tensor) -> Tensor:
        moved = weight + 0.75 * b.double() @ a.double()
        return m.double() * moved / moved.square().sum(0, keepdim=True).sqrt() - weight

    return {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(3.0), "dora_scale": m}, reference


def glora(out: int, columns: int, old: bool) -> tuple[dict[str, Tensor], Reference]:
    p, q, u, d = normal(columns, 3), normal(3, columns, seed=1), normal(out, 3), normal(3, columns, seed=2)
    factors = (q, p, d, u) if old else (p, q, u, d)
    tensors = dict(zip(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), factors, strict=True))
    return {**tensors, "alpha": torch.tensor(1.5)}, lambda w: 0.5 * (
        w @ p.double() @ q.double() + u.double() @ d.double())


def full(*shape: int) -> tuple[Tensor, Reference]:
    value = normal(*shape, dtype=torch.bfloat16)
    return value, lambda _: value.double()


def wild(kind: str) -> tuple[dict[str, Tensor], dict[str, Reference]]:
    """(tensors of a file, ΔW by the tensor that changes) of one kind, as a common tool writes it."""
    tensors: dict[str, Tensor] = {}
    references: dict[str, Reference] = {}

    def add(stem: str, target: str, parts: dict[str, Tensor], reference: Reference) -> None:
        tensors.update({f"{stem}.{part}": tensor for part, tensor in parts.items()})
        references[target] = reference

    if kind == "full delta":
        for name, target, shape in (
            ("blocks.0.self_attn.q.diff_b", "blocks.0.attn1.to_q.bias", (HIDDEN,)),
            ("blocks.0.cross_attn.k.diff", "blocks.0.attn2.to_k.weight", (HIDDEN, HIDDEN)),
            ("blocks.0.self_attn.norm_k.diff", "blocks.0.attn1.norm_k.weight", (HIDDEN,)),
            ("blocks.1.norm3.diff", "blocks.1.norm2.weight", (HIDDEN,)),
            ("blocks.1.norm3.diff_b", "blocks.1.norm2.bias", (HIDDEN,)),
            ("blocks.2.diff_m", "blocks.2.scale_shift_table", (1, 6, HIDDEN)),
            ("head.diff_m", "scale_shift_table", (1, 2, HIDDEN)),
            ("head.head.diff", "proj_out.weight", (64, HIDDEN)),
            ("patch_embedding.diff", "patch_embedding.weight", (HIDDEN, 16, 1, 2, 2)),
            ("patch_embedding.diff_b", "patch_embedding.bias", (HIDDEN,)),
            ("text_embedding.0.diff", "condition_embedder.text_embedder.linear_1.weight", (HIDDEN, TEXT)),
            ("time_projection.1.diff_b", "condition_embedder.time_proj.bias", (6 * HIDDEN,)),
        ):
            tensors[f"diffusion_model.{name}"], references[target] = full(*shape)
        a, b = normal(4, HIDDEN, dtype=torch.bfloat16), normal(HIDDEN, 4, dtype=torch.bfloat16)  # with pairs, as met
        add("diffusion_model.blocks.0.self_attn.q", "blocks.0.attn1.to_q.weight",
            {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(1.0, dtype=torch.bfloat16)},
            lambda _: b.double() @ a.double() / 4)
    elif kind == "LoKr":
        add("lora_unet_blocks_0_self_attn_q", "blocks.0.attn1.to_q.weight", *lokr(("whole", "pair"), ((4, 4), (6, 6))))
        add("lora_unet_blocks_0_ffn_0", "blocks.0.ffn.net.0.proj.weight", *lokr(("pair", "pair"), ((8, 4), (5, 6))))
        add("lycoris_blocks_2_ffn_2", "blocks.2.ffn.net.2.weight", *lokr(("whole", "whole"), ((3, 8), (8, 5))))
    elif kind == "LoHa":
        add("lora_unet_blocks_1_ffn_0", "blocks.1.ffn.net.0.proj.weight", *loha(FFN, HIDDEN))
        add("lora_unet_blocks_1_cross_attn_o", "blocks.1.attn2.to_out.0.weight", *loha(HIDDEN, HIDDEN))
        parts, reference = loha(HIDDEN, 64)  # of a convolution: the kernel is counted into the columns
        add("diffusion_model.patch_embedding", "patch_embedding.weight", parts,
            lambda w: reference(w).reshape(HIDDEN, 16, 1, 2, 2))
    elif kind == "DoRA":
        add("diffusion_model.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj.weight", *dora(FFN, HIDDEN, "dora_scale"))
        add("diffusion_model.blocks.1.ffn.2", "blocks.1.ffn.net.2.weight", *dora(HIDDEN, FFN, "lora_magnitude_vector"))
        add("diffusion_model.blocks.2.ffn.2", "blocks.2.ffn.net.2.weight",
            *dora(HIDDEN, FFN, "lora_magnitude_vector.weight"))
        add("diffusion_model.blocks.0.ffn.2", "blocks.0.ffn.net.2.weight", *dora_by_column(HIDDEN, FFN))
        add("diffusion_model.blocks.1.self_attn.o", "blocks.1.attn1.to_out.0.weight", *dora_by_column(HIDDEN, HIDDEN))
    elif kind == "GLoRA":
        add("diffusion_model.blocks.0.ffn.0", "blocks.0.ffn.net.0.proj.weight", *glora(FFN, HIDDEN, True))
        add("lycoris_blocks_1_ffn_2", "blocks.1.ffn.net.2.weight", *glora(HIDDEN, FFN, False))
    else:  # convolution LoRA
        a, b = normal(4, 16, 1, 2, 2), normal(HIDDEN, 4, 1, 1, 1)
        add("diffusion_model.patch_embedding", "patch_embedding.weight", {"lora_A.weight": a, "lora_B.weight": b},
            lambda _: torch.einsum("orabc,rixyz->oixyz", b.double(), a.double()))
    return tensors, references


WILD = ("full delta", "LoKr", "LoHa", "DoRA", "GLoRA", "convolution LoRA")


def written(folder: Path, kind: str, **extra: Tensor) -> Path:
    path = folder / f"{kind.replace(' ', '_')}_high.safetensors"
    save_file({name: tensor.clone() for name, tensor in {**wild(kind)[0], **extra}.items()}, path)
    return path


def only(path: Path) -> AdapterState:
    (state,) = read_lora(path).values()
    return state


def base_weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: (weight + 0.01).to(dtype).clone() for name, weight in make_transformer(3).state_dict().items()}


@pytest.mark.parametrize("kind", WILD)
def test_delta_is_the_formulas(tmp_path: Path, kind: str) -> None:
    weights, (_, references) = base_weights(), wild(kind)
    state = only(written(tmp_path, kind))
    assert {parameter_name(path) for path in state.entries} == set(references)
    for path, update in state.entries.items():
        name = parameter_name(path)
        weight = weights[name]
        want = references[name](weight.double())
        got, norm = update.delta(weight=weight).reshape(want.shape), update.norm(weight)
        assert got.dtype == torch.float32 and (got.double() - want).abs().max() < 1e-6, path
        assert norm == pytest.approx(want.square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("kind", WILD)
@pytest.mark.parametrize(("dtype", "cancels"), [
    (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_merged_weights_are_the_rounded_sum(tmp_path: Path, kind: str, dtype: torch.dtype, cancels: bool) -> None:
    """Within one ulp of the result, however little of W its update leaves."""
    weights, (_, references) = base_weights(dtype), wild(kind)
    if cancels:
        weights |= {name: (-0.7 * change(weights[name].double())).to(dtype) for name, change in references.items()}
    save_file(weights, tmp_path / "dit.safetensors")
    merge(dit=tmp_path / "dit.safetensors", lora=[f"{written(tmp_path, kind)}:0.7"], verify="true",
          output=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")
    for name, weight in weights.items():
        if name not in references:
            assert torch.equal(got[name], weight), name
            continue
        exact = weight.double() + 0.7 * references[name](weight.double())
        info = torch.finfo(dtype)
        ulp = 2.0 ** exact.abs().clamp_min(info.smallest_normal).log2().floor() * info.eps
        assert ((got[name].double() - exact).abs() <= ulp + 1e-15 * weight.double().abs()).all(), name
        assert not torch.equal(got[name], weight), name


def test_terms_of_one_weight_start_from_the_base(tmp_path: Path) -> None:
    """A DoRA sees W, not W with the other files merged before it: the order of the files does not matter."""
    weights, (_, references) = base_weights(torch.float64), wild("DoRA")
    save_file(weights, tmp_path / "dit.safetensors")
    name = "blocks.0.ffn.net.0.proj.weight"
    other = random_state({"blocks.0.ffn.net.0.proj": (FFN, HIDDEN)})
    write_lora(tmp_path / "plain_high.safetensors", other)
    files = [str(written(tmp_path, "DoRA")), str(tmp_path / "plain_high.safetensors")]
    for order in (files, files[::-1]):
        merge(dit=tmp_path / "dit.safetensors", lora=order, output=tmp_path / "out.safetensors", overwrite=True)
        want = weights[name] + references[name](weights[name]) + other.entries["blocks.0.ffn.net.0.proj"].delta(
            torch.float64)
        assert (load_file(tmp_path / "out.safetensors")[name] - want).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr", "DoRA"])
def test_tucker_cores_of_a_convolution(tmp_path: Path, kind: str) -> None:
    """As LyCORIS stores them: A [r, out] in LoHa and LoKr, [out, r, 1, ...] in LoCon."""
    kernel, b = (1, 2, 2), normal(3, 16)
    core, core2 = normal(3, 3, *kernel, scale=1.0), normal(3, 3, *kernel, seed=1, scale=1.0)

    def product(a: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("po,pqxyz,qi->oixyz", a.double(), t.double(), b.double())

    a = normal(3, HIDDEN)
    if kind == "LoHa":
        a2, b2 = normal(3, HIDDEN, seed=4), normal(3, 16, seed=4)
        parts = {"hada_t1": core, "hada_w1_a": a, "hada_w1_b": b, "hada_t2": core2, "hada_w2_a": a2, "hada_w2_b": b2}
        want = product(a, core, b) * product(a2, core2, b2)
    elif kind == "LoKr":
        w1, a, b = normal(2, 2, scale=1.0), normal(3, HIDDEN // 2), normal(3, 8)
        parts = {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        want = torch.kron(w1.double()[..., None, None, None], product(a, core, b).contiguous())
    else:
        parts = {"lora_down.weight": b[..., None, None, None], "lora_mid.weight": core,
                 "lora_up.weight": a.T.contiguous()[..., None, None, None]}
        want = product(a, core, b)
    weight = base_weights(torch.float64)["patch_embedding.weight"]
    want = want * 2 / 3
    if kind == "DoRA":
        parts["dora_scale"] = torch.rand(1, 16, 1, 1, 1) + 0.5  # by input channel
        moved = weight + want
        length = moved.square().sum((0, 2, 3, 4), keepdim=True).sqrt()
        want = parts["dora_scale"].double() * moved / length - weight
    parts["alpha"] = torch.tensor(2.0)
    save_file({f"lycoris_patch_embedding.{part}": tensor for part, tensor in parts.items()}, tmp_path / "x.safetensors")
    (update,) = only(tmp_path / "x.safetensors").entries.values()
    assert (update.delta(torch.float64, weight).reshape(weight.shape) - want).abs().max() < 1e-6
    save_file(base_weights(torch.float32), tmp_path / "dit.safetensors")
    merge(dit=tmp_path / "dit.safetensors", lora=[str(tmp_path / "x.safetensors")], verify="true",
          output=tmp_path / "out.safetensors")
    got = load_file(tmp_path / "out.safetensors")["patch_embedding.weight"]
    assert (got.double() - weight.float().double() - want).abs().max() < 1e-6


def same(a: AdapterState, b: AdapterState, tolerance: float = 0.0) -> None:
    assert a.entries.keys() == b.entries.keys()
    weights = base_weights(torch.float64)
    for path, update in a.entries.items():
        assert update.kind == b.entries[path].kind
        first, second = (u.delta(torch.float64, weights[parameter_name(path)]) for u in (update, b.entries[path]))
        assert (first - second).abs().max() <= tolerance, path


def test_magnitudes_by_row_of_a_convolution_as_peft_writes_them(tmp_path: Path) -> None:
    a, b, weight = normal(4, 16, 1, 2, 2), normal(HIDDEN, 4, 1, 1, 1), base_weights(torch.float64)
    m = torch.rand(1, HIDDEN, 1, 1, 1) + 0.5
    save_file({"patch_embedding.lora_A.weight": a, "patch_embedding.lora_B.weight": b,
               "patch_embedding.lora_magnitude_vector": m}, tmp_path / "x.safetensors")
    (update,) = only(tmp_path / "x.safetensors").entries.values()
    before = weight["patch_embedding.weight"].flatten(1)
    moved = before + b.double().flatten(1) @ a.double().flatten(1)
    want = m.double().reshape(-1, 1) * moved / moved.norm(dim=1, keepdim=True) - before
    got = update.delta(torch.float64, weight["patch_embedding.weight"]).flatten(1)
    assert (got - want).abs().max() < 1e-6


@pytest.mark.parametrize("update", [
    *(LoKr({**w1, **w2}, -3.0)
      for w1 in ({"lokr_w1": normal(3, 4)}, {"lokr_w1_a": normal(3, 2), "lokr_w1_b": normal(2, 4)})
      for w2 in ({"lokr_w2": normal(20, 11)}, {"lokr_w2_a": normal(20, 2), "lokr_w2_b": normal(2, 11)})),
    LoHa({"hada_w1_a": normal(60, 2), "hada_w1_b": normal(2, 44), "hada_w2_a": normal(60, 2, seed=1),
          "hada_w2_b": normal(2, 44, seed=1)}, 5.0),
    LoHa({"hada_w1_a": normal(60, 4), "hada_w1_b": normal(4, 44), "hada_w2_a": normal(60, 4, seed=1),
          "hada_w2_b": normal(4, 44, seed=1)}, 5.0),  # of full rank: no factors
])
@pytest.mark.parametrize("multiplier", [1.0, -0.5])
def test_low_rank_of_a_product_is_that_of_its_delta(update: WeightUpdate, multiplier: float) -> None:
    """Eckart-Young: the best rank 6, and the energy of all singular values, from the factors where there are any."""
    exact = multiplier * update.delta(torch.float64)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    state, energy = combine([(AdapterState({"blocks.0.attn1.to_q": update}), multiplier)], rank=6)
    got = state.entries["blocks.0.attn1.to_q"].delta(torch.float64)
    assert (got - (u[:, :6] * s[:6]) @ vh[:6]).abs().max() < 1e-6 * exact.abs().max()
    kept = (s[:6].square().sum() / s.square().sum()).item()
    assert energy is not None and energy.total == pytest.approx(kept, rel=1e-7)


def test_a_sum_of_products_keeps_its_factors() -> None:
    loha = LoHa({"hada_w1_a": normal(60, 2), "hada_w1_b": normal(2, 44), "hada_w2_a": normal(60, 2, seed=1),
                 "hada_w2_b": normal(2, 44, seed=1)}, 5.0)
    pair = LowRank(normal(3, 44), normal(60, 3), 6.0)
    state, energy = combine([(AdapterState({"blocks.0.attn1.to_q": u}), m) for u, m in ((loha, 1.0), (pair, -2.0))], 7)
    want = loha.delta(torch.float64) - 2 * pair.delta(torch.float64)
    got = state.entries["blocks.0.attn1.to_q"].delta(torch.float64)
    assert (got - want).abs().max() < 1e-6 * want.abs().max() and energy is not None and energy.total > 1 - 1e-9


@pytest.mark.parametrize("kind", WILD)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_of_every_layout_that_has_the_kind(tmp_path: Path, kind: str, layout: str) -> None:
    state = only(written(tmp_path, kind))
    if layout == "musubi" and kind in ("LoHa", "LoKr"):  # musubi takes no patch embedding, and no w1 of two factors
        path = "patch_embedding" if kind == "LoHa" else "blocks.0.ffn.net.0.proj"
        left_out = AdapterState({path: state.entries.pop(path)})
        with pytest.raises(UserError, match=rf"is a {kind}, which this layout does not have"):
            write_lora(tmp_path / "x.safetensors", left_out, layout)
    has = {"comfy": set(WILD), "musubi": {"LoKr", "LoHa"}, "diffusers": {"convolution LoRA"}}[layout]
    path = tmp_path / "back.safetensors"
    if kind not in has:
        with pytest.raises(UserError, match=rf"is a {kind}, which this layout does not have; write the comfy layout"):
            write_lora(path, state, layout)
        assert not path.exists()
        return
    write_lora(path, state, layout)
    # comfy folds alpha outside the blocks into a factor, which rounds once.
    same(only(path), state, 1e-7 if kind == "LoHa" else 0.0)
    assert read_header(path).metadata["lapwan.fingerprint"] == only(path).fingerprint()
    kinds = json.loads(read_header(path).metadata["lapwan.kinds"])
    assert kinds[kind] == sum(update.kind == kind for update in state.entries.values())
    write_lora(path, state, layout, torch.float32, fold_alpha=True)
    assert layout == "musubi" or not any(name.endswith(".alpha") for name in read_header(path).tensors)
    assert all(update.scale == 1.0 for update in only(path).entries.values())
    same(only(path), state, 1e-6)


def test_one_file_for_both_noise_experts_holds_every_kind(tmp_path: Path) -> None:
    states = {NoiseExpert.HIGH: only(written(tmp_path, "full delta")), NoiseExpert.LOW: only(written(tmp_path, "LoKr"))}
    write_both(tmp_path / "both.safetensors", states)
    back = read_lora(tmp_path / "both.safetensors")
    for noise_expert, state in states.items():
        same(back[noise_expert], state)


UPDATES = st.sampled_from(["pair", "full", "lokr", "loha", "glora", "dora", "dora by column"])


@given(UPDATES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.floats(-2, 2), st.integers(0, 99))
def test_any_tiles_give_the_whole(form: str, out: int, columns: int, step: int, multiplier: float, seed: int) -> None:
    def draw(*shape: int) -> Tensor:
        return normal(*shape, seed=seed, scale=1.0)

    update: WeightUpdate = {
        "pair": lambda: LowRank(draw(2, columns), draw(out, 2), 0.5),
        "full": lambda: FullDelta(draw(out, columns)),
        "lokr": lambda: LoKr({"lokr_w1": draw(out, 2), "lokr_w2_a": draw(3, 2), "lokr_w2_b": draw(2, columns)}, 0.5),
        "loha": lambda: LoHa({"hada_w1_a": draw(out, 2), "hada_w1_b": draw(2, columns), "hada_w2_a": draw(out, 3),
                              "hada_w2_b": draw(3, columns)}, 0.5),
        "glora": lambda: GLoRA({"glora_a1": draw(columns, 2), "glora_a2": draw(2, columns), "glora_b1": draw(out, 2),
                                "glora_b2": draw(2, columns)}, 0.5),
        "dora by column": lambda: DoRA(LowRank(draw(2, columns), draw(out, 2), 0.5), draw(1, columns)),
        "dora": lambda: DoRA(LowRank(draw(2, columns), draw(out, 2), 0.5), draw(out)),
    }[form]()
    rows, width = update.shape
    weight = normal(rows, width, seed=seed + 1, scale=1.0).double()
    want = update.delta(torch.float64, weight)
    work, add_rows = weight.clone(), update.prepare(multiplier, torch.float64, lambda first, n: weight[first:first + n])
    for first in range(0, rows, step):
        add_rows(work[first : first + step], weight[first : first + step], first)
    torch.testing.assert_close(work, weight + multiplier * want, rtol=0, atol=1e-12)
    assert update.norm(weight) == pytest.approx(float(want.norm()), rel=1e-9, abs=1e-12)
    assert build_update(update.parts(), update.alpha).delta(torch.float64, weight).equal(want)
    torch.testing.assert_close(update.folded(torch.float64).delta(torch.float64, weight), want, rtol=1e-6, atol=1e-6)
    if not form.startswith("dora"):
        scaled = update.scaled(multiplier).delta(torch.float64, weight)
        torch.testing.assert_close(scaled, multiplier * want, rtol=1e-6, atol=1e-6)


def test_fingerprints_tell_kinds_scales_and_contents_apart() -> None:
    def fingerprint(update: WeightUpdate) -> str:
        return AdapterState({"blocks.0.attn1.to_q": update}).fingerprint()

    tensors = {"lokr_w1": normal(2, 2), "lokr_w2_a": normal(3, 2), "lokr_w2_b": normal(2, 3)}
    base = LoKr(tensors, 1.0)
    turned = LoKr({**tensors, "lokr_w1": tensors["lokr_w1"].T.contiguous()}, 1.0)
    prints = [fingerprint(u) for u in (base, LoKr(tensors, 2.0), turned, FullDelta(base.delta()),
                                       FullDelta(base.delta().flatten()))]
    assert len(set(prints)) == 5
    assert fingerprint(base.map(lambda tensor: tensor.double())) == prints[0]


def test_sums_in_a_file(tmp_path: Path) -> None:
    state = only(written(tmp_path, "full delta"))
    half = AdapterState({path: update.map(lambda tensor: tensor.float()) for path, update in state.entries.items()})
    total, _ = combine([(half, 1.0), (half, -0.25)])
    for path, update in half.entries.items():
        torch.testing.assert_close(total.entries[path].delta(), 0.75 * update.delta(), rtol=1e-6, atol=1e-7)
    products = only(written(tmp_path, "LoKr"))
    alone, _ = combine([(products, 0.5)])
    for path, update in products.entries.items():
        torch.testing.assert_close(alone.entries[path].delta(), 0.5 * update.delta(), rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match=r"a LoKr \[40, 24\] and a LoKr \[40, 24\]: their sum has no exact .*--rank N"):
        combine([(products, 1.0), (products, 1.0)])
    with pytest.raises(UserError, match=r"a DoRA cannot be written at strength 0\.5"):
        combine([(only(written(tmp_path, "DoRA")), 0.5)])


@pytest.mark.parametrize("kind", WILD)
def test_the_stacked_forward_takes_low_rank_pairs_only(tmp_path: Path, kind: str) -> None:
    state = only(written(tmp_path, kind))
    assert open_lora(written(tmp_path, kind)) == open_lora(written(tmp_path, kind))  # as switching adapters compares
    remedy = "--lora FILE --rank N" if kind == "LoKr" else "--model"  # the others have what no pair can be
    with pytest.raises(UserError, match=rf"module '.+' .*is a {kind}; only low-rank pairs.*lapwan merge {remedy}"):
        attach(make_transformer(0), [Group("lora", state, trainable=True)])
    (file,) = open_lora(tmp_path / f"{kind.replace(' ', '_')}_high.safetensors").values()
    with pytest.raises(UserError, match=rf"init_lora: module '.+' .*is a {kind}"):
        file.ranks("init_lora")
    transformer = make_transformer(0)
    plain = initial_state(transformer, dict.fromkeys(shapes([0]), 2), None, 0, "high")
    assert attach(transformer, [Group("lora", plain, trainable=True)]).parameters()


@pytest.mark.parametrize(("change", "message"), [
    ({"diffusion_model.blocks.9.norm3.diff": torch.ones(HIDDEN)}, r"module 'blocks\.9\.norm2' is not in"),
    ({"diffusion_model.blocks.2.norm3.diff": torch.ones(5)}, r"'blocks\.2\.norm2' changes a weight \[5\], but .*24\]"),
    ({"diffusion_model.blocks.2.diff_m": torch.ones(6, HIDDEN)}, r"changes a weight \[6, 24\], but .*\[1, 6, 24\]"),
])
def test_an_update_for_another_model_is_named(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    save_file(base_weights(), tmp_path / "dit.safetensors")
    lora = written(tmp_path, "LoKr", **change)
    with pytest.raises(UserError, match=message):
        merge(dit=tmp_path / "dit.safetensors", lora=[str(lora)], output=tmp_path / "out.safetensors")


def test_every_tensor_of_the_model_is_a_target_or_known_not_to_be() -> None:
    others = [name for name in base_weights() if target_path(name) is None]
    assert others == []
    assert target_path("blocks.0.norm3.weight") == "blocks.0.norm2"
    assert [target_path(name) for name in ("blocks.0.norm1.weight", "blocks.0.attn1.to_q.scale", "head.modulations",
                                           "blocks.0.modulation.weight", "img_emb.proj.0.weight")] == [None] * 5


class CountedFile(TensorFile):
    """Notes the bytes of each read."""

    sizes: ClassVar[list[int]] = []

    def read_into(self, view: memoryview, name: str, offset: int = 0) -> None:
        self.sizes.append(len(view))
        super().read_into(view, name, offset)


def test_a_full_delta_is_merged_without_reading_it_whole(tmp_path: Path) -> None:
    weight = torch.zeros(4096, 1024, dtype=torch.bfloat16)
    save_file({"blocks.0.attn1.to_q.weight": weight}, tmp_path / "dit.safetensors")
    delta = normal(4096, 1024, dtype=torch.bfloat16)
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": delta}, tmp_path / "delta_high.safetensors")
    (lora,) = open_lora(tmp_path / "delta_high.safetensors").values()
    (module,) = lora.modules.values()
    counted = CountedFile(**vars(module.file))
    rewrite(read_header(tmp_path / "dit.safetensors"), tmp_path / "out.safetensors",
            {"blocks.0.attn1.to_q.weight": [Term(replace(module, file=counted), 1.0)]}, {})
    assert sum(counted.sizes) == delta.nbytes and max(counted.sizes) <= delta.nbytes // 4
    assert torch.equal(load_file(tmp_path / "out.safetensors")["blocks.0.attn1.to_q.weight"], delta)
