"""Decoding with a gradient: the same pictures and gradients as diffusers' decode, with less memory."""

from __future__ import annotations

import pytest
import torch

from lapwan.memory.trace import trace_memory
from lapwan.models.spec import ModelSpec
from lapwan.wan.vae import decode_first_frame, decode_frames, denormalise, load_vae


@pytest.mark.parametrize("model", ["tiny_t2v", "ti2v"])  # Wan2.1's VAE; Wan2.2's, residual and in patches
@pytest.mark.parametrize("wanted", [[0], [0, 3, 7], [8], list(range(9))])
def test_frames_and_gradients_are_decodes(request: pytest.FixtureRequest, model, wanted):
    spec: ModelSpec = request.getfixturevalue(model)
    vae = load_vae(spec).double()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, spec.latent_channels, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    whole = vae.decode(denormalise(vae, z)).sample[:, :, wanted].transpose(1, 2)
    weights = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    [want] = torch.autograd.grad((whole * weights).sum(), z)
    ours = decode_frames(vae, z, wanted)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)
    [grad] = torch.autograd.grad((ours * weights).sum(), z)
    torch.testing.assert_close(grad, want, rtol=0, atol=1e-10)
    assert float(want.abs().max()) > 0


def test_a_first_frame_needs_no_cache_and_keeps_less_than_the_whole_graph(tiny_t2v: ModelSpec):
    vae = load_vae(tiny_t2v)
    z = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(decode_first_frame(vae, z), vae.decode(denormalise(vae, z)).sample[:, :, 0])
    assert all(entry is None for entry in vae._feat_map)
    shapes = vae.to("meta")
    x = torch.empty(z.shape, device="meta", requires_grad=True)
    ours = trace_memory(lambda: decode_first_frame(shapes, x).square().mean().backward()).peak
    plain = trace_memory(lambda: shapes.decode(x).sample.square().mean().backward()).peak
    assert ours < 0.7 * plain
