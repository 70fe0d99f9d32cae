"""Folding the padding of a text changes nothing: against all 512 rows, in fp64."""

from __future__ import annotations

import pytest
import torch

from lapwan.names import NoiseExpert
from lapwan.wan.backbone import load_transformer, velocity
from lapwan.wan.text import pad_text
from lapwan.wan.transformer import forward, prompt_cache
from lapwan.wan.transformer.prompt_cache import PromptCache
from lapwan.wan.transformer.text_padding import fold_padding


def texts(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pad_text([torch.randn(n, 96, generator=generator, dtype=torch.float64) for n in lengths])


@pytest.fixture(scope="module")
def transformer(tiny_t2v):
    model = load_transformer(tiny_t2v, NoiseExpert.LOW).double()
    model.rope.double()
    return model


def test_the_velocity_is_that_of_all_rows(transformer, monkeypatch):
    text, x = texts(3, 0, 17), torch.randn(3, 16, 2, 4, 4, dtype=torch.float64)
    timestep = torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64)
    with torch.no_grad():
        folded = velocity(transformer, x, timestep, text)
        kept = velocity(transformer, x, timestep, PromptCache(text))
        first = velocity(transformer, x[:2], timestep[:2], PromptCache(text).first(2))
        for module in (forward, prompt_cache):
            monkeypatch.setattr(module, "fold_padding", lambda text: (text, None))
        whole = velocity(transformer, x, timestep, text)
    scale = whole.abs().max()
    assert (folded - whole).abs().max() < 1e-10 * scale and (kept - whole).abs().max() < 1e-10 * scale
    assert (first - whole[:2]).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("grad", [False, True])
def test_rows_of_padding_computed_once_are_all_of_them(transformer, monkeypatch, grad):
    """As on a GPU: keys and values of the words and of one row of padding, repeated as often as there is padding."""
    for module in (forward, prompt_cache):
        monkeypatch.setattr(module, "fold_padding", lambda text: (text, None))
    text, x = texts(3, 0, 17), torch.randn(3, 16, 2, 4, 4, dtype=torch.float64)
    timestep, calls = torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64), []
    for block in transformer.blocks:
        block.attn2.to_k.register_forward_hook(lambda module, given, out: calls.append(given[0].shape[1]))
    with torch.set_grad_enabled(grad):
        whole = velocity(transformer, x, timestep, text)
        calls.clear()
        embed = forward._embed_text
        monkeypatch.setattr(
            forward, "_embed_text", lambda model, text: embed(model, text) if isinstance(text, PromptCache)
            else forward._EmbeddedText(model.condition_embedder.text_embedder(text[:, :18]), None, 512 - 17))
        once = velocity(transformer, x, timestep, text)
    with torch.no_grad():
        kept = velocity(transformer, x, timestep, PromptCache(text))
    assert set(calls) == {18}
    scale = whole.abs().max()
    assert (once - whole).abs().max() < 1e-10 * scale and (kept - whole).abs().max() < 1e-10 * scale
    assert PromptCache(texts(512)).last_row_count == 1 and PromptCache(texts(511)).last_row_count == 1


def test_what_is_kept_and_what_is_not_folded():
    short, bias = fold_padding(texts(3, 0, 17))
    assert short.shape == (3, 18, 96) and bias is not None and bias.shape == (3, 1, 1, 18)
    assert bias[0, 0, 0, :3].eq(0).all() and bias[2, 0, 0, 17].exp() == pytest.approx(512 - 17)
    assert bias[:, 0, 0].exp().sum(dim=1).tolist() == pytest.approx([512.0] * 3)
    for text in (texts(500), texts(3).bfloat16(), texts(3).requires_grad_(), texts(3).to("meta")):
        same, none = fold_padding(text)
        assert same is text and none is None


def test_dropout_keeps_all_rows(transformer, monkeypatch):
    """Its masks are drawn for each row."""
    seen = []
    monkeypatch.setattr(forward, "fold_padding", lambda text: seen.append(text) or (text, None))
    real = forward.block_needs
    monkeypatch.setattr(forward, "block_needs", lambda block: forward.BlockNeeds(real(block).graph, True))
    velocity(transformer, torch.randn(1, 16, 2, 4, 4, dtype=torch.float64), torch.tensor([5.0]), texts(3))
    assert not seen
