"""inspect-weights on a mixture and against a base model's weights."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import WanTransformer3DModel

from lapwan.commands.inspect_weights import run
from lapwan.diagnostics.mixture import overlap
from lapwan.errors import UserError
from lapwan.lora.formats import write_lora
from lapwan.lora.state import AdapterState, LowRank
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import write_mixture
from lapwan.names import NoiseExpert
from lapwan.settings.base import RunOptions
from lapwan.settings.inspect_weights import InspectWeightsSettings
from lapwan.settings.load import load
from lapwan.tiny.resolve import resolve

FAMILIES = ("scissors", "hook", "other")


def state(seed: int, ranks: dict[str, int], width: int = 16) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState({path: LowRank(torch.randn(r, width, generator=generator),
                                      torch.randn(width, r, generator=generator), 2.0) for path, r in ranks.items()})


def mixture(seed: int = 0) -> Mixture:
    spec = MixtureSpec(FAMILIES, {}, "t2v", {NoiseExpert.HIGH: (0.875, 1.0), NoiseExpert.LOW: (0.0, 0.875)}, 12)
    states = {
        noise_expert: {family: state(seed + 10 * n + m, {"blocks.0.attn1.to_q": 2 + m, "blocks.1.ffn.net.0.proj": 3})
                 for m, family in enumerate(FAMILIES)}
        for n, noise_expert in enumerate(NoiseExpert)
    }
    return Mixture(spec, states)


def inspect(capsys: pytest.CaptureFixture, *files: object, **options: str) -> dict:
    values = {"files": [str(f) for f in files], "json_file": "-", **options}
    run(load(InspectWeightsSettings, options=values, environment={}), RunOptions())
    return json.loads(capsys.readouterr().out)


def flat(one: AdapterState) -> torch.Tensor:
    return torch.cat([e.delta(torch.float64).flatten() for e in one.entries.values()])


def test_overlap_equals_brute_force():
    states = mixture().states[NoiseExpert.LOW]
    got = overlap({family: one.entries for family, one in states.items()})
    for a in FAMILIES:
        for b in FAMILIES:
            want = torch.nn.functional.cosine_similarity(flat(states[a]), flat(states[b]), dim=0).item()
            assert got[a][b] == pytest.approx(want, abs=1e-12)


def test_a_mixture_shows_its_experts_overlap_and_gates(tmp_path, capsys):
    made = mixture()
    low = made.states[NoiseExpert.LOW]
    low["hook"] = AdapterState({p: LowRank(e.down.clone(), e.up * 3, e.alpha)
                             for p, e in low["scissors"].entries.items()})
    for entry in low["other"].entries.values():
        entry.up.zero_()
    write_mixture(tmp_path / "m.safetensors", made, {"lapwan.step": "40"})
    document = inspect(capsys, tmp_path / "m.safetensors", by="block")
    assert set(document["by"]["groups"]) == {"0", "1"}
    assert document["experts"]["low"]["modules"] == 6 and document["experts"]["low"]["dead_modules"] == 2
    described = document["mixture"]["low"]
    for family in FAMILIES:
        assert described["families"][family]["delta_norm"] == pytest.approx(flat(low[family]).norm().item())
    assert described["overlap"]["scissors"]["hook"] == pytest.approx(1.0)
    assert described["overlap"]["scissors"]["other"] is None
    assert described["timestep_gate"]["strength"][0] == pytest.approx(1.0)  # as it starts: stronger at low sigma
    assert described["timestep_gate"]["min"] == pytest.approx(0.5)
    rules = {r["rule"]: r["status"] for r in document["verdict"]["rules"]}
    assert rules["largest overlap of two experts (hook, scissors)"] == "warn"
    assert not any("legacy" in rule for rule in rules)


def test_a_mixtures_run_folder_grows(tmp_path, capsys):
    for step, factor in ((10, 1.0), (20, 1.5)):
        made = mixture()
        for states in made.states.values():
            for one in states.values():
                for entry in one.entries.values():
                    entry.up *= factor
        (tmp_path / f"step_{step}").mkdir()
        write_mixture(tmp_path / f"step_{step}" / "m.safetensors", made, {"lapwan.step": str(step)})
    (tmp_path / "m.safetensors").hardlink_to(tmp_path / "step_20" / "m.safetensors")
    (growth,) = inspect(capsys, tmp_path)["growth"]
    assert (growth["from_step"], growth["to_step"]) == (10, 20)
    assert growth["low"]["mean_abs_B"] == pytest.approx(0.5) and growth["low"]["delta_norm"] == pytest.approx(0.5)


def test_relative_to_the_base_equals_brute_force(tmp_path, capsys):
    spec = resolve("tiny")
    weights = {}
    for noise_expert in NoiseExpert:
        model = WanTransformer3DModel.from_pretrained(spec.component(noise_expert))
        weights[noise_expert] = model.blocks[2].attn1.to_v.weight.double(), model.blocks[1].attn2.to_q.weight.double()
    width = weights[NoiseExpert.HIGH][0].shape[0]
    ranks = {"blocks.2.attn1.to_v": 2, "blocks.1.attn2.to_q": 3}
    paths = []
    for n, noise_expert in enumerate(NoiseExpert):
        paths.append(tmp_path / f"x_{noise_expert.file_suffix}.safetensors")
        write_lora(paths[-1], state(n, ranks, width))
    document = inspect(capsys, *paths, base="tiny")
    for n, noise_expert in enumerate(NoiseExpert):
        base = math.sqrt(sum(w.square().sum().item() for w in weights[noise_expert]))
        want = flat(state(n, ranks, width)).norm().item() / base
        assert document["experts"][noise_expert]["relative_delta"] == pytest.approx(want, rel=1e-6)
    write_lora(tmp_path / "far_high.safetensors", state(0, {"blocks.99.attn1.to_q": 2}, width))
    with pytest.raises(UserError, match=r"no module 'blocks\.99"):
        inspect(capsys, tmp_path / "far_high.safetensors", base="tiny")
    write_lora(tmp_path / "plain.safetensors", state(0, ranks, width))
    with pytest.raises(UserError, match="does not record its noise expert"):
        inspect(capsys, tmp_path / "plain.safetensors", base="tiny")
