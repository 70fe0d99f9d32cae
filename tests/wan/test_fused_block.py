"""The fused block equals the eager block: in the kernels' torch forms (fp64), and those equal the Triton kernels."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from lapwan.names import Precision
from lapwan.tiny.model import TRANSFORMER
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import LINEAR_CLASSES
from lapwan.wan.quantise.load import fill, linears_of
from lapwan.wan.transformer.block import BlockFunction, eager_block, fused_applies, fused_block
from lapwan.wan.transformer.forward import TokenTimes, first_frame_times
from lapwan.wan.transformer.kernels import Triton


def made(dtype: torch.dtype) -> WanBackbone:
    torch.manual_seed(0)
    model = WanTransformer3DModel(in_channels=16, **{**TRANSFORMER, "num_layers": 3}).to(dtype).eval()
    for block in model.blocks:  # as trained: neither ones nor zeros
        for name in ("norm2.weight", "norm2.bias", "attn1.norm_q.weight", "attn1.norm_k.weight", "attn2.norm_q.weight"):
            block.get_parameter(name).data.normal_(1.0, 0.3)
    return WanBackbone(model.requires_grad_(False))


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 3, 6, 8, generator=generator).to(dtype)
    return x, torch.tensor([900.0, 312.5]), torch.randn(2, 12, TRANSFORMER["text_dim"], generator=generator).to(dtype)


@torch.no_grad()
def velocity(model: WanBackbone, block: BlockFunction, *inputs: Any) -> Tensor:
    model.options.block = block
    return model.velocity(*inputs)


@pytest.mark.parametrize("alike", [False, True])
def test_it_is_the_eager_block(alike):
    """With a timestep for each sample, and with one row of modulation for both."""
    x, t, text = given(torch.float64)
    t = torch.tensor(700.0).expand(2) if alike else t
    plain, ours = (velocity(made(torch.float64), block, x, t, text) for block in (eager_block, fused_block))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clean", [[True, True], [True, False], None])
def test_it_is_the_eager_block_with_a_clean_first_frame(clean):
    """Two rows of modulation for each sample, in some samples equal ones, or two rows for all samples; and both are the
    block with a timestep for each token."""
    x, t, text = given(torch.float64)
    if clean is None:
        pair = first_frame_times(t[:1], torch.tensor([True]), x.shape[2:], (1, 2, 2))
        times = TokenTimes(pair.values_BK.expand(2, -1), pair.counts)
    else:
        times = first_frame_times(t, torch.tensor(clean), x.shape[2:], (1, 2, 2))
    model = made(torch.float64)
    plain, ours = (velocity(model, block, x, times, text) for block in (eager_block, fused_block))
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
    per_token = times.per_token()
    assert per_token.shape == (2, 36) and float(per_token[0, 0]) == 0 != float(per_token[0, 12])
    torch.testing.assert_close(velocity(model, eager_block, x, per_token, text), plain, rtol=0, atol=1e-10)


def test_a_clean_first_frame_has_the_gradients_of_a_timestep_for_each_token():
    """Of latents and of a trained Linear, with both samples in one batch."""
    x, t, text = given(torch.float64)
    times = first_frame_times(t, torch.tensor([True, False]), x.shape[2:], (1, 2, 2))
    gradients = []
    for given_times in (times, times.per_token()):
        model = made(torch.float64)
        weight = model.transformer.blocks[1].attn1.to_q.weight.requires_grad_(True)
        leaf = x.clone().requires_grad_(True)
        model.velocity(leaf, given_times, text).square().mean().backward()
        gradients.append((leaf.grad, weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clean", [False, True])
def test_the_compiler_takes_it_whole(clean):
    """Its lists of outputs and optional arguments, without generating code."""
    model, inputs = made(torch.float32), given(torch.float32)
    if clean:
        x, t, text = inputs
        inputs = (x, first_frame_times(t, torch.tensor([True, False]), x.shape[2:], (1, 2, 2)), text)
    compiled = torch.compile(fused_block, backend="aot_eager", dynamic=False, fullgraph=True)
    assert torch.equal(velocity(model, compiled, *inputs), velocity(model, fused_block, *inputs))


def test_a_step_with_a_graph_or_with_many_timesteps_takes_the_eager_path():
    """Meta tensors stand for a GPU's, as in the memory plan."""
    block = made(torch.bfloat16).transformer.blocks[0]
    width = block.attn1.to_q.in_features

    def x(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
        return torch.empty(2, 36, width, dtype=dtype, device=device)

    def modulation(samples: int, rows: int) -> Tensor:
        return torch.empty(samples, rows, 6, width, device="meta")

    with torch.no_grad():
        assert all(fused_applies(block, x(), modulation(samples, 1), None) for samples in (1, 2))
        assert not fused_applies(block, x(), modulation(2, 36), None)
        assert all(fused_applies(block, x(), modulation(samples, 2), (12, 24)) for samples in (1, 2))
        assert not fused_applies(block, x(), modulation(1, 3), (12, 12, 12))
        assert not fused_applies(block, x(torch.float32), modulation(2, 1), None)
        assert not fused_applies(block, x(device="cpu"), modulation(2, 1), None)
    assert not fused_applies(block, x(), modulation(2, 1), None)


def test_in_fp8_it_rounds_where_the_eager_block_does():
    """Codes go from kernel to product; without a GPU the product is emulated."""
    model = made(torch.float32)
    transformer = model.transformer
    source = {n: lambda p=p: p.data.clone() for n, p in transformer.named_parameters()}
    fill(transformer, source, linears_of(transformer.blocks, "blocks"), Precision.FP8, lambda name, stored: stored,
         torch.device("cpu"), None)
    assert isinstance(transformer.blocks[0].ffn.net[2], LINEAR_CLASSES[Precision.FP8])
    inputs = given(torch.float32)
    plain, ours = (velocity(model, block, *inputs) for block in (eager_block, fused_block))
    exact = velocity(made(torch.float32), eager_block, *inputs)
    assert float((ours - plain).norm()) < 0.3 * float((plain - exact).norm())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may work")
def test_without_a_compiler_torchs_operations_run(capsys):
    triton = Triton(installed=True)
    for _ in range(2):
        triton.try_on(torch.device("cuda"))
    assert not triton.works
    assert capsys.readouterr().err.count("Triton cannot build kernels here (") == 1


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch's CUDA builds")
def test_the_kernels_are_their_torch_forms():
    program = Path(__file__).with_name("triton_parity.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "alike", done.stderr[-2000:]
