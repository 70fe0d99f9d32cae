"""Decoding with a gradient: the same pictures and gradients as diffusers' decode, with less kept."""

from __future__ import annotations

import pytest
import torch

from lapwan.memory.trace import measure
from lapwan.models.spec import ModelSpec
from lapwan.wan.vae import denormalise, load_vae
from lapwan.wan.vae_gradient import decode_frames, decode_stills, frame_choice


@pytest.mark.parametrize("wanted", [[0], [0, 3, 7], [8], list(range(9))])
def test_frames_and_gradients_are_decodes(tiny_t2v: ModelSpec, wanted):
    vae = load_vae(tiny_t2v).double()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 16, 3, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = vae.decode(denormalise(vae, z)).sample[:, :, wanted].transpose(1, 2)
    weights = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    [want] = torch.autograd.grad((whole * weights).sum(), z)
    ours = decode_frames(vae, z, wanted)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)
    [found] = torch.autograd.grad((ours * weights).sum(), z)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
    assert float(want.abs().max()) > 0


def test_a_still_needs_no_state_and_keeps_less_than_the_whole_graph(tiny_t2v: ModelSpec):
    vae = load_vae(tiny_t2v)
    z = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(decode_stills(vae, z), vae.decode(denormalise(vae, z)).sample[:, :, 0])
    assert all(one is None for one in vae._feat_map)
    shapes = vae.to("meta")
    x = torch.empty(z.shape, device="meta", requires_grad=True)
    ours = measure(lambda: decode_stills(shapes, x).square().mean().backward()).peak
    plain = measure(lambda: shapes.decode(x).sample.square().mean().backward()).peak
    assert ours < 0.7 * plain


def test_which_frames_are_judged():
    assert frame_choice(17, "first") == [0] and frame_choice(1, "all") == [0]
    assert frame_choice(17, "all") == list(range(17))
    assert frame_choice(17, 1) == [0] and frame_choice(17, 3) == [0, 8, 16] and frame_choice(5, 9) == [0, 1, 2, 3, 4]
