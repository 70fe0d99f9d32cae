"""Routers that see sigma, gates along a video, windows of routing and what is said about them."""

from __future__ import annotations

import math

import pytest
import torch

from lapwan.data.regions import motion_region
from lapwan.diagnostics.router_health import RoutingThresholds, RoutingTotals, judge_routing
from lapwan.lora.state import AdapterState, LowRank
from lapwan.losses import routing
from lapwan.moe.mixture import Mixture, MixtureSpec
from lapwan.moe.router import RouterShape, router_class, select_top_k, sigma_features
from lapwan.names import NoiseExpert

FAMILIES = ("a", "b", "c", "d")
BANDS = {NoiseExpert.HIGH: (0.875, 1.0), NoiseExpert.LOW: (0.0, 0.875)}


def totals_of(student, labels, labelled=None, mix=None) -> RoutingTotals:
    student = torch.as_tensor(student, dtype=torch.float64)
    labels = torch.as_tensor(labels, dtype=torch.float64)
    known = torch.ones(len(student), dtype=torch.float64) if labelled is None else torch.tensor(labelled).double()
    kl = routing.teacher_kl(student, routing.teacher(labels, 0.35))
    return RoutingTotals.of(student, student if mix is None else mix, labels, known, routing.entropy(student), kl)


def test_sigma_features_are_cosines_of_one_scale():
    found = sigma_features(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found[0], torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(found[1, :2], torch.tensor([0.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(found[2, :3], torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["text", "linear", "label"])
def test_a_router_sees_sigma_only_where_asked_and_starts_as_if_it_did_not(kind):
    def made(sigma: bool):
        torch.manual_seed(1)
        return router_class(kind).make(RouterShape(6, 4, sigma=sigma))

    text, labels, sigma = [torch.randn(3, 6)], torch.tensor([[0.0, 1.0, 0.0, 0.0]]), torch.tensor([0.3])
    blind, seeing = made(False), made(True)
    torch.testing.assert_close(seeing(text, labels, sigma), blind(text, labels))
    with torch.no_grad():
        seeing.sigma.weight.normal_()
    assert not torch.allclose(seeing(text, labels, sigma), seeing(text, labels, sigma + 0.4))
    assert torch.equal(blind(text, labels, sigma), blind(text, labels, sigma + 0.4))
    with pytest.raises(ValueError, match="this router needs sigma"):
        seeing(text, labels)


def test_gates_along_a_video_are_a_running_mean_of_the_routers_output():
    torch.manual_seed(0)
    spec = MixtureSpec(FAMILIES, {}, "t2v", BANDS, 6, router_sigma=True, gate_ema=0.75, top_k=2)
    mixture = Mixture(spec, {})
    with torch.no_grad():
        mixture.router.sigma.weight.normal_()
    text, sigmas = [torch.randn(3, 6)], [0.95, 0.6, 0.2]
    alone = [mixture.select(mixture.route(text, None, torch.tensor([s]))) for s in sigmas]
    along = mixture.route_over_sigmas(text, None, sigmas)
    assert torch.equal(along[0], alone[0]) and not torch.allclose(alone[0], alone[1])
    second = 0.75 * alone[0] + 0.25 * alone[1]
    torch.testing.assert_close(along[1], second)
    torch.testing.assert_close(along[2], 0.75 * second + 0.25 * alone[2])


def test_shared_experts_are_stored_once_and_read_into_both(tmp_path):
    from safetensors import safe_open

    from lapwan.moe.mixture_file import read_mixture, write_mixture
    spec = MixtureSpec(FAMILIES, {}, "t2v", BANDS, 6, shared_experts=True)
    one = {f: AdapterState({"blocks.0.attn1.to_q": LowRank(torch.randn(r, 5), torch.randn(4, r), 1.0)}, {})
           for r, f in enumerate(FAMILIES, 1)}
    write_mixture(tmp_path / "m.safetensors", Mixture(spec, dict.fromkeys(NoiseExpert, one)))
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        experts = [name for name in file.keys() if ".lora_A" in name]  # noqa: SIM118
    assert len(experts) == len(FAMILIES) and all(name.startswith("both_noise.") for name in experts)
    again = read_mixture(tmp_path / "m.safetensors")
    for noise_expert in NoiseExpert:
        for family in FAMILIES:
            entry = again.states[noise_expert][family].entries["blocks.0.attn1.to_q"]
            assert torch.equal(entry.up, one[family].entries["blocks.0.attn1.to_q"].up)


def test_windows_add_up_and_are_differences():
    student = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), -1)
    labels = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
    known = [1, 1, 1, 1, 0, 1]
    whole = totals_of(student, labels, known)
    parts = totals_of(student[:2], labels[:2], known[:2]) + totals_of(student[2:], labels[2:], known[2:])
    torch.testing.assert_close(whole.flat, parts.flat, rtol=0, atol=1e-12)
    torch.testing.assert_close((parts - totals_of(student[2:], labels[2:], known[2:])).flat,
                               totals_of(student[:2], labels[:2], known[:2]).flat, rtol=0, atol=1e-12)
    assert whole.clips == 6 and whole.labelled == 5
    right = sum(int(student[i].argmax()) == int(labels[i].argmax()) for i in (0, 1, 2, 3, 5))
    assert whole.accuracy == pytest.approx(right / 5)
    torch.testing.assert_close(whole.usage_E, student.mean(dim=0))
    torch.testing.assert_close(whole.usage_by_family_EE[1], student[[1, 5]].mean(dim=0))
    assert float(whole.confusion_EE.sum()) == 5


@pytest.mark.parametrize(("experts", "entropy", "least", "most"), [
    (4, 0.3, 0.05, 0.70), (2, 0.15, 0.1, 0.8), (6, 0.3 * math.log(6) / math.log(4), 1 / 30, 2 / 3)])
def test_the_users_thresholds_scale_with_the_number_of_experts(experts, entropy, least, most):
    assert RoutingThresholds().scaled(experts) == pytest.approx((entropy, least, most))
    assert RoutingThresholds(entropy=0.1, least_usage=0.0, most_usage=1.0).scaled(experts) == (0.1, 0.0, 1.0)


def test_a_healthy_window_is_not_warned_about():
    labels = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    assert judge_routing(totals_of(routing.teacher(labels, 0.35), labels), FAMILIES, RoutingThresholds(), {}) == []


def test_with_one_acting_expert_usage_is_a_share_of_the_gates_however_unsure_the_router():
    families = tuple("abcdef")
    labels = torch.eye(6, dtype=torch.float64).repeat(5, 1)
    unsure = torch.softmax(0.1 * labels, dim=-1)  # every expert acts on its sixth of the clips, with a gate of 0.18
    even = totals_of(unsure, labels, mix=select_top_k(unsure, 1))
    torch.testing.assert_close(even.usage_E, torch.full((6,), 1 / 6, dtype=torch.float64))
    assert judge_routing(even, families, RoutingThresholds(teacher_kl=9.0), {}) == []
    assert float(routing.balance(even.usage_E, unsure).mean()) == pytest.approx(0.0)
    one = torch.softmax(1.0 * labels[:1], dim=-1).expand(30, 6)  # the same expert everywhere, with a gate of 0.35
    totals = totals_of(one, labels, mix=select_top_k(one, 1))
    faults = judge_routing(totals, families, RoutingThresholds(teacher_kl=9.0), {})
    assert "expert 'a' takes 100% of the gates" in str(faults[0])


def test_collapse_overuse_underuse_and_divergence_are_told_with_the_users_advice():
    labels = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    student = torch.tensor([[0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).expand(20, 4)
    current = {"routing_loss.balance": 0.1, "routing_loss.entropy": 0.02, "routing_loss.teacher_kl": 0.0,
               "data.balance": 0.0}
    faults = judge_routing(totals_of(student, labels), FAMILIES, RoutingThresholds(), current)
    assert [fault.kind for fault in faults] == ["collapse", "overuse", "underuse", "underuse", "underuse", "divergence"]
    collapse, overuse, *_, divergence = faults
    assert "0.17 nats, below 0.30" in str(collapse) and "expert 'a' takes 97% of the gates, above 70%" in str(overuse)
    assert collapse.change == {
        "routing_loss.balance": 0.2, "routing_loss.entropy": 0.05, "routing_loss.teacher_kl": 2.0}
    assert overuse.change == {"routing_loss.balance": 0.2, "data.balance": 1.0}
    assert divergence.change == {"routing_loss.teacher_kl": 2.0} and "check the label file" in str(divergence)
    done = {**current, "routing_loss.teacher_kl": 2.0}  # what is set already is not advised again
    assert judge_routing(totals_of(student, labels), FAMILIES, RoutingThresholds(), done)[-1].change == {}


def test_the_rule_router_is_judged_by_usage_only():
    labels = torch.eye(4, dtype=torch.float64).repeat(5, 1)
    assert judge_routing(totals_of(labels, labels), FAMILIES, RoutingThresholds(), {}, learned=False) == []
    skewed = torch.eye(4, dtype=torch.float64)[[0] * 20]
    faults = judge_routing(totals_of(skewed, skewed), FAMILIES, RoutingThresholds(), {}, learned=False)
    assert {fault.kind for fault in faults} == {"overuse", "underuse"}


def test_a_region_from_motion_is_where_latents_change_most():
    latents = torch.zeros(3, 4, 5, 5)
    latents[:, 2:, 1:3, 2:4] = 2.0  # appears in frame 2: change between 1 and 2 only
    region = motion_region(latents, share=0.04)
    want = torch.zeros(4, 5, 5)
    want[2, 1:3, 2:4] = 1.0
    assert torch.equal(region, want)
    assert float(motion_region(torch.ones(3, 4, 5, 5)).sum()) == 0.0  # nothing moves: no region
    assert float(motion_region(latents[:, :1]).sum()) == 0.0
    moving = torch.randn(3, 4, 5, 5)
    assert int(motion_region(moving, 0.2)[1:].sum() + motion_region(moving, 0.2)[0].sum()) == 20
