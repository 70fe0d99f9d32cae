"""The instruments to judge by: right on fresh scenes, right on the VAE's reconstructions, and able to say no."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lapwan.evaluation.router_accuracy import measure_probe
from lapwan.models.spec import ModelSpec
from lapwan.tiny.evaluators import evaluate_identity, locate_tip, probe_captions, tip_hits
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.scenes import Scene, SceneSpec, render
from lapwan.wan.text import encode_text, load_text_encoder
from lapwan.wan.vae import decode, encode, load_vae

_MOTIONS = ("stroke", "sweep", "lift", "advance")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Each instrument with two motions, among them pairs that pretraining never showed."""
    return [render(SceneSpec(name, side=side, motion=_MOTIONS[(i + j) % 4], seed=9_000 + 10 * i + j, size=(96, 96)))
            for i, name in enumerate(INSTRUMENTS) for j, side in enumerate(("left", "top"))]


def test_instrument_and_tip_of_fresh_scenes(scenes: list[Scene]) -> None:
    right, hits = [], []
    for scene in scenes:
        shares = evaluate_identity(scene.frames_THWC)
        assert shares.shape == (4,) and shares.sum() == pytest.approx(1, abs=1e-5)
        right.append(INSTRUMENTS[int(shares.argmax())] == scene.spec.instrument)
        hits += tip_hits(locate_tip(scene.frames_THWC), scene.tips, scene.spec.size).tolist()
    assert all(right) and np.mean(hits) > 0.97


def test_larger_pictures_are_judged_alike() -> None:
    scene = render(SceneSpec("grasper", seed=9_100, size=(144, 144), frames=5))
    assert INSTRUMENTS[int(evaluate_identity(scene.frames_THWC).argmax())] == "grasper"
    assert tip_hits(locate_tip(scene.frames_THWC), scene.tips, scene.spec.size).all()
    with pytest.raises(ValueError, match="64x96"):
        evaluate_identity(np.zeros((1, 64, 96, 3), np.uint8))


def test_without_the_instrument_no_tip_is_found() -> None:
    spec = SceneSpec("suction", seed=9_200, size=(96, 96))
    with_it, without = render(spec), render(spec, with_instrument=False)
    found = tip_hits(locate_tip(with_it.frames_THWC), with_it.tips, spec.size)
    lost = tip_hits(locate_tip(without.frames_THWC), with_it.tips, spec.size)
    assert found.mean() > 0.9 and lost.mean() < 0.6


def test_vae_keeps_what_tells_the_instruments_apart(tiny_t2v: ModelSpec, scenes: list[Scene]) -> None:
    vae, right, hits = load_vae(tiny_t2v), [], []
    for scene in scenes[::2]:
        pixels = torch.from_numpy(scene.frames_THWC[:9]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            again = decode(vae, encode(vae, pixels))
        frames = ((again[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        assert (again - pixels).square().mean() < 4 / 10**2.3  # 23 dB
        right.append(INSTRUMENTS[int(evaluate_identity(frames).argmax())] == scene.spec.instrument)
        hits += tip_hits(locate_tip(frames), scene.tips[:9], scene.spec.size).tolist()
    assert all(right) and np.mean(hits) > 0.9


def test_tip_hits_count_by_the_diagonal_and_skip_what_is_out_of_view() -> None:
    truth = np.array([[0.5, 0.5], [0.5, 0.5], [1.2, 0.5]])
    found = truth + np.array([[0.0, 0.069], [0.0, 0.072], [0.0, 0.0]])
    assert tip_hits(found, truth, (100, 100)).tolist() == [True, False]  # 5 % of the diagonal: 7.07 pixels


def test_text_features_tell_the_instruments_apart(tiny_t2v: ModelSpec) -> None:
    encoder = load_text_encoder(tiny_t2v)
    captions = probe_captions(600).captions
    result = measure_probe(captions, encode_text(encoder, [caption.text for caption in captions]))
    assert result.fitted > 0.9 and result.held_out > 0.7
    noise = [torch.randn(3, 96, generator=torch.Generator().manual_seed(i)) for i in range(len(captions))]
    assert measure_probe(captions, noise).held_out < 0.5
