"""The routing terms against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lapwan.losses import routing


def test_teacher_entropies_are_the_documented_ones():
    hook = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    two = torch.tensor([[0.0, 0.648, 0.0, 0.352]], dtype=torch.float64)
    for temperature, plain, mixed in ((0.7, 1.139, 1.31), (0.35, 0.579, 1.10)):
        assert float(routing.entropy(routing.teacher(hook, temperature))) == pytest.approx(plain, abs=2e-3)
        assert float(routing.entropy(routing.teacher(two, temperature))) == pytest.approx(mixed, abs=6e-3)


def test_entropy_ends():
    assert float(routing.entropy(torch.full((1, 4), 0.25))) == pytest.approx(math.log(4))
    assert float(routing.entropy(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))) == 0.0


def test_kl_points_from_student_to_teacher():
    p, q = torch.tensor([[0.7, 0.3]], dtype=torch.float64), torch.tensor([[0.4, 0.6]], dtype=torch.float64)
    forward = 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6)
    backward = 0.4 * math.log(0.4 / 0.7) + 0.6 * math.log(0.6 / 0.3)
    assert float(routing.teacher_kl(p, q)) == pytest.approx(forward, abs=1e-12)
    assert abs(forward - backward) > 1e-3  # the two directions are told apart


def test_hinge_is_relu_of_the_mean_however_the_step_is_cut():
    p = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 4, dim=-1).double()
    mean = float(routing.entropy(p).mean())
    for floor in (mean + 0.3, mean - 0.3):
        whole = max(0.0, floor - mean)
        parts = torch.cat([routing.entropy_hinge(part, mean, floor) for part in (p[:1], p[1:4], p[4:])])
        assert float(parts.mean()) == pytest.approx(whole, abs=1e-12)


def test_balance_is_zero_at_uniform_usage_and_e_minus_one_at_collapse():
    uniform, one = torch.full((4,), 0.25), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert float(routing.balance(uniform, one[None])) == pytest.approx(0.0)
    assert float(routing.balance(one, one[None])) == pytest.approx(3.0)


def test_balance_gradient_reaches_the_probabilities_and_not_the_usage():
    usage = torch.tensor([0.1, 0.9], requires_grad=True)
    p = torch.tensor([[0.5, 0.5]], requires_grad=True)
    routing.balance(usage, p).sum().backward()
    assert usage.grad is None
    torch.testing.assert_close(p.grad, torch.tensor([[0.2, 1.8]]))


def test_usage_is_a_running_mean():
    usage = torch.full((2,), 0.5)
    for _ in range(100):
        usage = routing.update_usage(usage, torch.tensor([1.0, 0.0]), decay=0.9)
    assert usage.tolist() == pytest.approx([1 - 0.5 * 0.9**100, 0.5 * 0.9**100], abs=1e-6)
