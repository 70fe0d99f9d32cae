"""Adapters of every kind in generation: low-rank pairs beside the weights, all other updates in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapwan.errors import UserError
from lapwan.lora.formats import open_lora, write_lora
from lapwan.lora.kinds import DoRA, FullDelta, GLoRA
from lapwan.lora.lycoris import LoHa, LoKr
from lapwan.lora.merge import LoraToMerge, plan_component, write_component
from lapwan.lora.state import AdapterState, LowRank
from lapwan.models.base import Base
from lapwan.models.spec import weight_files
from lapwan.names import NoiseExpert, Precision
from lapwan.sampling.adapters import read_adapters
from lapwan.settings.lora_argument import LoraArgument
from lapwan.tiny.resolve import resolve
from lapwan.wan.quantise.linears import QuantisedLinear
from lapwan.wan.quantise.load import Recipe

HIGH, WIDTH, FFN = NoiseExpert.HIGH, 192, 768
PAIR = "blocks.3.attn1.to_v"


def others() -> AdapterState:
    """One update of each kind that does not act beside the weights."""
    torch.manual_seed(0)
    pair = LowRank(torch.randn(4, WIDTH) * 0.1, torch.randn(FFN, 4) * 0.1, 4.0)
    return AdapterState({
        "blocks.0.attn1.to_q": LoKr({"lokr_w1": torch.randn(4, 4) * 0.1, "lokr_w2": torch.randn(48, 48) * 0.1}, None),
        "blocks.1.attn1.to_q": LoHa({part: torch.randn((WIDTH, 3) if part.endswith("a") else (3, WIDTH)) * 0.1
                                     for part in LoHa.PARTS}, 3.0),
        "blocks.0.ffn.net.0.proj": DoRA(pair, torch.rand(FFN) + 0.5),
        "blocks.2.ffn.net.0.proj": DoRA(pair, torch.rand(1, WIDTH) + 0.5),
        "blocks.3.ffn.net.0.proj": GLoRA({
            "glora_a1": torch.randn(WIDTH, 4) * 0.1, "glora_a2": torch.randn(4, WIDTH) * 0.1,
            "glora_b1": torch.randn(FFN, 4) * 0.1, "glora_b2": torch.randn(4, WIDTH) * 0.1}, None),
        "blocks.0.ffn.net.0.proj.bias": FullDelta(torch.randn(FFN) * 0.1),
        "blocks.0.attn2.norm_q": FullDelta(torch.randn(WIDTH) * 0.1),
        "blocks.0.scale_shift_table": FullDelta(torch.randn(1, 6, WIDTH) * 0.1),
        "scale_shift_table": FullDelta(torch.randn(1, 2, WIDTH) * 0.1),
        "patch_embedding": LowRank(torch.randn(4, 16, 1, 2, 2) * 0.1, torch.randn(WIDTH, 4, 1, 1, 1) * 0.1, 4.0),
    })


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`mixed`: other kinds and a pair; `others` without the pair."""
    folder, state = tmp_path_factory.mktemp("kinds"), others()
    write_lora(folder / "others_high.safetensors", state)
    state.entries[PAIR] = LowRank(torch.randn(4, WIDTH), torch.randn(WIDTH, 4), 4.0)
    write_lora(folder / "mixed_high.safetensors", state)
    return {name: folder / f"{name}_high.safetensors" for name in ("mixed", "others")}


@pytest.fixture(scope="module")
def merged(files, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of `lapwan merge` of `others` at 0.5."""
    base = Base(resolve("tiny"))
    paths = weight_files(base.spec.component(HIGH))
    lora = read_adapters(base, [LoraArgument(path=files["others"], strength=0.5)], None)[0].loras[HIGH][0][0]
    target = tmp_path_factory.mktemp("merged") / "dit.safetensors"
    write_component(plan_component(paths, [LoraToMerge(lora, 0.5, lora.fingerprint())], HIGH), [target], lambda _: None)
    return load_file(target)


def test_pairs_stay_beside_the_weights_and_the_rest_is_merged_at_load(files, merged) -> None:
    base = Base(resolve("tiny"))
    loaded, adapters = read_adapters(base, [LoraArgument(path=files["mixed"], strength=0.5)], None)
    (use,) = adapters.loras[HIGH]
    assert list(use.state.entries) == [PAIR] and use.strength == 0.5
    assert loaded.fingerprint(HIGH) != base.fingerprint(HIGH)
    assert loaded.fingerprint(NoiseExpert.LOW) == base.fingerprint(NoiseExpert.LOW)
    before, after = (model.load(HIGH).transformer.state_dict() for model in (base, loaded))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == len(others().entries) and f"{PAIR}.weight" not in changed
    assert all(torch.equal(after[name], merged[name]) for name in merged)


def test_quantised_weights_are_those_of_the_merged_model(files, merged) -> None:
    loaded, _ = read_adapters(Base(resolve("tiny")), [LoraArgument(path=files["mixed"], strength=0.5)], None)
    model = loaded.load(HIGH, recipe=Recipe(Precision.INT8)).transformer
    layer = model.get_submodule("blocks.0.ffn.net.0.proj")
    assert isinstance(layer, QuantisedLinear)
    assert torch.equal(layer.bias, merged["blocks.0.ffn.net.0.proj.bias"])
    weight = merged["blocks.0.ffn.net.0.proj.weight"]
    assert (layer.weight_as(torch.float32) - weight).abs().max() < 0.02 * weight.abs().max()
    for name in ("blocks.0.scale_shift_table", "scale_shift_table", "patch_embedding.weight"):
        assert torch.equal(model.get_parameter(name), merged[name])


def test_a_plain_lora_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    write_lora(tmp_path / "x_high.safetensors",
               AdapterState({PAIR: LowRank(torch.randn(4, WIDTH), torch.randn(WIDTH, 4), 4.0)}))
    base = Base(resolve("tiny"))
    assert read_adapters(base, [LoraArgument(path=tmp_path / "x_high.safetensors", strength=1.0)], None)[0] is base


def test_an_update_that_does_not_fit_is_named_before_weights_are_read(tmp_path: Path) -> None:
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(7)}, tmp_path / "x_high.safetensors")
    with pytest.raises(UserError, match=r"'blocks\.0\.norm2' changes a weight \[7\], but"):
        read_adapters(Base(resolve("tiny")), [LoraArgument(path=tmp_path / "x_high.safetensors", strength=1.0)], None)


def test_fold_names_an_update_that_does_not_fit_as_early(tmp_path: Path) -> None:
    save_file({"diffusion_model.blocks.0.norm3.diff": torch.ones(7)}, tmp_path / "x_high.safetensors")
    with pytest.raises(UserError, match=r"'blocks\.0\.norm2' changes a weight \[7\], but"):
        read_adapters(Base(resolve("tiny")), [LoraArgument(path=tmp_path / "x_high.safetensors")], None, fold=True)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("key", ["blocks.3.self_attn.v.lora_A.weight", "blocks.3.self_attn.v.alpha",
                                 "blocks.0.self_attn.q.lokr_w2", "blocks.0.ffn.0.dora_scale", "blocks.0.diff_m",
                                 "head.head.diff"])
def test_what_is_not_finite_is_named_with_and_without_fold(tmp_path: Path, fold: bool, key: str) -> None:
    a, b = torch.ones(2, WIDTH), torch.ones(WIDTH, 2)
    tensors = {
        "blocks.3.self_attn.v.lora_A.weight": a, "blocks.3.self_attn.v.lora_B.weight": b,
        "blocks.3.self_attn.v.alpha": torch.tensor(1.0),
        "blocks.0.self_attn.q.lokr_w1": torch.ones(4, 4), "blocks.0.self_attn.q.lokr_w2": torch.ones(48, 48),
        "blocks.0.ffn.0.lora_A.weight": a.clone(), "blocks.0.ffn.0.lora_B.weight": torch.ones(FFN, 2),
        "blocks.0.ffn.0.dora_scale": torch.ones(FFN, 1), "blocks.0.diff_m": torch.ones(1, 6, WIDTH),
        "head.head.diff": torch.ones(64, WIDTH),
    }
    tensors[key].view(-1)[-1] = float("inf")
    save_file(tensors, tmp_path / "x_high.safetensors")
    with pytest.raises(UserError, match=rf"x_high.safetensors: '{key}' holds NaN or infinity \(.*, module '"):
        read_adapters(Base(resolve("tiny")), [LoraArgument(path=tmp_path / "x_high.safetensors")], None, fold)


def test_a_large_full_delta_is_checked_while_it_is_merged(tmp_path: Path) -> None:
    """It is as large as the weight: it is not read before the work."""
    base = Base(resolve("tiny"))
    name = "time_projection.1.diff"
    value = torch.ones(6 * WIDTH, WIDTH)
    value[-1, -1] = float("nan")
    save_file({name: value}, tmp_path / "x_high.safetensors")
    (file,) = open_lora(tmp_path / "x_high.safetensors").values()
    merged = Base(base.spec, {HIGH: [(file, 1.0)]}).merged_weights(HIGH)
    with pytest.raises(UserError, match=rf"'{name}' holds NaN or infinity \(difference of the full delta, module '"):
        [weight() for weight in merged.values()]


def test_a_flat_pair_of_the_patch_embedding_is_merged(tmp_path: Path) -> None:
    """Its columns count the kernel, so it cannot act beside the weights as a Linear's."""
    a, b = torch.randn(4, 64) * 0.1, torch.randn(WIDTH, 4) * 0.1
    save_file({"patch_embedding.lora_A.weight": a, "patch_embedding.lora_B.weight": b}, tmp_path / "x_high.safetensors")
    base = Base(resolve("tiny"))
    loaded, adapters = read_adapters(base, [LoraArgument(path=tmp_path / "x_high.safetensors", strength=1.0)], None)
    assert not adapters.loras[HIGH]
    before, after = (model.load(HIGH).transformer.patch_embedding.weight for model in (base, loaded))
    assert (after - before - (b @ a).view_as(before)).abs().max() < 1e-2 * (b @ a).abs().max()
