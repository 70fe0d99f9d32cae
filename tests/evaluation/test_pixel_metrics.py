"""PSNR and SSIM against closed forms; regions; steadiness."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lapwan.data.taxonomy import load_taxonomy
from lapwan.evaluation.clips import EvaluationClip, VideoShape, read_eval_clips
from lapwan.evaluation.metrics import (
    PSNR_CAP,
    GeneratedVideo,
    ReferenceMetrics,
    RewardMetrics,
    TemporalMetrics,
    psnr,
    ssim_map,
)
from lapwan.settings.rewards import TinyRewardSettings
from lapwan.tiny.dataset import write_dataset
from lapwan.tiny.reward import TinyRewardKind
from lapwan.tiny.scenes import SceneSpec, render


def grey(value: int, frames: int = 2, size: int = 24) -> np.ndarray:
    return np.full((frames, size, size, 3), value, np.uint8)


def test_psnr_of_a_constant_error():
    assert psnr(grey(100), grey(110)) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(grey(7), grey(7)) == PSNR_CAP


def test_psnr_inside_a_region_sees_the_region_only():
    ours, truth, region = grey(100), grey(100), np.zeros((2, 24, 24), np.float32)
    ours[:, :4, :4] = 120
    region[:, :4, :4] = 1
    assert psnr(ours, truth, region) == pytest.approx(20 * np.log10(255 / 20))
    assert psnr(ours, truth, 1 - region) == PSNR_CAP


def test_ssim_of_constants_is_its_luminance_term_and_of_equals_is_one():
    """(2·a·b + C1) / (a² + b² + C1); variances are 0."""
    c1 = (0.01 * 255) ** 2
    expected = (2 * 60 * 90 + c1) / (60**2 + 90**2 + c1)
    assert ssim_map(grey(60), grey(90)) == pytest.approx(expected, abs=1e-6)
    noise = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    assert ssim_map(noise, noise) == pytest.approx(1.0)
    assert ssim_map(noise, noise[:, ::-1].copy()).mean() < 0.3


def test_a_still_video_is_perfectly_consistent_and_does_not_move():
    made = GeneratedVideo(grey(50, frames=5), EvaluationClip("a", "b"), VideoShape(5, (24, 24), 16))
    assert TemporalMetrics().score(made) == {"temporal_consistency": pytest.approx(1.0), "motion": 0.0}
    blinking = np.concatenate([grey(50, 1), grey(90, 1), grey(50, 1)])
    found = TemporalMetrics().score(GeneratedVideo(blinking, made.clip, made.shape))
    assert found["motion"] == 40.0 and found["temporal_consistency"] < 0.95


@pytest.fixture(scope="module")
def scene_clip(tmp_path_factory) -> EvaluationClip:
    path = write_dataset(tmp_path_factory.mktemp("scene"), 1, 5, (48, 48), 5)
    return read_eval_clips(path, load_taxonomy("surgical4"), None)[0]


def test_a_clip_against_itself_and_with_its_region_damaged(scene_clip):
    shape = VideoShape(5, (48, 48), 16)
    truth, region = scene_clip.frames(shape), scene_clip.regions(shape)
    assert region.shape == (5, 48, 48) and 0 < region.mean() < 0.5
    boxes = [entry["box"] for entry in scene_clip.roi]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes]
    assert region.mean(axis=(1, 2)) == pytest.approx(areas, abs=1e-3)
    same = ReferenceMetrics().score(GeneratedVideo(truth, scene_clip, shape))
    assert same["psnr"] == same["roi_psnr"] == PSNR_CAP and same["roi_ssim"] == pytest.approx(1.0)
    damaged = np.where(region[..., None] > 0.5, 255 - truth, truth)
    found = ReferenceMetrics().score(GeneratedVideo(damaged, scene_clip, shape))
    assert found["roi_psnr"] < found["psnr"] < 40 and found["roi_ssim"] < found["ssim"] < 1


def test_a_mask_is_a_region_too(scene_clip, tmp_path):
    white = np.zeros((48, 48, 3), np.uint8)
    white[:, :12] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    region = replace(scene_clip, mask=tmp_path / "mask.png").regions(VideoShape(5, (48, 48), 16))
    assert region.shape == (5, 48, 48) and region[:, :, :12].all() and not region[:, :, 12:].any()


def test_a_reward_scores_frames_against_the_prompt(scene_clip):
    """The embedded model's own reward: the clip's instrument above another one."""
    device = torch.device("cpu")
    scorer = RewardMetrics("tiny", lambda: TinyRewardKind().make(TinyRewardSettings(), device), device)
    shape = VideoShape(5, (96, 96), 16)
    frames = render(SceneSpec("suction", seed=8, size=(96, 96), frames=5)).frames_THWC
    scores = {text: scorer.score(GeneratedVideo(frames, EvaluationClip("a", text), shape))
              for text in ("吸引清理术野", "剪刀剪断组织")}
    assert scores["吸引清理术野"]["tiny_score"] > scores["剪刀剪断组织"]["tiny_score"]
    assert 0.5 < scores["吸引清理术野"]["tiny_steadiness"] <= 1 + 1e-6
    assert scorer.names == ("tiny_score", "tiny_steadiness")
