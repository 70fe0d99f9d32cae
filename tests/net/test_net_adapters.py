"""LoRAs and mixtures written in 2026-11 load and act as they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import run_successfully
from net_cases import (
    INSPECTED,
    LATENTS,
    LORAS,
    MIX,
    STAGE1,
    assert_figures,
    delta_weights,
    fingerprints,
    read_json,
    tensors,
)
from safetensors import safe_open
from safetensors.torch import save_file

from lapwan import inspect_weights, merge

SIDES = ("high", "low")
# A module's name in ComfyUI's layout, and in the base's folder.
RENAMED = {"self_attn": "attn1", "cross_attn": "attn2", ".q": ".to_q", ".k": ".to_k", ".v": ".to_v", ".o": ".to_out.0",
           "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}


def lora_words(layout: str, named: bool = False) -> tuple[str, ...]:
    """The stored LoRAs of a layout as arguments, with their noise experts or without: the files say them too."""
    if layout == "one_file":
        return "--lora", "loras/one_file.safetensors"
    return tuple(word for side in SIDES
                 for word in ("--lora", f"{f'{side}=' if named else ''}loras/{layout}_{side}_noise.safetensors"))


@pytest.mark.parametrize("layout", [*LORAS, "one_file"])
def test_a_lora_of_every_layout_has_the_same_delta_w(net: Path, layout: str) -> None:
    run_successfully("merge", *lora_words(layout, named=True), "--format", "comfy", "-o", "again.safetensors")
    stored = read_json(net / "expected" / "delta_w.json")
    for side in SIDES:
        now = fingerprints(net / f"again_{side}_noise.safetensors")
        assert now.keys() == stored[side].keys()
        assert_figures(stored[side], now, rtol=1e-6, atol=1e-9)


def test_every_layout_merges_into_the_same_model(net: Path) -> None:
    for layout in (*LORAS, "one_file"):
        run_successfully("merge", "--model", "base", *lora_words(layout), "-o", f"merged_{layout}")
    for side, folder in zip(SIDES, ("transformer", "transformer_2"), strict=True):
        name = f"{folder}/diffusion_pytorch_model.safetensors"
        base, merged = tensors(net / "base" / name), tensors(net / "merged_comfy" / name)
        for layout in (*LORAS[1:], "one_file"):
            other = tensors(net / f"merged_{layout}" / name)
            assert all(torch.equal(weight, other[key]) for key, weight in merged.items()), layout
        changed = set()
        for module, delta in delta_weights(net / "stage1" / f"lapwan_{side}_noise.safetensors").items():
            for old, new in RENAMED.items():
                module = module.replace(old, new)
            changed.add(key := module.removeprefix("diffusion_model.") + ".weight")
            torch.testing.assert_close(merged[key].double(), base[key].double() + delta, rtol=1e-6, atol=1e-7)
        assert {key for key, weight in merged.items() if not torch.equal(weight, base[key])} == changed


@pytest.mark.parametrize("folder", ["stage2", "stage2_base_lora"])
def test_a_mixture_at_one_mix_has_the_same_delta_w(net: Path, folder: str) -> None:
    outcome = run_successfully("merge", "--moe", f"{folder}/lapwan.safetensors", "--mix", MIX, "-o", "mix.safetensors")
    assert ("trained over a base LoRA" in outcome.err) == (folder == "stage2_base_lora")
    for side in SIDES:
        stored = read_json(net / "expected" / "mix_delta_w.json")[folder][side]
        assert_figures(stored, fingerprints(net / f"mix_{side}_noise.safetensors"), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LATENTS)
def test_generation_with_stored_adapters_gives_the_stored_latents(net: Path, name: str) -> None:
    run_successfully(*LATENTS[name], "-o", "now.safetensors")
    stored, now = net / "latents" / f"{name}.safetensors", net / "now.safetensors"
    torch.testing.assert_close(tensors(now)["latents"], tensors(stored)["latents"], rtol=1e-4, atol=1e-4)
    if name not in ("base", "loras"):
        others = [tensors(net / "latents" / f"{other}.safetensors")["latents"] for other in LATENTS if other != name]
        assert all((other - tensors(now)["latents"]).abs().max() > 1e-2 for other in others)  # so that a gate counts


def test_latents_repeat_from_the_settings_they_carry(net: Path) -> None:
    path = net / "latents" / "hint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    made_in = Path(read_settings(metadata)["model"]).parent
    moved = {key: value.replace(str(made_in), str(net)) for key, value in metadata.items()}
    save_file(tensors(path), net / "moved.safetensors", moved)
    run_successfully("generate", "--from", "moved.safetensors", "-o", "now.safetensors")
    torch.testing.assert_close(tensors(net / "now.safetensors")["latents"], tensors(path)["latents"],
                               rtol=1e-4, atol=1e-4)


def read_settings(metadata: dict[str, str]) -> dict[str, str]:
    """The settings that a generated file carries."""
    settings: dict[str, str] = json.loads(metadata["settings"])
    return settings


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_weights_says_what_it_said(net: Path, name: str) -> None:
    run_successfully("inspect-weights", *INSPECTED[name], "--json", "now.json")
    assert_figures(read_json(net / "expected" / f"inspect_{name}.json"), read_json(net / "now.json"), 1e-4, 1e-7)


def test_the_same_from_python(net: Path) -> None:
    stored = read_json(net / "expected" / "inspect_mixture.json")
    assert_figures(stored, inspect_weights("stage2/lapwan.safetensors"), 1e-4, 1e-7)
    merge("again.safetensors", loras=[word for word in STAGE1 if word != "--lora"])
    for side in SIDES:
        now = fingerprints(net / f"again_{side}_noise.safetensors")
        assert_figures(read_json(net / "expected" / "delta_w.json")[side], now, 1e-6, 1e-9)
