"""PSNR and SSIM against closed forms; regions; steadiness."""

from __future__ import annotations

import numpy as np
import pytest

from lapwan.evaluation import pixels
from lapwan.evaluation.clips import EvalClip, VideoShape
from lapwan.evaluation.scorers import Made, Temporal


def grey(value: int, frames: int = 2, size: int = 24) -> np.ndarray:
    return np.full((frames, size, size, 3), value, np.uint8)


def test_psnr_of_a_constant_error():
    assert pixels.psnr(grey(100), grey(110)) == pytest.approx(20 * np.log10(255 / 10))
    assert pixels.psnr(grey(7), grey(7)) == pixels.PSNR_CAP


def test_psnr_inside_a_region_sees_the_region_only():
    ours, truth, region = grey(100), grey(100), np.zeros((2, 24, 24), np.float32)
    ours[:, :4, :4] = 120
    region[:, :4, :4] = 1
    assert pixels.psnr(ours, truth, region) == pytest.approx(20 * np.log10(255 / 20))
    assert pixels.psnr(ours, truth, 1 - region) == pixels.PSNR_CAP


def test_ssim_of_constants_is_its_luminance_term_and_of_equals_is_one():
    """(2·a·b + C1) / (a² + b² + C1); variances are 0."""
    c1 = (0.01 * 255) ** 2
    expected = (2 * 60 * 90 + c1) / (60**2 + 90**2 + c1)
    assert pixels.ssim_map(grey(60), grey(90)) == pytest.approx(expected, abs=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    assert pixels.ssim_map(noise, noise) == pytest.approx(1.0)
    assert pixels.ssim_map(noise, noise[:, ::-1].copy()).mean() < 0.3


def test_a_still_video_is_perfectly_consistent_and_does_not_move():
    made = Made(grey(50, frames=5), EvalClip("a", "b"), VideoShape(5, (24, 24), 16))
    assert Temporal().score(made) == {"temporal_consistency": pytest.approx(1.0), "motion": 0.0}
    blinking = np.concatenate([grey(50, 1), grey(90, 1), grey(50, 1)])
    found = Temporal().score(Made(blinking, made.clip, made.shape))
    assert found["motion"] == 40.0 and found["temporal_consistency"] < 0.95
