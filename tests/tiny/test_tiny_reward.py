"""The embedded model's reward: it knows instruments and looks, its gradient leads there, its hinge stays alive."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lapwan.api import VideoGenerator
from lapwan.data.labels import label_caption
from lapwan.data.taxonomy import load_taxonomy
from lapwan.losses.preference import MARGIN, relative_preference
from lapwan.rewards.base import score
from lapwan.rewards.build import build_rewards, reward_bytes
from lapwan.settings.rewards import TinyRewardSettings
from lapwan.tiny.evaluators import load_evaluator
from lapwan.tiny.instruments import INSTRUMENTS
from lapwan.tiny.reward import EMBEDDED_REWARD_KINDS, WORDS, TinyReward
from lapwan.tiny.scenes import SceneSpec, render

PUBLISHED = (("Natural-lighting", "Detail", "Detailed", "Real"), ("Concept art", "Painting", "Anime", "Flat", "Oil"))


@pytest.fixture(scope="module")
def reward() -> TinyReward:
    return TinyReward()


@pytest.fixture(scope="module")
def scenes() -> tuple[Tensor, list[str]]:
    """Two scenes of each instrument, as pictures, with their own captions (Chinese and English)."""
    made = [render(SceneSpec(name, side=side, seed=7_000 + 10 * i + j, size=(96, 96), frames=3))
            for j, side in enumerate(("left", "bottom")) for i, name in enumerate(INSTRUMENTS)]
    pictures = torch.from_numpy(np.stack([scene.frames_THWC[1] for scene in made])).permute(0, 3, 1, 2).float() / 255
    return pictures, [scene.caption for scene in made]


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    """Stills of the untrained base."""
    generator = VideoGenerator("tiny-t2v")
    made = [generator.generate("剪刀剪断血管", num_frames=1, size=(96, 96), steps=6, guidance=1.0, seed=seed).frames[0]
            for seed in range(4)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def _prefers(reward: TinyReward, pixels: Tensor, positive: str, negative: str, captions: list[str],
             denoise: bool = True, k: float = 0.25) -> Tensor:
    texts = (reward.text([f"{word}. {caption}" for caption in captions]) for word in (positive, negative))
    flags = torch.full((len(captions),), denoise)
    return relative_preference(reward.image(pixels), *texts, torch.full((len(captions),), k), flags).relative_B


def test_a_scene_is_nearer_to_its_caption_than_to_those_of_other_instruments(reward, scenes):
    pictures, captions = scenes
    cosines = reward.image(pictures) @ reward.text(captions).T
    other = torch.arange(8)[:, None] % 4 != torch.arange(8)[None, :] % 4
    assert (cosines.diagonal()[:, None] - cosines)[other].min() > 0.1
    own = _prefers(reward, pictures, "real", "painting", captions)
    wrong = _prefers(reward, pictures, "real", "painting", captions[1:] + captions[:1])
    assert (own > wrong).all()
    torch.testing.assert_close(score(reward, pictures, captions), cosines.diagonal(), rtol=0, atol=1e-6)


SPOILED = {
    "bright": ("dark", lambda x: x * 0.6),
    "red": ("pale", lambda x: x.lerp(x.mean(dim=1, keepdim=True), 0.6)),
    "detailed": ("flat", lambda x: x.lerp(x.mean(dim=(2, 3), keepdim=True), 0.6)),
    "smooth": ("grainy", lambda x: x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
    "real": ("painting", lambda x: x.lerp(x.mean(dim=1, keepdim=True), 0.6)),
}


@pytest.mark.parametrize("word", SPOILED)
def test_a_spoiled_picture_is_worth_less_to_the_word_it_lacks(reward, scenes, drawn, word):
    opposite, spoil = SPOILED[word]
    for pixels in (scenes[0], drawn):
        captions = ["tissue"] * len(pixels)
        before = _prefers(reward, pixels, word, opposite, captions)
        after = _prefers(reward, spoil(pixels).clamp(0, 1), word, opposite, captions)
        red = pixels[:, 0].mean(dim=(1, 2)) - pixels[:, 2].mean(dim=(1, 2)) > 0.1
        counted = red if word in ("red", "real") else torch.ones(len(pixels), dtype=torch.bool)
        assert counted.any() and (before - after)[counted].min() > 0.01  # a grey picture has no colour to lose


def test_the_gradient_leads_up_in_pixels(reward, drawn):
    pixels = drawn.clone().requires_grad_()
    captions = ["剪刀剪断血管"] * len(drawn)
    before = _prefers(reward, pixels, "real", "painting", captions)
    (gradient,) = torch.autograd.grad(before.sum(), pixels)
    assert torch.isfinite(gradient).all()
    size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    after = _prefers(reward, pixels.detach() + 0.01 * gradient / size, "real", "painting", captions)
    assert (after > before + 0.005).all()


def test_the_published_control_words_act_and_none_is_an_instrument(reward):
    caption = "钩切割粘连"
    plain = reward.text([caption])
    for words, sign in zip(PUBLISHED, (1, -1), strict=True):
        for word in words:
            moved = reward.text([f"{word}. {caption}"]) - plain
            assert float(moved[0, 5:].sum()) * sign > 0.1
    for taxonomy in ("surgical4", "cholec6"):
        assert all(label_caption(word, load_taxonomy(taxonomy)).fallback for word in WORDS)
    assert torch.equal(reward.text(["grainy. a tool"]), reward.text(["噪点。一件工具"]))
    assert not torch.equal(reward.text(["oil"]), reward.text(["boil"]))  # words, not letters


def test_the_hinge_is_alive_in_both_branches_whatever_the_picture(reward, scenes, drawn):
    generator = torch.Generator().manual_seed(1)
    flat = torch.rand(16, 3, 1, 1, generator=generator).expand(16, 3, 96, 96)
    many = torch.cat([scenes[0], drawn, flat, torch.rand(16, 3, 96, 96, generator=generator)])
    for caption in ("剪刀剪断血管", "a tool"):
        for positive, negative in (("real", "painting"), (" ".join(PUBLISHED[0]), " ".join(PUBLISHED[1]))):
            for denoise, k in ((True, 0.25), (False, 0.3)):
                relative = _prefers(reward, many, positive, negative, [caption] * len(many), denoise, k)
                assert relative.max() < MARGIN


def test_embeddings_are_unit_and_of_each_picture_alone(reward, scenes):
    pictures, captions = scenes
    image, text = reward.image(pictures), reward.text(captions)
    for rows in (image, text):
        assert rows.dtype == torch.float32 and rows.norm(dim=-1).tolist() == pytest.approx([1] * 8, abs=1e-5)
    one_by_one = torch.cat([reward.image(p[None]) for p in pictures])
    torch.testing.assert_close(image, one_by_one, rtol=0, atol=1e-5)
    tall = torch.nn.functional.pad(pictures[:1], (0, 0, 16, 16))
    torch.testing.assert_close(reward.image(tall), image[:1], rtol=0, atol=1e-5)  # the middle counts


def test_it_is_built_by_its_settings_and_leaves_the_shared_evaluator_alone():
    made = build_rewards((TinyRewardSettings(name="own"),), "cpu", EMBEDDED_REWARD_KINDS)
    assert list(made) == ["own"] and made["own"].name == "own" and not made["own"].english_text
    made["own"].to("meta")
    assert next(load_evaluator().parameters()).device.type == "cpu"


def test_its_memory_is_that_of_its_weights_and_graph():
    kept, tensors = {}, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)  # alive, so that no address is used twice
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pixels = torch.rand(4, 3, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        TinyReward().image(pixels)
    predicted = reward_bytes((TinyRewardSettings(),), "cpu", 4, EMBEDDED_REWARD_KINDS)
    assert predicted == pytest.approx(sum(kept.values()), rel=0.05)  # the weights are kept, too
