"""Evaluation on a GPU: batches are their videos one at a time, and losses are those of the CPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lapwan.caching.read import load_index
from lapwan.evaluation.arms import make_arm
from lapwan.evaluation.clips import EvaluationClip, VideoShape
from lapwan.evaluation.flow_losses import FlowPlan, flow_losses
from lapwan.evaluation.metrics import TemporalMetrics
from lapwan.evaluation.videos import default_sampling, generate_and_score, request_for
from lapwan.models.base import Base
from lapwan.sampling.generator import Generator
from lapwan.train.clip_store import ClipStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = ("电凝钩切割组织", "剪刀剪断血管", "吸引清理术野", "抓钳抓取标本袋", "吸引器从左侧进入，清理积液")


def test_a_batch_is_its_videos_one_at_a_time(tiny_t2v, mixture_path):
    base = Base(tiny_t2v)
    weights = np.eye(4)[[1, 0, 2, 3, 2]]
    clips = [EvaluationClip(text, text, tuple(own)) for text, own in zip(PROMPTS, weights.tolist(), strict=True)]
    generator = Generator(base, None, "cuda", torch.float32)
    sampling = replace(default_sampling(tiny_t2v), shape=VideoShape(9, (64, 64), 16), steps=6)
    for hint in (None, "truth", "wrong"):
        arm = make_arm("moe", base, moe=mixture_path, hint=hint)
        generator.use(arm.base, arm.adapters)
        requests = [request_for(tiny_t2v, arm, clip, sampling, 0) for clip in clips]
        together = generator.latents(*requests)
        alone = torch.cat([generator.latents(request) for request in requests])
        assert together.is_cuda and (together - alone).abs().max() < 1e-3 * alone.abs().max(), hint
    found = generate_and_score(generator, arm, clips, replace(sampling, batch_size=3), [TemporalMetrics()])
    assert found["motion"].shape == (5, 1) and not np.isnan(found["motion"]).any()


def test_flow_losses_are_those_of_the_cpu(tiny_t2v, mixture_path, t2v_cache):
    base, index = Base(tiny_t2v), load_index(t2v_cache)
    arm = make_arm("moe", base, moe=mixture_path, hint="truth")
    here, there = (
        flow_losses(Generator(base, None, device, torch.float32), arm,
                    ClipStore(index, index.items, torch.device(device), 4), FlowPlan(bins=2, batch_size=2))
        for device in ("cpu", "cuda"))
    for noise_expert, own in here.items():
        for name in ("sigma_PK", "whole_PK", "roi_PK", "outside_PK"):
            ours, theirs = getattr(own, name), getattr(there[noise_expert], name)
            assert np.allclose(ours, theirs, rtol=2e-3, equal_nan=True), (noise_expert, name)
