"""Training over a base with adapters of every kind: the losses of the merged folder, at every precision of the base.
Going on from an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapwan.commands import merge
from lapwan.errors import UserError
from lapwan.lora.formats import open_lora, read_lora
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.load import load
from lapwan.settings.merge import MergeSettings

HIGH = NoiseExpert.HIGH
ON_HIGH = {"noise_experts": ["high"], "targets": {"last_blocks": 1, "ffn_last_blocks": 1}, "optimizer": {"lr": 5e-3}}
Q, STEM = "blocks.7.attn1.to_q", "diffusion_model.blocks.7.self_attn.q"


def normal(*shape: int, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def kinds() -> dict[str, dict[str, Tensor]]:
    pair = {f"{STEM}.lora_A.weight": normal(4, 192), f"{STEM}.lora_B.weight": normal(192, 4)}
    return {
        "LoRA": pair,
        "full delta": {f"{STEM}.diff": normal(192, 192, scale=0.05), f"{STEM}.diff_b": normal(192),
                       "diffusion_model.blocks.0.diff_m": normal(1, 6, 192),
                       "diffusion_model.patch_embedding.diff": normal(192, 16, 1, 2, 2, scale=0.05)},
        "LoKr": {f"{STEM}.lokr_w1": normal(8, 8), f"{STEM}.lokr_w2": normal(24, 24)},
        "LoHa": {f"{STEM}.hada_w{n}_{side}": normal(*((192, 2) if side == "a" else (2, 192)), scale=0.2)
                 for n in "12" for side in "ab"},
        "DoRA": {**pair, f"{STEM}.dora_scale": normal(192, 1).abs() + 0.5},
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Any:
    def write(kind: str) -> Path:
        path = tmp_path / f"{kind.replace(' ', '_')}_high.safetensors"
        save_file({name: tensor.clone() for name, tensor in kinds()[kind].items()}, path)
        return path
    return write


def fitted(trainer: Any) -> list[float]:
    trainer.config.run_folder.mkdir(exist_ok=True)
    trainer.fit()
    return [json.loads(row)["loss"] for row in (trainer.config.run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "dtype"), [
    ("full delta", "bf16"), ("LoKr", "bf16"), ("DoRA", "bf16"), ("full delta", "nf4"), ("LoKr", "fp8"),
    ("DoRA", "int8")])
@pytest.mark.usefixtures("own_cache")
def test_a_base_with_an_adapter_trains_as_the_merged_folder(
    make_lora: Any, tmp_path: Path, adapter: Any, kind: str, dtype: str
) -> None:
    """Folded at load, before quantising: bit for bit."""
    file = adapter(kind)
    values = {"model": "tiny", "lora": [str(file)], "output": str(tmp_path / "merged")}
    merge.run(load(MergeSettings, options=values, environment={}), RunOptions(False, False))
    common = {**ON_HIGH, "steps": 2, "dtype": dtype}
    in_memory = fitted(make_lora(**common, model={"model": "tiny", "lora": {"high": file}}, output=tmp_path / "a"))
    assert in_memory == fitted(make_lora(**common, model=str(tmp_path / "merged"), output=tmp_path / "b"))
    assert in_memory != fitted(make_lora(**common, output=tmp_path / "c"))


@pytest.mark.parametrize("kind", ["full delta", "DoRA"])
def test_resume_over_a_base_with_an_adapter_is_bitwise(
    make_lora: Any, tmp_path: Path, adapter: Any, kind: str
) -> None:
    common = {**ON_HIGH, "model": {"model": "tiny", "lora": {"high": adapter(kind)}}, "save_every": 1}
    fitted(make_lora(**common, steps=3, output=tmp_path / "whole"))
    fitted(make_lora(**common, steps=2, output=tmp_path / "parts"))
    fitted(make_lora(**common, steps=3, output=tmp_path / "parts", resume=True, allow_changed=True))
    whole, parts = (load_file(tmp_path / name / "lapwan_high_noise.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("kind", "remedy"), [
    ("LoKr", "lapwan merge --lora FILE --rank N"), ("LoHa", "lapwan merge --lora FILE --rank N"),
    ("full delta", "lapwan merge --model"), ("DoRA", "lapwan merge --model")])
def test_train_lora_goes_on_from_pairs_only(
    make_lora: Any, make_moe: Any, adapter: Any, kind: str, remedy: str
) -> None:
    with pytest.raises(UserError, match=rf"^init_lora.high = .*is a {kind}.*{remedy}"):
        make_lora(**ON_HIGH, init_lora={"high": adapter(kind)})
    with pytest.raises(UserError, match=rf"^base_lora.high = .*is a {kind}.*{remedy}"):
        make_moe(**ON_HIGH, base_lora={"high": adapter(kind)})


@pytest.mark.parametrize("kind", ["LoRA", "full delta", "LoKr", "LoHa"])
def test_experts_start_from_every_kind_with_a_low_rank_form(make_moe: Any, adapter: Any, kind: str) -> None:
    """At the experts' rank 8: the best approximation, of a LoHa of rank 4 ΔW itself; the rows beyond can be trained."""
    file = adapter(kind)
    trainer = make_moe(**ON_HIGH, init_lora={"high": file})
    (lora,) = read_lora(file).values()
    exact = lora.entries[Q].delta(torch.float64)
    u, s, vh = torch.linalg.svd(exact)
    want = u[:, :8] * s[:8] @ vh[:8]
    for family in trainer.objective.mixture.families:
        pair = trainer.objective.adapters[HIGH].state(family).entries[Q]
        assert pair.rank == 8 and bool((pair.down.norm(dim=1) > 1e-3).all())
        assert (pair.delta(torch.float64) - want).abs().max() < 1e-5 * want.abs().max()


def test_experts_do_not_start_from_what_depends_on_the_weights(make_moe: Any, adapter: Any) -> None:
    with pytest.raises(UserError, match=r"^init_lora.high = .* is a DoRA, .*no low-rank form"):
        make_moe(**ON_HIGH, init_lora={"high": adapter("DoRA")})


def test_the_rule_of_what_is_dropped_holds_in_training(make_lora: Any, make_moe: Any, adapter: Any) -> None:
    file = adapter("LoRA")
    tensors = load_file(file) | {"diffusion_model.blocks.0.cross_attn.k_img.diff": torch.ones(2)}
    save_file(tensors, file)
    for make, key in ((make_lora, "init_lora"), (make_moe, "init_lora"), (make_moe, "base_lora")):
        make(**ON_HIGH, **{key: {"high": file}})
        with pytest.raises(UserError, match="which --strict refuses"):
            make(**ON_HIGH, **{key: {"high": file}}, strict=True)
    tensors |= {"diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}
    save_file(tensors, file)
    with pytest.raises(UserError, match="--common-modules"):
        make_lora(**ON_HIGH, init_lora={"high": file})
    make_lora(**ON_HIGH, init_lora={"high": file}, common_modules=True)


@pytest.mark.parametrize("part", ["lora_B.weight", "alpha", "diff_b"])
def test_what_is_not_finite_is_refused_before_the_weights_are_loaded(
    make_lora: Any, make_moe: Any, adapter: Any, part: str
) -> None:
    file = adapter("LoRA")
    tensors = load_file(file) | {f"{STEM}.alpha": torch.tensor(4.0), f"{STEM}.diff_b": torch.ones(192)}
    tensors[f"{STEM}.{part}"].view(-1)[-1] = float("nan")
    save_file(tensors, file)
    message = rf"{STEM}.{part}' holds NaN or infinity .*module '{Q}"
    for make, values in (
        (make_lora, {"init_lora": {"high": file}}), (make_lora, {"model": {"model": "tiny", "lora": {"high": file}}}),
        (make_moe, {"base_lora": {"high": file}}), (make_moe, {"init_lora": {"high": file}}),
    ):
        with pytest.raises(UserError, match=message):
            make(**{**ON_HIGH, **values})
    (adapter_file,) = open_lora(file).values()  # inspect-weights reads it
    assert not adapter_file.modules[Q if part != "diff_b" else f"{Q}.bias"].entry().delta().isfinite().all()
