"""`lapwan merge --moe`: the mixture at one mix as LoRA files, with the timestep gates' mean or at one sigma."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lapwan.data.taxonomy import load_taxonomy
from lapwan.lora.attach import attach
from lapwan.lora.formats import read_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.moe.to_lora import inference_sigmas
from lapwan.names import NoiseExpert
from lapwan.sampling.scheduler import make_grid
from lapwan.wan.backbone import WanBackbone, load_transformer

PATH = "blocks.7.attn1.to_q"


@pytest.fixture
def mixture(tiny_t2v, tmp_path):
    torch.manual_seed(0)
    taxonomy = load_taxonomy("surgical4")
    bands = {noise_expert: (band.low, band.high) for noise_expert, band in tiny_t2v.bands.items()}
    spec = MixtureSpec(taxonomy.keys, taxonomy.to_dict(), "t2v", bands, tiny_t2v.text_dim,
                       flow_shift=tiny_t2v.flow_shift, steps=12)
    states = {
        e: {f: AdapterState({PATH: LowRank(torch.randn(2, 192), 0.1 * torch.randn(192, 2), 1.0)}, {})
            for f in taxonomy.keys} for e in NoiseExpert
    }
    made = Mixture(spec, states)
    with torch.no_grad():
        for noise_expert in NoiseExpert:
            made.timestep_gate(noise_expert).values_K.copy_(torch.randn(8))
    write_mixture(tmp_path / "m.safetensors", made)
    return made


@pytest.fixture
def merge(lapwan):
    return partial(lapwan, "merge", "--moe", "m.safetensors")


def test_delta_is_the_mix_times_the_mean_gate_over_the_sampling_steps(mixture, merge, tmp_path):
    code, out, _ = merge("--mix", "hook=0.7,suction=0.3", "-o", "flat.safetensors")
    assert code == 0
    for noise_expert in NoiseExpert:
        sigmas = torch.tensor(inference_sigmas(mixture, noise_expert))
        w_bar = float(mixture.timestep_gate(noise_expert)(sigmas).mean().detach())
        assert f"{noise_expert.value} noise: timestep gate w = {w_bar:.4f} (from " in out
        [(said, state)] = read_lora(tmp_path / f"flat_{noise_expert.file_suffix}.safetensors").items()
        assert said is noise_expert and state.metadata["lapwan.task"] == "t2v"
        want = w_bar * sum(
            g * mixture.states[noise_expert][f].entries[PATH].delta() for f, g in (("hook", 0.7), ("suction", 0.3)))
        torch.testing.assert_close(state.entries[PATH].delta(), want, rtol=1e-5, atol=1e-6)


def test_one_file_holds_what_the_two_hold(mixture, merge, tmp_path):
    for arguments in (("-o", "flat.safetensors"), ("-o", "both.safetensors", "--one-file")):
        assert merge("--mix", "hook=0.7,suction=0.3", *arguments)[0] == 0
    both = read_lora(tmp_path / "both.safetensors")
    assert list(both) == list(NoiseExpert)
    for noise_expert, state in both.items():
        [alone] = read_lora(tmp_path / f"flat_{noise_expert.file_suffix}.safetensors").values()
        assert state.fingerprint() == alone.fingerprint() and state.metadata == alone.metadata


def test_at_one_sigma_it_is_what_the_mixture_does_there(mixture, merge, tiny_t2v, tmp_path):
    assert merge("--mix", "hook", "--sigma", "0.5", "-o", "flat.safetensors", "--format", "diffusers")[0] == 0
    noise_expert = NoiseExpert.LOW
    x, text, sigma = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 8, 96), torch.tensor([0.5])
    outputs = []
    for kind in ("mixture", "lora"):
        transformer = load_transformer(tiny_t2v, noise_expert)
        if kind == "mixture":
            holder = attach(transformer, mixture.groups(noise_expert, None), gates_required=True).holder
            gates = mixture.gates(noise_expert, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), sigma)
        else:
            from lapwan.lora.attach import Group
            [state] = read_lora(tmp_path / "flat_low_noise.safetensors").values()
            holder, gates = attach(transformer, [Group("flat", state, False)]).holder, torch.ones(1, 1)
        with torch.no_grad(), holder.scope(gates):
            outputs.append(WanBackbone(transformer).velocity(x, 1000 * sigma, text))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_the_grid_is_the_one_generation_uses(mixture, tiny_t2v):
    grid = make_grid(tiny_t2v, "unipc", 12, None)
    for noise_expert in NoiseExpert:
        theirs = [step.sigma for step in grid.steps if step.noise_expert is noise_expert]
        assert inference_sigmas(mixture, noise_expert) == pytest.approx(theirs, abs=2e-6)


@pytest.mark.parametrize(("arguments", "message"), [
    (("-o", "x.safetensors"), "--moe needs the shares of its experts"),
    (("--mix", "hok", "-o", "x.safetensors"), "hok"),
    (("--mix", "hook", "-o", "x"), "written as a .safetensors file"),
    (("--mix", "hook", "--model", "tiny", "-o", "x"), "merge those in a second step"),
    (("--mix", "hook", "-o", "m.safetensors"), "output exists: m_high_noise.safetensors"),
])
def test_what_is_refused(mixture, merge, tmp_path, arguments, message):
    (tmp_path / "m_high_noise.safetensors").touch()
    code, _, err = merge(*arguments)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
