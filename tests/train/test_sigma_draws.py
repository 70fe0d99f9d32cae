"""How sigma is drawn and the loss weighted: bands, shifts, strata, weights, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapwan.losses.sigmas import (
    LogitNormal,
    Shifted,
    ShiftedBySize,
    Squeezed,
    Uniform,
    Weighting,
    draw_in_band,
    shift_for_tokens,
)
from lapwan.names import Band, NoiseExpert
from lapwan.settings.train_lora import TrainLoraSettings
from lapwan.train.objective import SigmaRule, make_draws
from lapwan.train.recipe import sigma_rule

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def rule(interval, /, **sigma) -> SigmaRule:
    settings = TrainLoraSettings.model_validate(
        {"output": "run", "data": {"cache": "cache"}, "steps": 1, "sigma": sigma})
    return sigma_rule(settings.of(HIGH, 1), interval)


def test_sigmoid_is_the_sigmoid_of_a_scaled_normal():
    drawn = rule(Band(0.0, 1.0), sampler="sigmoid", scale=2.0).sigmas(U, (8, 8))
    logit = (drawn / (1 - drawn)).log()
    assert float(logit.mean()) == pytest.approx(0.0, abs=1e-3) and float(logit.std()) == pytest.approx(2.0, rel=5e-3)


def test_truncating_conditions_and_squeezing_maps_the_whole_distribution():
    band = Band(0.875, 1.0)
    cut = rule(band, sampler="logit_normal", band="truncate").sigmas(U, (8, 8))
    whole = LogitNormal().inverse(U)
    kept = whole[whole >= 0.875]
    squeezed = rule(band, sampler="logit_normal", band="squeeze").sigmas(U, (8, 8))
    for q in (0.1, 0.5, 0.9):
        assert float(cut.quantile(q)) == pytest.approx(float(kept.quantile(q)), abs=1e-3)
        assert float(squeezed.quantile(q)) == pytest.approx(0.875 + 0.125 * float(whole.quantile(q)), abs=1e-6)
    assert float(cut.median()) < 0.92 < float(squeezed.median())


@given(u=st.floats(0, 1, exclude_max=True), inner=st.sampled_from([Uniform(), LogitNormal(), Shifted(Uniform(), 12.0)]))
def test_squeezed_draws_stay_in_the_band(u, inner):
    sigma = float(draw_in_band(Squeezed(inner, 0.0, 0.9), torch.tensor([u]), 0.0, 0.9))
    assert 0.0 <= sigma <= 0.9


def test_a_shift_by_resolution_grows_with_the_frame():
    assert shift_for_tokens(256) == pytest.approx(math.exp(0.5))
    assert shift_for_tokens(4096) == pytest.approx(math.exp(1.15))
    ours = rule(Band(0.0, 1.0), shift="resolution")
    small, large = (ours.sigmas(U, size).median() for size in ((32, 32), (60, 104)))
    assert float(small) == pytest.approx(math.exp(0.5) / (1 + math.exp(0.5)), abs=1e-4) and large > small
    with pytest.raises(TypeError, match="for_tokens"):
        ShiftedBySize(Uniform()).inverse(U)


def test_strata_cover_the_distribution_and_do_not_depend_on_how_visits_are_batched(make_lora):
    trainer = make_lora()
    batch = trainer.data.load_batch([0])
    two = trainer.data.load_batch([0, 1])
    ours = SigmaRule(Uniform(), Band(0.0, 1.0), strata=8)
    keys = [(42, "high", number, "clip") for number in range(32)]
    one_by_one = [float(make_draws(batch, [key], ours).sigma_B) for key in keys]
    for block in range(4):
        assert sorted(int(8 * sigma) for sigma in one_by_one[8 * block : 8 * block + 8]) == list(range(8))
    orders = {tuple(int(8 * s) for s in one_by_one[8 * b : 8 * b + 8]) for b in range(4)}
    assert len(orders) > 1  # each block has an order of its own
    assert make_draws(two, keys[4:6], ours).sigma_B.tolist() == one_by_one[4:6]


@pytest.mark.parametrize("kind", ["none", "x0", "min_snr", "cosmap"])
def test_weights_have_mean_one_over_the_draws_they_are_used_with(kind):
    ours = SigmaRule(Shifted(LogitNormal(), 5.0), Band(0.0, 0.875), weighting=Weighting(kind, 5.0))
    weights = ours.weights(ours.sigmas(U, (8, 8)), (8, 8))
    assert float(weights.mean()) == pytest.approx(1.0, abs=2e-3)
    assert (kind == "none") == bool((weights == 1).all())


def test_min_snr_is_the_capped_clean_latent_loss():
    """With SNR = ((1−σ)/σ)² and an error of the velocity e, the clean latents' is σ·e: weight σ²·min(SNR, γ)."""
    sigma = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    snr = ((1 - sigma) / sigma).square()
    torch.testing.assert_close(Weighting("min_snr", 5.0).raw(sigma), sigma.square() * snr.clamp_max(5.0))


def test_the_weight_reaches_the_loss_and_not_the_logged_figure(make_lora):
    figures = []
    for kind in ("none", "x0"):
        trainer = make_lora(weighting={"kind": kind})
        batch = trainer.data.load_batch([0, 1])
        draws = make_draws(batch, [(1, "high", n, clip) for n, clip in enumerate(batch.ids)],
                           trainer.data.streams[HIGH].sigma_rule)
        with trainer.objective.loss(HIGH, batch, draws) as loss:
            figures.append((loss.terms["loss/diffusion"].detach(), loss.figures["loss/diffusion"], draws.weight_B))
    (plain, shown, ones), (weighted, also_shown, weights) = figures
    assert torch.equal(shown, also_shown) and torch.equal(plain, shown) and bool((ones == 1).all())
    torch.testing.assert_close(weighted, plain * weights.float())
    assert not torch.allclose(weighted, plain)


@pytest.mark.parametrize(("changes", "message"), [
    ({"min_snr_gamma": 5.0}, r"min_snr_gamma is a weight for DDPM .*alphas_cumprod.*weighting = \{kind"),
    ({"optimizer": {"min_snr_gamma": 5.0}}, r"optimizer.min_snr_gamma is a weight for DDPM"),
    ({"low": {"weighting": {"min_snr_gamma": 5.0}}}, r"low.weighting.min_snr_gamma"),
    ({"sigma": {"mean": 1.0}}, r'mean = 1 is for sampler = "logit_normal"'),
    ({"sigma": {"sampler": "logit_normal", "scale": 2.0}}, r'scale = 2 is for sampler = "sigmoid"'),
    ({"high": {"sigma": {"shift": 0.0}}}, r"high.sigma.*shift = 0 must be above 0"),
])
def test_what_would_do_nothing_or_harm_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainLoraSettings.model_validate({"output": "run", "data": {"cache": "cache"}, "steps": 1, **changes})
