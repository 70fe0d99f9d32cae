"""The bootstrap against closed forms, and what must hold for any data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lapwan.evaluation.bootstrap import bootstrap, paired_bootstrap

_values = arrays(np.float64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=st.floats(-10, 10))


def test_mean_and_interval_of_many_normal_values_are_the_textbooks():
    """mean ± 1.96·s/√n."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    found = bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean(), abs=1e-12) and found.n == 2000
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_whole_prompts_are_drawn_not_single_videos():
    """Videos of one prompt that are all alike say no more than one of them: the interval is that of the prompts."""
    prompts = np.random.default_rng(2).normal(size=50)
    repeated = np.repeat(prompts[:, None], 8, axis=1)
    ours, alone = bootstrap(repeated), bootstrap(prompts)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((alone.mean, alone.low, alone.high), abs=1e-12)


def test_crossed_seeds_widen_the_interval_by_their_own_spread():
    """x_ps = a_p + b_s: the variance of the mean is var(a)/P + var(b)/S, and crossing is what sees the second part."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(40, 1)), np.linspace(-2, 2, 20)[None]
    nested, crossed = bootstrap(a + b), bootstrap(a + b, crossed=True)
    sigma = np.sqrt(a.var() / 40 + b.var() / 20)
    assert (crossed.high - crossed.low) == pytest.approx(2 * 1.96 * sigma, rel=0.1)
    assert (nested.high - nested.low) == pytest.approx(2 * 1.96 * np.sqrt(a.var() / 40), rel=0.1)


def test_coverage_is_near_the_level():
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(300):
        found = bootstrap(rng.exponential(1.0, 60), samples=1000, seed=trial)
        inside += found.low <= 1.0 <= found.high
    assert 0.88 <= inside / 300 <= 0.98


def test_pairs_see_what_unpaired_intervals_hide():
    rng = np.random.default_rng(5)
    prompts = rng.normal(0, 10, 100)
    a, b = prompts + 0.5 + rng.normal(0, 0.1, 100), prompts
    pair = paired_bootstrap(a, b)
    assert pair.excludes_zero and pair.low < 0.5 < pair.high
    assert bootstrap(a).low < bootstrap(b).mean < bootstrap(a).high


@settings(max_examples=40, deadline=None)
@given(_values)
def test_what_holds_for_any_values(values):
    found = bootstrap(values, samples=200)
    slack = 1e-9
    assert values.min() - slack <= found.low <= found.high <= values.max() + slack
    assert found.mean == pytest.approx(values.mean(), abs=1e-9)
    moved = bootstrap(3 * values + 5, samples=200)
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(3 * getattr(found, name) + 5, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(_values, st.integers(0, 1000))
def test_a_minus_b_is_minus_b_minus_a_and_a_minus_a_is_nothing(values, seed):
    other = np.random.default_rng(seed).normal(size=values.shape)
    there, back = paired_bootstrap(values, other, samples=200), paired_bootstrap(other, values, samples=200)
    assert there.mean == pytest.approx(-back.mean) and there.low == pytest.approx(-back.high, abs=1e-9)
    same = paired_bootstrap(values, values.copy(), samples=200)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0) and not same.excludes_zero


def test_missing_values_and_single_prompts():
    nan = float("nan")
    found = bootstrap(np.array([[1.0, nan], [3.0, 5.0], [nan, nan]]))
    assert found.n == 2 and found.mean == pytest.approx(3.0)
    pair = paired_bootstrap(np.array([1.0, nan, 4.0]), np.array([0.0, 2.0, nan]))
    assert pair.n == 1 and pair.mean == 1.0 and pair.as_json() == {"mean": 1.0, "ci95": None, "n": 1}
    assert bootstrap(np.array([nan, nan])).as_json() == {"mean": None, "ci95": None, "n": 0}
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap(np.zeros(3), np.zeros(4))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(6).normal(size=30)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
