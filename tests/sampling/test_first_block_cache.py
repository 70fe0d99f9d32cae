"""Steps that keep an earlier one's blocks: never without being asked, and by no more than was predicted."""

from __future__ import annotations

import pytest
import torch
from sampling_cases import generate, refused

from lapwan.names import NoiseExpert
from lapwan.sampling.generator import Generator
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.transformer.first_block_cache import FirstBlockCache


def given(tiny_t2v):
    model = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.LOW))
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(1, 16, 3, 6, 6, generator=generator), torch.randn(1, 512, 96, generator=generator)


@torch.no_grad()
def test_a_step_is_kept_where_the_error_is_predicted_small_and_the_error_is_about_that(tiny_t2v):
    model, x, text = given(tiny_t2v)
    calls: list[int] = []
    model.transformer.blocks[1].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    cache = FirstBlockCache(0.2)
    for step, timestep in enumerate((500.0, 495.0, 490.0, 485.0, 300.0)):
        t, before = torch.tensor([timestep]), len(calls)
        exact = model.velocity(x, t, text)
        assert len(calls) == before + 1
        kept = model.velocity(x, t, text, first_block_cache=cache.branch("text"))
        if step < 2:  # nothing known yet: computed, and so exact
            assert len(calls) == before + 2
            torch.testing.assert_close(kept, exact, rtol=0, atol=0)
        elif step < 4:
            assert len(calls) == before + 1 and len(cache.predicted) == step - 1
            error = float((kept - exact).norm() / exact.norm())
            assert 0 < error < 3 * cache.predicted[-1] < 0.6
    assert len(cache.errors) >= 1 and 0 < cache.errors[0] < 0.2


@torch.no_grad()
def test_nothing_is_kept_above_the_tolerance_or_for_another_size(tiny_t2v):
    model, x, text = given(tiny_t2v)
    strict = FirstBlockCache(1e-6)
    for timestep in (500.0, 450.0, 400.0, 350.0):
        t = torch.tensor([timestep])
        ours = model.velocity(x, t, text, first_block_cache=strict.branch("text"))
        torch.testing.assert_close(ours, model.velocity(x, t, text), rtol=0, atol=0)
    assert not strict.predicted and len(strict.errors) == 3
    loose = FirstBlockCache(0.9)
    for index, size in enumerate((6, 6, 4, 6)):
        part = x[..., :size]
        model.velocity(part, torch.tensor([500.0 - index]), text, first_block_cache=loose.branch("text"))
    assert not loose.predicted  # a new size begins anew


def test_a_video_spares_blocks_when_asked_and_stays_near(tiny_t2v, small):
    exact = Generator(tiny_t2v).latents(small(tiny_t2v, steps=12, guidance=3.0))
    near = Generator(tiny_t2v).latents(
        small(tiny_t2v, steps=12, guidance=3.0, first_block_cache={NoiseExpert.HIGH: 0.1, NoiseExpert.LOW: 0.1}))
    error = float((near - exact).norm() / exact.norm())
    assert 0 < error < 0.3


def test_the_command_takes_it_says_what_it_did_and_refuses_nonsense(lapwan):
    ran = generate(lapwan, "--reuse", "0.2", "--steps", "8")
    assert ran.code == 0 and "noise expert: " in ran.err, ran
    assert "evaluations skipped all blocks but the first" in ran.err, ran
    refused(generate(lapwan, "--reuse", "2"), "first_block_cache", "2 must be a relative error")
    refused(generate(lapwan, "--first-block-cache", "middle=0.1"), "first_block_cache",
            "'middle' is not a noise expert")


@pytest.mark.parametrize("asked", ["0.1", "high=0.1,low=0.05"])
def test_spellings(asked):
    from lapwan.settings.generate import VideoSettings

    value = VideoSettings(first_block_cache=asked).first_block_cache
    assert value == (0.1 if asked == "0.1" else {NoiseExpert.HIGH: 0.1, NoiseExpert.LOW: 0.05})
