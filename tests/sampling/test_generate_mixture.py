"""A mixture at generation: routing, hints, strengths, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import random_lora, random_mixture
from sampling_cases import frames, generate

from lapwan.errors import UserError
from lapwan.lora.assign import LoraRequest, assign
from lapwan.lora.formats import write_lora
from lapwan.models.base import Base
from lapwan.models.spec import ModelSpec
from lapwan.moe.mixture import Mixture
from lapwan.moe.mixture_file import read_mixture, write_mixture
from lapwan.names import NoiseExpert
from lapwan.sampling.adapters import read_adapters
from lapwan.sampling.expert_mix import alpha_vector, choose_mix
from lapwan.sampling.generator import Generator
from lapwan.settings.lora_argument import LoraArgument

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW


def no_text() -> torch.Tensor:
    raise AssertionError("the text was asked for")


def test_alpha_expert_zero_is_the_base_exactly(t2v, mixture_file, small) -> None:
    base = Generator(t2v).latents(small(t2v))
    generator = Generator(*read_adapters(Base(t2v), (), mixture_file))
    assert torch.equal(generator.latents(small(t2v, alpha_expert=0.0)), base)
    assert (generator.generate(small(t2v, alpha_expert=0.0)).frames == Generator(t2v).generate(small(t2v)).frames).all()
    changed = generator.latents(small(t2v))
    assert (changed - base).abs().max() > 1e-3


def test_a_hint_forces_its_expert(t2v, mixture_file, small) -> None:
    """Gates are one-hot × w(σ), and the video is that of the expert alone as a LoRA of strength w(σ)."""
    adapters = read_adapters(Base(t2v), (), mixture_file)[1]
    mixture = adapters.mixture
    mix = choose_mix(mixture, "剪刀剪断组织", "hook", no_text)
    assert mix.source == "hint" and mix.mix_1E.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    for noise_expert, sigma in ((HIGH, 0.95), (LOW, 0.4)):
        w = mixture.timestep_gate(noise_expert)(torch.tensor([sigma]))
        gates = adapters.gates(noise_expert, sigma, mix.mix_1E, 1.0, None)
        assert torch.equal(gates, torch.tensor([[0.0, 1.0, 0.0, 0.0]]) * w)
    video = Generator(t2v, adapters).generate(small(t2v, hint="hook"))
    assert video.facts["moe"]["mix"] == {"scissors": 0.0, "hook": 1.0, "suction": 0.0, "other": 0.0}
    assert video.facts["moe"]["by"] == "hint"
    for gates in video.facts["moe"]["gates"].values():  # w(σ)·g by name
        assert list(gates) == list(video.facts["moe"]["mix"]) and gates["hook"] > 0 == gates["suction"]
    for states in mixture.states.values():  # the other experts do not matter at all
        for family in ("scissors", "suction", "other"):
            for entry in states[family].entries.values():
                entry.up.mul_(50.0)
    assert (Generator(t2v, adapters).generate(small(t2v, hint="hook")).frames == video.frames).all()


@pytest.mark.parametrize("hint", ["Hook/Electrocautery", "hook", "电凝钩"])
def test_hints_as_people_type_them(hint, t2v) -> None:
    assert choose_mix(random_mixture(t2v), "", hint, no_text).shares()["hook"] == 1.0


def test_a_mixed_hint_is_taken_as_it_is(t2v) -> None:
    """No softmax and no top-k on hints."""
    mixture = random_mixture(t2v, top_k=1)
    shares = choose_mix(mixture, "", "hook:0.5,suction:0.3,scissors:0.2", no_text).shares()
    assert shares == pytest.approx({"hook": 0.5, "suction": 0.3, "scissors": 0.2, "other": 0.0})


def test_without_a_hint_the_router_reads_the_prompt(t2v, mixture_file, small) -> None:
    generator = Generator(*read_adapters(Base(t2v), (), mixture_file))
    request = small(t2v)
    mixture = generator.adapters.mixture
    mix = generator.route(request)
    expected = mixture.select(mixture.route([generator.text_features(request.prompt)]))
    assert mix.source == "router" and torch.equal(mix.mix_1E, expected)
    assert (expected > 0).sum() == 2 and expected.sum().item() == pytest.approx(1.0)  # top-2, renormalised
    other = generator.route(dataclasses.replace(request, prompt="A grasper holds a specimen bag"))
    assert not torch.equal(other.mix_1E, mix.mix_1E)


def test_rule_and_label_routers_read_the_prompts_words(t2v) -> None:
    rule = random_mixture(t2v, router="rule")
    assert choose_mix(rule, "电凝钩切割血管", None, no_text).shares()["hook"] == 1.0
    label = random_mixture(t2v, router="label", top_k=4)
    mix = choose_mix(label, "电凝钩切割血管", None, no_text)
    assert max(mix.shares(), key=mix.shares().get) == "hook" and mix.source == "router"


def test_alpha_expert_by_family(t2v) -> None:
    mixture = random_mixture(t2v)
    assert alpha_vector(mixture, 1.2).tolist() == pytest.approx([1.2] * 4)
    assert alpha_vector(mixture, {"hook": 1.2, "抓钳": 0.8}).tolist() == pytest.approx([1.0, 1.2, 1.0, 0.8])
    with pytest.raises(UserError, match="unknown instrument 'banana'"):
        alpha_vector(mixture, {"banana": 1.0})


@pytest.fixture
def over_base(t2v: ModelSpec, tmp_path: Path) -> tuple[Path, dict[NoiseExpert, Path]]:
    """A mixture trained over a base LoRA, with the LoRA files beside it."""
    files, recorded = {}, {}
    for index, noise_expert in enumerate(t2v.noise_experts):
        state = random_lora(50 + index)
        files[noise_expert] = tmp_path / "stage1" / f"base_{noise_expert.file_suffix}.safetensors"
        write_lora(files[noise_expert], state)
        recorded[noise_expert] = {"path": f"stage1/{files[noise_expert].name}", "fingerprint": state.fingerprint()}
    path = tmp_path / "mixture.safetensors"
    write_mixture(path, random_mixture(t2v, base_lora=recorded))
    return path, files


def test_a_recorded_base_lora_is_found_and_alpha_base_is_its_strength(t2v, over_base, small) -> None:
    moe, files = over_base
    loras = [LoraArgument(path=file) for file in files.values()]
    with_base = Generator(*read_adapters(Base(t2v), (), moe))
    given = Generator(*read_adapters(Base(t2v), loras, moe))
    assert given.adapters.groups(HIGH)[0].name == "base" and len(given.adapters.groups(HIGH)) == 5
    off = small(t2v, alpha_expert=0.0)
    only_lora = Generator(*read_adapters(Base(t2v), loras, None)).latents(small(t2v))
    assert (with_base.latents(off) - only_lora).abs().max() < 1e-5  # rows of zeros sum in another order
    assert torch.equal(given.latents(off), with_base.latents(off))
    base = Generator(t2v).latents(small(t2v))
    none = with_base.latents(small(t2v, alpha_expert=0.0, alpha_base=0.0))
    assert torch.equal(none, base)
    half = with_base.latents(small(t2v, alpha_expert=0.0, alpha_base=0.5))
    assert (half - base).abs().max() > 1e-4 and (half - only_lora).abs().max() > 1e-4


def test_a_missing_or_changed_base_lora_is_asked_for(t2v, over_base) -> None:
    moe, files = over_base
    write_lora(files[LOW], random_lora(99))
    with pytest.raises(UserError, match=r"base LoRA for the low noise expert .* pass it with --lora low=FILE"):
        read_adapters(Base(t2v), (), moe)


def test_a_mixture_and_a_lora_are_not_taken_for_each_other(t2v, mixture_file, tmp_path) -> None:
    lora = tmp_path / "a_high_noise.safetensors"
    write_lora(lora, random_lora(0))
    with pytest.raises(UserError, match="is a mixture; pass it with --moe"):
        read_adapters(Base(t2v), [LoraArgument(path=mixture_file)], None)
    with pytest.raises(UserError, match="if it is a LoRA, pass it with --lora"):
        read_adapters(Base(t2v), (), lora)
    with pytest.raises(UserError, match=r"is a folder; give the .safetensors in it that train-moe wrote"):
        read_adapters(Base(t2v), (), tmp_path)


def test_a_mixture_of_another_base_is_refused(i2v, t2v, mixture_file) -> None:
    with pytest.raises(UserError, match="was trained for t2v, but the model is i2v"):
        read_adapters(Base(i2v), (), mixture_file)
    read_mixture(mixture_file, t2v)


def test_loras_go_to_the_noise_expert_they_are_for(t2v, tmp_path) -> None:
    high = tmp_path / "motion.safetensors"
    write_lora(high, random_lora(0, metadata={"lapwan.noise_expert": "high"}))
    silent = tmp_path / "style.safetensors"
    write_lora(silent, random_lora(1))
    loras = [LoraArgument(path=high, strength=0.5), LoraArgument(noise_expert="both", path=silent)]
    found = read_adapters(Base(t2v), loras, None)[1]
    assert [(u.path, u.strength) for u in found.loras[HIGH]] == [(high, 0.5), (silent, 1.0)]
    assert [u.path for u in found.loras[LOW]] == [silent]
    with pytest.raises(UserError, match=r"is for the high noise expert .* give it as high=FILE"):
        read_adapters(Base(t2v), [LoraArgument(noise_expert="low", path=high)], None)
    with pytest.raises(UserError, match="does not say which noise expert it is for; give it as high=FILE, low=FILE"):
        read_adapters(Base(t2v), [LoraArgument(path=silent)], None)


def test_a_lora_of_another_model_is_refused_before_loading(t2v, tmp_path) -> None:
    state = random_lora(0)
    state.entries["blocks.30.attn1.to_q"] = state.entries["blocks.3.attn1.to_q"]
    path = tmp_path / "big_high_noise.safetensors"
    write_lora(path, state)
    with pytest.raises(UserError, match=r"has module 'blocks\.30\.attn1\.to_q', which .* lacks; .*blocks up to 30"):
        read_adapters(Base(t2v), [LoraArgument(path=path)], None)


def test_strengths_of_several_loras_add(t2v, tmp_path, small) -> None:
    """A:0.25 twice is A:0.5; strength 0 is the base exactly."""
    file = tmp_path / "a.safetensors"
    write_lora(file, random_lora(0))

    def latents(*strengths: float) -> torch.Tensor:
        loras = [LoraArgument(noise_expert="both", path=file, strength=s) for s in strengths]
        return Generator(*read_adapters(Base(t2v), loras, None)).latents(small(t2v))

    assert (latents(0.25, 0.25) - latents(0.5)).abs().max() < 1e-4
    assert torch.equal(latents(0.0), Generator(t2v).latents(small(t2v)))


@pytest.fixture
def stage1(tmp_path: Path) -> dict[NoiseExpert, Path]:
    files = {e: tmp_path / f"stage1_{e.file_suffix}.safetensors" for e in NoiseExpert}
    for index, file in enumerate(files.values()):
        write_lora(file, random_lora(70 + index))
    return files


def test_a_mixture_over_a_base_merged_in_memory_takes_its_loras(t2v, stage1, tmp_path, small) -> None:
    """Trained on base + LoRAs in the weights: given the LoRAs, they go into the weights here too."""
    loras = [LoraArgument(path=file, strength=0.8) for file in stage1.values()]
    assigned = assign([LoraRequest(None, lora.path, lora.strength) for lora in loras], t2v.noise_experts)
    merged = Base(t2v, assigned)
    mixture = random_mixture(t2v)
    spec = dataclasses.replace(mixture.spec, base={e: merged.fingerprint(e) for e in t2v.noise_experts})
    path = tmp_path / "over_merged.safetensors"
    write_mixture(path, Mixture(spec, mixture.states))
    with pytest.raises(UserError, match="was trained on another base"):
        read_adapters(Base(t2v), (), path)
    base, adapters = read_adapters(Base(t2v), loras, path)
    assert base.fingerprint(HIGH) == merged.fingerprint(HIGH) and not any(adapters.loras.values())
    request = small(t2v, alpha_expert=0.0)
    in_weights = Generator(base, adapters).latents(request)
    beside = Generator(*read_adapters(Base(t2v), loras, None)).latents(request)
    assert (in_weights - beside).abs().max() < 1e-4
    wrong = [LoraArgument(path=file) for file in stage1.values()]  # another strength is another base
    with pytest.raises(UserError, match="was trained on another base"):
        read_adapters(Base(t2v), wrong, path)


def test_a_base_with_loras_in_toml(lapwan, stage1, tmp_path) -> None:
    (tmp_path / "c.toml").write_text(
        'prompt = "x"\noutput = "a"\nsize = [32, 48]\nnum_frames = 5\nsteps = 3\nguidance = 1.0\n'
        f'[model]\nmodel = "tiny"\nlora = {{high = "{stage1[HIGH]}", low = "{stage1[LOW]}"}}\nmultiplier = 0.8\n'
    )
    assert lapwan("generate", "--config", "c.toml").code == 0
    loras = [part for file in stage1.values() for part in ("--lora", f"{file}:0.8")]
    assert generate(lapwan, *loras, prompt="x", output="b").code == 0
    assert np.abs(frames(tmp_path / "a").astype(int) - frames(tmp_path / "b")).max() <= 1
