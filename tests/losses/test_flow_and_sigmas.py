"""Closed forms of flow matching and of the truncated sigma samplers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapwan.losses import flow
from lapwan.losses.sigmas import LogitNormal, Shifted, Uniform, band_probability, draw_in_band
from lapwan.names import bands


def test_the_target_is_the_derivative_of_the_path_and_leads_back_to_the_clean_latents():
    x0, noise = torch.randn(2, 3, 1, 2, 2).double(), torch.randn(2, 3, 1, 2, 2).double()
    sigma = torch.tensor([0.3, 0.9], dtype=torch.float64)
    x, v = flow.add_noise(x0, noise, sigma), flow.velocity_target(x0, noise)
    step = 1e-6
    torch.testing.assert_close((flow.add_noise(x0, noise, sigma + step) - x) / step, v, rtol=0, atol=1e-8)
    torch.testing.assert_close(x - sigma.view(-1, 1, 1, 1, 1) * v, x0, rtol=0, atol=1e-12)


def test_losses_are_per_sample_means_and_the_region_normalises_itself():
    error = torch.zeros(3, 2, 2, 2, dtype=torch.float64)
    error[0, 0, 0, 0] = 8.0
    error[1] = 2.0
    roi = torch.zeros_like(error)
    roi[0, 0, 0, 0], roi[0, 0, 0, 1] = 1.0, 0.5
    roi[1, 0] = 0.25
    assert flow.flow_loss(error).tolist() == [1.0, 2.0, 0.0]
    torch.testing.assert_close(
        flow.roi_loss(error, roi), torch.tensor([8.0 / 1.5, 2.0, 0.0], dtype=torch.float64))


SAMPLERS = [Uniform(), LogitNormal(), LogitNormal(-0.5, 0.7), Shifted(Uniform(), 5.0), Shifted(LogitNormal(), 12.0)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_cdf_and_inverse_are_inverse(sampler):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    back = torch.tensor([sampler.cdf(float(s)) for s in sampler.inverse(u)], dtype=torch.float64)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-9)


@given(u=st.floats(0, 1, exclude_max=True), which=st.sampled_from(SAMPLERS), boundary=st.sampled_from([0.875, 0.9]))
def test_no_draw_leaves_its_band(u, which, boundary):
    for band in bands(boundary).values():
        sigma = float(draw_in_band(which, torch.tensor([u]), band.low, band.high))
        assert band.low <= sigma <= band.high


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_truncation_is_the_distribution_conditioned_on_the_band(sampler):
    """Against rejection: draws of the whole distribution that happen to fall into the band."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    everything = sampler.inverse(u)
    kept = everything[(everything >= 0.5) & (everything <= 0.875)]
    drawn = draw_in_band(sampler, (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000, 0.5, 0.875)
    for q in (0.1, 0.5, 0.9):
        assert math.isclose(float(drawn.quantile(q)), float(kept.quantile(q)), abs_tol=2e-3)


def test_shares_of_training_draws_are_the_known_ones():
    """Logit-normal then shift, share above the T2V boundary: 19.8, 36.8 and 70.5 % at shift 3, 5 and 12."""
    for shift, share in ((3, 0.198), (5, 0.368), (12, 0.705)):
        assert band_probability(Shifted(LogitNormal(), shift), 0.875, 1.0) == pytest.approx(share, abs=1e-3)
    for shift, share in ((3, 0.250), (5, 0.357)):
        assert band_probability(Shifted(Uniform(), shift), 0.9, 1.0) == pytest.approx(share, abs=1e-3)


def test_a_band_without_probability_is_an_error():
    with pytest.raises(ValueError, match="never draws"):
        draw_in_band(LogitNormal(mean=-40.0, std=0.1), torch.tensor([0.5]), 0.9, 1.0)
