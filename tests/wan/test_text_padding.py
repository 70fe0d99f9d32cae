"""Folding the padding of a text changes nothing: against all 512 rows, in fp64."""

from __future__ import annotations

import pytest
import torch

from lapwan.lora.attach import Group, attach, initial_state
from lapwan.lora.dropout import Dropout, DropoutRates
from lapwan.names import NoiseExpert
from lapwan.wan.backbone import WanBackbone, load_transformer
from lapwan.wan.text import pad_text
from lapwan.wan.transformer.prompt import Prompt, TextRows, fold_padding, trim_padding


def texts(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pad_text([torch.randn(n, 96, generator=generator, dtype=torch.float64) for n in lengths])


@pytest.fixture(scope="module")
def backbone(tiny_t2v):
    model = load_transformer(tiny_t2v, NoiseExpert.LOW).double()
    model.rope.double()
    return WanBackbone(model)


def test_the_velocity_is_that_of_all_rows(backbone):
    text, x = texts(3, 0, 17), torch.randn(3, 16, 2, 4, 4, dtype=torch.float64)
    timestep = torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64)
    with torch.no_grad():
        folded = backbone.velocity(x, timestep, text)
        kept = backbone.velocity(x, timestep, Prompt(text))
        first = backbone.velocity(x[:2], timestep[:2], Prompt(text).first(2))
        whole = backbone.velocity(x, timestep, TextRows(text))
    scale = whole.abs().max()
    assert (folded - whole).abs().max() < 1e-10 * scale and (kept - whole).abs().max() < 1e-10 * scale
    assert (first - whole[:2]).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("grad", [False, True])
def test_rows_of_padding_computed_once_are_all_of_them(backbone, grad):
    """As on a GPU: keys and values of the words and of one row of padding, repeated as often as there is padding."""
    text, x = texts(3, 0, 17), torch.randn(3, 16, 2, 4, 4, dtype=torch.float64)
    timestep, calls = torch.tensor([100.0, 500.0, 900.0], dtype=torch.float64), []
    for block in backbone.transformer.blocks:
        block.attn2.to_k.register_forward_hook(lambda module, given, out: calls.append(given[0].shape[1]))
    with torch.set_grad_enabled(grad):
        whole = backbone.velocity(x, timestep, TextRows(text))
        calls.clear()
        once = backbone.velocity(x, timestep, TextRows(text[:, :18], None, 512 - 17))
    with torch.no_grad():
        kept = backbone.velocity(x, timestep, Prompt(TextRows(*trim_padding(text))))
    assert set(calls) == {18}
    scale = whole.abs().max()
    assert (once - whole).abs().max() < 1e-10 * scale and (kept - whole).abs().max() < 1e-10 * scale
    assert Prompt(texts(512)).text.last_row_count == Prompt(texts(511)).text.last_row_count == 1


def test_what_is_kept_and_what_is_not_folded():
    short, bias = fold_padding(texts(3, 0, 17))
    assert short.shape == (3, 18, 96) and bias is not None and bias.shape == (3, 1, 1, 18)
    assert bias[0, 0, 0, :3].eq(0).all() and bias[2, 0, 0, 17].exp() == pytest.approx(512 - 17)
    assert bias[:, 0, 0].exp().sum(dim=1).tolist() == pytest.approx([512.0] * 3)
    for text in (texts(500), texts(3).bfloat16(), texts(3).requires_grad_(), texts(3).to("meta")):
        same, none = fold_padding(text)
        assert same is text and none is None


def test_dropout_keeps_all_rows(tiny_t2v):
    """Its masks are drawn for each row."""
    backbone = WanBackbone(load_transformer(tiny_t2v, NoiseExpert.LOW))
    state = initial_state(backbone.transformer, {"blocks.0.attn2.to_k": 2}, None, 0)
    adapter = attach(backbone.transformer, [Group("lora", state, trainable=True)])
    dropout, rows = Dropout(DropoutRates(neuron=0.5), adapter.layers), []
    backbone.transformer.condition_embedder.text_embedder.register_forward_hook(
        lambda module, given, out: rows.append(given[0].shape[1]))
    for keys in ((), ((0, "clip"),)):
        with dropout.scope(adapter.holder, keys):
            backbone.velocity(torch.randn(1, 16, 2, 4, 4), torch.tensor([5.0]), texts(3).float())
    assert rows == [4, 512]
