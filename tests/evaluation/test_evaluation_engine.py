"""Batches equal single videos; every adapter meets the same draws; the hint decides; finished videos are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import write_random_lora
from cache_cases import write_random_cache

from lapwan.caching.layout import write_roi
from lapwan.caching.read import load_index
from lapwan.data.taxonomy import load_taxonomy
from lapwan.errors import UserError
from lapwan.evaluation.arms import Arm, make_arm
from lapwan.evaluation.bootstrap import paired_bootstrap
from lapwan.evaluation.clips import EvaluationClip, VideoShape, evenly_spaced, read_eval_clips
from lapwan.evaluation.flow_losses import FlowPlan, flow_losses
from lapwan.evaluation.metrics import JudgeMetrics, TemporalMetrics
from lapwan.evaluation.router_accuracy import routing_scores
from lapwan.evaluation.videos import Sampling, VideoStore, default_sampling, generate_and_score, request_for
from lapwan.losses import flow
from lapwan.losses.sigmas import Uniform
from lapwan.models.base import Base
from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.sampling.request import complete_guidance
from lapwan.settings.lora_argument import LoraArgument
from lapwan.train.callbacks.validation import fixed_draws
from lapwan.train.clip_store import ClipStore
from lapwan.train.objective import SigmaRule
from lapwan.wan.text import pad_text

HIGH, LOW = NoiseExpert.HIGH, NoiseExpert.LOW
TAXONOMY = load_taxonomy("surgical4")


def small(spec, guidance: float = 2.0, **changes) -> Sampling:
    shape = VideoShape(5, (32, 32), 16)
    return replace(default_sampling(spec), shape=shape, steps=3, guidance=complete_guidance(spec, guidance), **changes)


@pytest.fixture(scope="module")
def clips(held_out) -> list[EvaluationClip]:
    return read_eval_clips(held_out, TAXONOMY)


@pytest.fixture(scope="module")
def arms(tiny_t2v, mixture_path, tmp_path_factory) -> dict[str, Arm]:
    base = Base(tiny_t2v)
    loras = [LoraArgument.model_validate(text) for text in write_random_lora(tmp_path_factory.mktemp("loras"))]
    return {
        "none": Arm("none", base), "again": Arm("again", base), "lora": make_arm("lora", base, loras),
        "router": make_arm("router", base, moe=mixture_path),
        "hint": make_arm("hint", base, moe=mixture_path, hint="truth"),
        "wrong": make_arm("wrong", base, moe=mixture_path, hint="wrong"),
    }


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["none", "lora", "router", "hint"])
def test_a_batch_is_its_videos_one_at_a_time(t2v_generator, arms, clips, name, guidance):
    """Of different prompts, seeds and hints; guidance doubles the batch, and the gates with it."""
    arm = arms[name]
    sampling = small(t2v_generator.spec, guidance)
    t2v_generator.use(arm.base, arm.adapters)
    requests = [request_for(t2v_generator.spec, arm, clip, sampling, i) for i, clip in enumerate(clips[:3])]
    together = t2v_generator.latents(*requests)
    alone = torch.cat([t2v_generator.latents(request) for request in requests])
    assert (together - alone).abs().max() < 2e-5 * alone.abs().max()
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_a_batch_of_image_to_video_is_its_videos_one_at_a_time(tiny_i2v, clips):
    base = Base(tiny_i2v)
    generator, sampling = Generator(base, cache_conditions=True), small(tiny_i2v)
    requests = [request_for(tiny_i2v, Arm("none", base), clip, sampling, 0) for clip in clips[:2]]
    together = generator.latents(*requests)
    alone = torch.cat([generator.latents(request) for request in requests])
    assert (together - alone).abs().max() < 2e-5 * alone.abs().max()
    assert torch.equal(generator.latents(*requests), together), "conditions that were kept are those made"
    with pytest.raises(ValueError, match="one size"):
        generator.latents(requests[0], replace(requests[1], steps=4))
    with pytest.raises(ValueError, match="a first-block cache decides for one video"):
        generator.latents(*(replace(request, first_block_cache={LOW: 0.1}) for request in requests))


def test_an_image_to_video_model_is_given_the_clips_last_frame_too_if_asked(tiny_i2v, ti2v, clips):
    base, sampling = Base(tiny_i2v), small(tiny_i2v, last_image=True)
    request = request_for(tiny_i2v, Arm("none", base), clips[0], sampling, 0)
    frames = clips[0].frames(sampling.shape)
    assert np.array_equal(request.image, frames[0]) and np.array_equal(request.last_image, frames[-1])
    assert not np.array_equal(frames[0], frames[-1])
    assert request_for(tiny_i2v, Arm("none", base), clips[0], small(tiny_i2v), 0).last_image is None
    with pytest.raises(UserError, match="takes a first frame only; leave --last-image out"):
        request_for(ti2v, Arm("none", Base(ti2v)), clips[0], small(ti2v, last_image=True, from_image=True), 0)


def test_videos_of_no_adapter_twice_are_the_same_and_seeds_and_clips_differ(t2v_generator, arms, clips):
    sampling = small(t2v_generator.spec, seeds=2, batch_size=3)
    one, two = (generate_and_score(t2v_generator, arms[name], clips[:2], sampling, [TemporalMetrics()])
                for name in ("none", "again"))
    for metric, values in one.items():
        gap = paired_bootstrap(values, two[metric])
        assert values.shape == (2, 2) and (gap.mean, gap.low, gap.high) == (0.0, 0.0, 0.0)
        assert len(np.unique(values)) == 4
    seeds = {request_for(t2v_generator.spec, arms[n], c, sampling, s).seed for n in arms for c in clips for s in (0, 1)}
    assert len(seeds) == 8, "keyed by clip and index, not by adapter"


def test_the_wrong_hint_is_another_family_and_changes_the_video(t2v_generator, arms, clips):
    for clip in clips:
        right, wrong = arms["hint"].hint_for(clip), arms["wrong"].hint_for(clip)
        assert right != wrong and wrong in TAXONOMY.keys
        assert wrong != TAXONOMY.keys[int(np.argmax(clip.weights))]
    assert arms["router"].hint_for(clips[0]) is None
    sampling = small(t2v_generator.spec)
    found = {name: generate_and_score(t2v_generator, arms[name], clips[:2], sampling, [TemporalMetrics()])["motion"]
             for name in ("none", "lora", "hint", "wrong")}
    assert len({values.tobytes() for values in found.values()}) == 4


def test_the_wrong_hint_of_a_clip_with_two_instruments_is_neither():
    for weights, wrong in (((0.6, 0.4, 0.0, 0.0), 2), ((0.0, 0.0, 0.4, 0.6), 0), ((0.4, 0.3, 0.2, 0.1), 3)):
        assert EvaluationClip("a", "b", weights).wrong_hint(TAXONOMY) == TAXONOMY.keys[wrong]


def _losses(generator, arm, cache, **plan):
    index = load_index(cache)
    store = ClipStore(index, index.items, torch.device("cpu"), 4)
    return flow_losses(generator, arm, store, FlowPlan(**{"bins": 3, "seed": 4, **plan}))


def test_flow_losses_are_paired_by_clip_and_do_not_depend_on_the_batch(t2v_generator, arms, t2v_cache):
    one = _losses(t2v_generator, arms["none"], t2v_cache, batch_size=3)
    again = _losses(t2v_generator, arms["again"], t2v_cache, batch_size=1)
    hint, wrong = (_losses(t2v_generator, arms[name], t2v_cache) for name in ("hint", "wrong"))
    for noise_expert in (HIGH, LOW):
        assert one[noise_expert].whole_PK.shape == (4, 3)
        assert np.allclose(one[noise_expert].whole_PK, again[noise_expert].whole_PK, rtol=1e-5)
        assert np.array_equal(one[noise_expert].sigma_PK, hint[noise_expert].sigma_PK)
        assert not np.allclose(hint[noise_expert].whole_PK, wrong[noise_expert].whole_PK, rtol=1e-4)
        assert np.isnan(one[noise_expert].roi_PK[1]).all() and not np.isnan(one[noise_expert].roi_PK[0]).any()
        band = t2v_generator.spec.bands[noise_expert]
        edges = np.linspace(band.low, band.high, 4)
        sigma_PK = one[noise_expert].sigma_PK
        assert ((sigma_PK >= edges[:-1]) & (sigma_PK <= edges[1:])).all(), "one draw a bin"
    same = _losses(t2v_generator, arms["again"], t2v_cache, batch_size=3)
    assert all(np.array_equal(one[e].whole_PK, same[e].whole_PK) for e in one)


def test_a_flow_loss_is_the_mean_error_over_the_region_and_over_the_rest(t2v_generator, arms, t2v_cache):
    """Against the definition: m·e summed over m, and (1 − m)·e summed over 1 − m."""
    found = _losses(t2v_generator, arms["none"], t2v_cache)[LOW]
    index = load_index(t2v_cache)
    batch = ClipStore(index, index.items, torch.device("cpu"), 4).batch([2])
    sigma = found.sigma_PK[2, 1]
    band = t2v_generator.spec.bands[LOW]
    draws = fixed_draws(SigmaRule(Uniform(), band), batch, [(sigma - band.low) / (band.high - band.low)],
                        (4, "evaluate"), 1)
    x0, noise = batch.latents_BCTHW, draws.noise_BCTHW
    with torch.no_grad():
        v = t2v_generator.noise_experts.backbone(LOW).velocity(
            flow.add_noise(x0, noise, draws.sigma_B), 1000 * draws.sigma_B.float(), pad_text(batch.text))
    error, mask = (v - (noise - x0)).square().mean(dim=1)[0], batch.roi_BTHW[0]
    assert found.whole_PK[2, 1] == pytest.approx(float(error.mean()), rel=1e-5)
    assert found.roi_PK[2, 1] == pytest.approx(float((error * mask).sum() / mask.sum()), rel=1e-5)
    assert found.outside_PK[2, 1] == pytest.approx(float((error * (1 - mask)).sum() / (1 - mask).sum()), rel=1e-4)


def test_a_region_that_covers_everything_leaves_no_outside(t2v_generator, arms, tiny_t2v, tmp_path):
    """Rounding over nothing would be any number."""
    cache = write_random_cache(tmp_path, tiny_t2v, 1)
    _, time, height, width = tiny_t2v.latent_shape(5, 32, 32)
    write_roi(cache / "clip0_lapwan_roi.safetensors", np.ones((time, height, width), np.float32), {})
    found = _losses(t2v_generator, arms["none"], cache)[HIGH]
    assert np.isnan(found.outside_PK).all() and np.allclose(found.roi_PK, found.whole_PK, rtol=1e-5)


def written(folder: Path) -> dict[str, int]:
    """When each video was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}


def test_finished_videos_are_used_again_unless_what_decides_them_changed(t2v_generator, arms, clips, tmp_path):
    sampling, store = small(t2v_generator.spec, batch_size=2), VideoStore(tmp_path, "cpu")
    made = generate_and_score(t2v_generator, arms["none"], clips, sampling, [TemporalMetrics()], store)
    (tmp_path / "none").joinpath(store.path(arms["none"], clips[3], 0).with_suffix(".json").name).unlink()
    before = written(tmp_path)
    again = generate_and_score(t2v_generator, arms["none"], clips, sampling, [TemporalMetrics()], store)
    after = written(tmp_path)
    assert sum(before[name] != after[name] for name in before) == 2, "only the batch of the missing one, cut as before"
    assert all(np.array_equal(made[metric], again[metric]) for metric in made)
    names = ("temporal_consistency", "motion")
    keep = {"arm": arms["none"], "clip": clips[0], "sampling": sampling, "index": 0, "names": names}
    assert store.load(**keep) is not None
    other = {"sampling": replace(sampling, steps=4), "arm": arms["lora"], "names": ("identity",), "index": 1,
             "clip": replace(clips[0], prompt="剪刀")}
    for name, value in other.items():
        assert store.load(**{**keep, name: value}) is None, name
    assert VideoStore(tmp_path, "cuda").load(**keep) is None
    store.path(arms["none"], clips[0], 0).unlink()
    assert store.load(**keep) is None, "the video itself is gone"


def test_identity_is_a_matter_of_what_is_seen(held_out):
    from lapwan.evaluation.videos import score
    from lapwan.tiny.evaluators import SceneJudge
    from lapwan.tiny.scenes import SceneSpec, render

    shape = VideoShape(5, (96, 96), 16)
    frames = render(SceneSpec("hook", seed=77, size=(96, 96), frames=5)).frames_THWC
    for instrument, value in (("hook", 1.0), ("grasper", 0.0)):
        clip = EvaluationClip("a", "b", instrument=instrument)
        assert score(frames, clip, shape, [JudgeMetrics(SceneJudge(), "identity")]) == {"identity": value}


def test_routing_counts_labels_by_row_and_answers_by_column(arms, t2v_generator, clips):
    mixture = arms["router"].adapters.mixture
    features = [t2v_generator.text_features(clip.prompt) for clip in clips]
    found = routing_scores(mixture, features, [clip.weights for clip in clips])
    with torch.no_grad():
        answers = mixture.route(features).argmax(dim=1).tolist()
    truth = [int(np.argmax(clip.weights)) for clip in clips]
    assert sorted(truth) == [0, 1, 2, 3]
    expected = np.zeros((4, 4), int)
    for label, answer in zip(truth, answers, strict=True):
        expected[label, answer] += 1
    assert np.array_equal(found.confusion_EE, expected)
    assert found.accuracy == np.trace(expected) / 4 and (found.entropy_N <= np.log(4) + 1e-6).all()


def test_spread_takes_evenly_and_all_when_few():
    assert evenly_spaced(list(range(10)), 4) == [0, 2, 5, 7]
    assert evenly_spaced([1, 2], 5) == [1, 2] and evenly_spaced([1, 2], None) == [1, 2]


def test_folded_loras_are_the_same_adapter_in_the_weights(t2v_generator, tiny_t2v, tmp_path, t2v_cache):
    loras = [LoraArgument.model_validate(text) for text in write_random_lora(tmp_path)]
    beside = make_arm("beside", Base(tiny_t2v), loras)
    folded = make_arm("folded", Base(tiny_t2v), loras, fold=True)
    assert not folded.adapters.loras and folded.base.loras and folded.fingerprint != beside.fingerprint
    ours, theirs = (_losses(t2v_generator, arm, t2v_cache) for arm in (beside, folded))
    plain = _losses(t2v_generator, Arm("none", Base(tiny_t2v)), t2v_cache)
    for noise_expert in (HIGH, LOW):
        assert np.allclose(ours[noise_expert].whole_PK, theirs[noise_expert].whole_PK, rtol=1e-3)
        assert not np.allclose(ours[noise_expert].whole_PK, plain[noise_expert].whole_PK, rtol=1e-2)
