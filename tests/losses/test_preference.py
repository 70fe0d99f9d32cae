"""Closed forms of Direct-Align's recovery and of the relative preference, in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lapwan.losses import flow
from lapwan.losses import preference as p

DENOISE = torch.tensor([True, False])
SIGMA_E = torch.tensor([0.62, 0.40], dtype=torch.float64)
SIGMA_STAR = torch.tensor([0.60, 0.43], dtype=torch.float64)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(_draw(*shape, seed=seed), dim=-1)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return _draw(2, 4, 1, 3, 3, seed=1), _draw(2, 4, 1, 3, 3, seed=2)


def test_recovery_is_exact_for_the_true_velocity_in_both_branches(pair):
    x0, noise = pair
    x = flow.add_noise(x0, noise, SIGMA_E)
    again = p.predict_x0(x, noise, flow.velocity_target(x0, noise), SIGMA_E, SIGMA_STAR)
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-12)


def test_the_gain_of_a_wrong_velocity_is_minus_c_and_plus_c(pair):
    x0, noise = pair
    wrong = _draw(*x0.shape, seed=3)
    again = p.predict_x0(flow.add_noise(x0, noise, SIGMA_E), noise, noise - x0 + wrong, SIGMA_E, SIGMA_STAR)
    c = torch.tensor([0.02 / 0.40, 0.03 / 0.57], dtype=torch.float64)
    signed = torch.where(DENOISE, -c, c).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(again, x0 + signed * wrong, rtol=0, atol=1e-12)


def _gradient(denoise: bool, discount: float) -> tuple[Tensor, Tensor]:
    """dR/dv̂ of one sample in one branch through a fixed nonlinear 'embedding', and its closed form."""
    x0, noise = _draw(1, 4, 1, 3, 3, seed=4), _draw(1, 4, 1, 3, 3, seed=5)
    star, apart = torch.tensor([0.6], dtype=torch.float64), 0.02 if denoise else -0.02
    sigma_e, read = star + apart, _draw(36, 8, seed=6)

    def embed(latents: Tensor) -> Tensor:
        return torch.nn.functional.normalize(torch.tanh(latents.flatten(1) @ read / 6), dim=-1)

    positive, negative = _unit(1, 8, seed=7), _unit(1, 8, seed=8)
    velocity = (noise - x0).requires_grad_()
    again = p.predict_x0(flow.add_noise(x0, noise, sigma_e), noise, velocity, sigma_e, star)
    seen = p.relative_preference(embed(again), positive, negative, torch.tensor([discount], dtype=torch.float64),
                                 torch.tensor([denoise]))
    (got,) = torch.autograd.grad(seen.relative_B.sum(), velocity)
    wanted, other = (positive, negative) if denoise else (negative, positive)
    (jacobian_t,) = torch.autograd.grad(embed(clean := x0.clone().requires_grad_()), clean,
                                        (1 + discount) * wanted - other)
    return got, (-1 if denoise else 1) * (0.02 / 0.4) * jacobian_t


@pytest.mark.parametrize("discount", [0.25, 0.0, -0.1])
@pytest.mark.parametrize("denoise", [True, False])
def test_the_gradient_of_each_branch_is_the_derived_one(denoise, discount):
    got, derived = _gradient(denoise, discount)
    torch.testing.assert_close(got, derived, rtol=0, atol=1e-13)


def test_both_branches_push_the_velocity_the_same_way():
    down, up = _gradient(True, 0.0)[0], _gradient(False, 0.0)[0]
    torch.testing.assert_close(down, up, rtol=0, atol=1e-13)
    for k in (0.1, 0.25, -0.1):
        down, up = _gradient(True, k)[0].flatten(), _gradient(False, k)[0].flatten()
        assert torch.nn.functional.cosine_similarity(down, up, dim=0) > 0.5


def test_a_batch_of_two_is_two_of_one(pair):
    x0, noise = pair
    velocity = _draw(*x0.shape, seed=9)
    image, positive, negative = (_unit(2, 8, seed=s) for s in (10, 11, 12))

    def loss(rows: slice) -> Tensor:
        x = flow.add_noise(x0[rows], noise[rows], SIGMA_E[rows])
        again = p.predict_x0(x, noise[rows], velocity[rows], SIGMA_E[rows], SIGMA_STAR[rows])
        e = torch.nn.functional.normalize(image[rows] + again.flatten(1)[:, :8], dim=-1)
        k = torch.where(DENOISE[rows], p.discount(SIGMA_STAR[rows], 0.4, 0.7, 0.1, 0.25),
                        p.discount(SIGMA_STAR[rows], 0.4, 0.7, 0.3, 0.01))
        seen = {"a": p.relative_preference(e, positive[rows], negative[rows], k, DENOISE[rows]),
                "b": p.relative_preference(e, negative[rows], positive[rows], k, DENOISE[rows])}
        return p.preference_loss(seen, {"a": 1.0, "b": 0.5})

    torch.testing.assert_close(loss(slice(0, 2)), torch.cat([loss(slice(0, 1)), loss(slice(1, 2))]), rtol=0, atol=1e-12)


def test_discounts_run_over_the_interval_and_keep_their_sign():
    sigma = torch.tensor([0.75, 0.857, 0.964], dtype=torch.float64)
    expected = torch.tensor([-0.1, 0.05, 0.2], dtype=torch.float64)
    torch.testing.assert_close(p.discount(sigma, 0.75, 0.964, -0.1, 0.2), expected, rtol=0, atol=1e-12)


def test_preference_keeps_positive_negative_and_margin_apart():
    image, positive, negative = torch.eye(3).double()[:1], _unit(1, 3, seed=13), _unit(1, 3, seed=14)
    a, b = float(positive[0, 0]), float(negative[0, 0])
    k = torch.tensor([0.25], dtype=torch.float64)
    for denoise, relative in ((True, 1.25 * a - b), (False, 1.25 * b - a)):
        seen = p.relative_preference(image, positive, negative, k, torch.tensor([denoise]))
        got = (float(v) for v in (seen.positive_B, seen.negative_B, seen.margin_B, seen.relative_B))
        assert tuple(got) == pytest.approx((a, b, a - b, relative), abs=1e-12)


def test_the_hinge_is_the_weighted_mean_over_rewards_of_each_ones_own():
    zero = torch.zeros(3, dtype=torch.float64)
    relative = torch.tensor([0.2, 0.7, 5.0], dtype=torch.float64)
    assert p.hinge(relative).tolist() == pytest.approx([0.5, 0.0, 0.0])
    seen = {"a": p.Preference(zero, zero, relative), "b": p.Preference(zero, zero, zero)}
    assert p.preference_loss(seen, {"a": 3.0, "b": 1.0}).tolist() == pytest.approx([0.55, 0.175, 0.175])
    with pytest.raises(ValueError, match="give one weight per reward"):
        p.preference_loss(seen, {"a": 1.0})


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.booleans()),
                min_size=1, max_size=8),
       st.sampled_from([(0.0, 0.875), (0.4, 0.7), (0.875, 0.999), (0.75, 0.964)]), st.floats(0.02, 1),
       st.sampled_from([torch.float32, torch.float64]))
def test_no_pair_of_sigmas_leaves_the_interval(draws, interval, share, dtype):
    low, high = interval
    reach = share * (high - low)
    u = torch.tensor([[a, b] for a, b, _ in draws], dtype=torch.float64).to(dtype).clamp(max=0.999)
    denoise = torch.tensor([d for *_, d in draws])
    sigma_e, star = p.draw_sigmas(u, denoise, low, high, reach)
    for value in (sigma_e, star):
        assert ((value >= low - 1e-7) & (value <= high + 1e-7)).all()
    assert ((sigma_e > star) == denoise).all() and ((sigma_e - star).abs() <= reach + 1e-6).all()
    torch.testing.assert_close((sigma_e - star).abs(), reach * (1 - u[:, 1]), rtol=0, atol=2e-7)


def test_what_cannot_be_is_refused():
    u, flag = torch.zeros(1, 2), torch.tensor([True])
    for low, high, reach in ((0.5, 0.5, 0.1), (0.2, 1.0, 0.1), (0.2, 0.3, 0.2), (0.2, 0.3, 0.0)):
        with pytest.raises(ValueError, match="must"):
            p.draw_sigmas(u, flag, low, high, reach)
    half = torch.zeros(1, 4, 1, 2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="fp32"):
        p.euler_step(half, half, torch.tensor([0.5]), torch.tensor([0.4]))
