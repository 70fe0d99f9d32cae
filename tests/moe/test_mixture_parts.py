"""Routers, top-k, the timestep gate, gates and the collapse to a LoRA, against their formulas."""

from __future__ import annotations

import pytest
import torch

from lapwan.lora.state import AdapterState, LowRank
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.mixture_file import read_mixture, write_mixture
from lapwan.moe.router import RuleRouter, TextRouter, masked_mean, select_top_k
from lapwan.moe.timestep_gate import TimestepGate
from lapwan.moe.to_lora import gate_range, mixture_to_lora
from lapwan.names import NoiseExpert

FAMILIES = ("a", "b", "c")


@pytest.fixture
def mixture() -> Mixture:
    torch.manual_seed(0)
    spec = MixtureSpec(FAMILIES, {}, "t2v", {NoiseExpert.HIGH: (0.875, 1.0), NoiseExpert.LOW: (0.0, 0.875)}, 6)
    states = {
        noise_expert: {
            f: AdapterState({"blocks.0.attn1.to_q": LowRank(torch.randn(r, 5), torch.randn(4, r), alpha=3.0)}, {})
            for r, f in enumerate(FAMILIES, 1)}  # ranks differ between experts
        for noise_expert in NoiseExpert
    }
    return Mixture(spec, states)


def test_top_k_keeps_k_and_renormalises_except_for_one():
    p = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(select_top_k(p, 2), torch.tensor([[0.0, 2 / 3, 1 / 3]], dtype=torch.float64))
    assert select_top_k(p, 1).tolist() == [[0.0, 0.6, 0.0]]
    assert torch.equal(select_top_k(p, 3), p)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_selection_passes_a_gradient_to_the_router(k):
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    gates = select_top_k(torch.softmax(logits, -1), k)
    (gates * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert float(logits.grad.abs().max()) > 0


def test_equal_probabilities_still_keep_exactly_k():
    assert int((select_top_k(torch.full((1, 4), 0.25), 2) > 0).sum()) == 2


def test_the_rule_router_is_the_labels_and_has_no_top_k(mixture):
    weights = torch.tensor([[0.2, 0.5, 0.3]])
    assert torch.equal(RuleRouter()([], weights), weights)
    rule = Mixture(MixtureSpec(**{**vars(mixture.spec), "router": "rule", "top_k": 1}), mixture.states)
    assert torch.equal(rule.select(rule.route([], weights)), weights)


def test_text_routing_sees_tokens_not_padding():
    router = TextRouter(6, 3)
    text = [torch.randn(2, 6), torch.randn(5, 6)]
    together = router(text, None)
    for index, one in enumerate(text):
        torch.testing.assert_close(router([one], None)[0], together[index])
    torch.testing.assert_close(masked_mean(text)[0], text[0].mean(0))


def test_the_linear_router_is_one_layer_over_normalised_means(tmp_path, mixture):
    """softmax((W·(m − mean m) / sd m + b) / T); its file brings the same router back."""
    made = Mixture(MixtureSpec(**{**vars(mixture.spec), "router": "linear", "router_temperature": 0.7}), mixture.states)
    text = [torch.randn(2, made.spec.text_dim), torch.randn(5, made.spec.text_dim)]
    m = torch.stack([one.mean(0) for one in text]).double()
    normal = (m - m.mean(1, keepdim=True)) / (m.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    layer = made.router.mlp[1]
    logits = normal @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(made.route(text, None).double(), (logits / 0.7).softmax(-1), rtol=0, atol=1e-6)
    write_mixture(tmp_path / "m.safetensors", made)
    assert torch.equal(read_mixture(tmp_path / "m.safetensors").route(text, None), made.route(text, None))


def test_the_timestep_gate_is_piecewise_linear_and_starts_stronger_at_low_sigma():
    gate = TimestepGate(0.0, 0.875, knots=5)
    sigma = torch.linspace(0, 0.875, 9)
    w = gate(sigma)
    torch.testing.assert_close(w, torch.linspace(1.0, 0.5, 9))
    with torch.no_grad():
        gate.values_K.copy_(torch.randn(5))
    knots = torch.nn.functional.softplus(gate.values_K)
    torch.testing.assert_close(gate(torch.linspace(0, 0.875, 5)), knots)
    torch.testing.assert_close(gate(torch.tensor([0.875 / 8])), (knots[:1] + knots[1:2]) / 2)
    torch.testing.assert_close(gate(torch.tensor([-0.1, 1.0])), knots[[0, -1]])  # constant beyond the ends


def test_gates_are_alpha_base_then_w_times_mix_times_alpha(mixture):
    mix, alpha = torch.tensor([[0.7, 0.3, 0.0]]), torch.tensor([1.0, 2.0, 1.0])
    sigma = torch.tensor([0.4])
    w = float(mixture.timestep_gate(NoiseExpert.LOW)(sigma).detach())
    gates = mixture.gates(NoiseExpert.LOW, mix, sigma, alpha, alpha_base=0.6)
    torch.testing.assert_close(gates, torch.tensor([[0.6, 0.7 * w, 0.6 * w, 0.0]]))
    assert mixture.gates(NoiseExpert.LOW, mix, sigma).shape == (1, 3)


def test_collapse_is_the_weighted_sum_of_the_experts(mixture):
    mix, w_bar = [0.7, 0.0, 0.3], 0.8
    lora = mixture_to_lora(mixture, NoiseExpert.LOW, mix, w_bar)
    path = "blocks.0.attn1.to_q"
    want = sum(w_bar * g * mixture.states[NoiseExpert.LOW][f].entries[path].delta(torch.float64)
               for f, g in zip(FAMILIES, mix, strict=True))
    torch.testing.assert_close(lora.entries[path].delta(torch.float64), want, rtol=1e-6, atol=1e-6)
    assert lora.entries[path].rank == 1 + 3  # the family with weight 0 costs nothing
    with pytest.raises(ValueError, match="all zero"):
        mixture_to_lora(mixture, NoiseExpert.LOW, [0, 0, 0], 1.0)


def test_the_spread_of_w(mixture):
    spread = gate_range(mixture, NoiseExpert.HIGH, [0.875, 1.0])
    assert (spread.lowest, spread.highest) == (pytest.approx(0.5), pytest.approx(1.0))
    assert spread.mean == pytest.approx(0.75)
