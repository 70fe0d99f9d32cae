"""The fused block equals the eager block: in the kernels' torch forms (fp64), and those equal the Triton kernels."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from lapwan.names import Precision
from lapwan.tiny.model import TRANSFORMER
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.quantise.linears import LINEAR_CLASSES
from lapwan.wan.quantise.load import fill, linears_of
from lapwan.wan.transformer import block as wan_block
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.block import block_forward


@pytest.fixture
def fused(monkeypatch):
    """Switch the fused path on without a GPU: the kernels' torch forms run. Returns one entry per fused block."""
    calls: list[int] = []
    forward = wan_block.fused_forward

    def use(on: bool) -> list[int]:
        monkeypatch.setattr(kernels, "supports", lambda x: on and not torch.is_grad_enabled())
        monkeypatch.setattr(kernels, "HAS_TRITON", True)
        monkeypatch.setattr(wan_block, "fused_forward", lambda *given: (calls.append(1), forward(*given))[1])
        return calls

    return use


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


def both(model: WanBackbone, fused, *inputs: Tensor) -> list[Tensor]:
    velocities = []
    for on in (False, True):
        calls = fused(on)
        with torch.no_grad():
            velocities.append(model.velocity(*inputs))
        assert len(calls) == (3 if on else 0)
    return velocities


@pytest.mark.parametrize("alike", [False, True])
def test_it_is_the_eager_block(fused, alike):
    """With a timestep for each sample, and with one row of modulation for both."""
    x, t, text = given(torch.float64)
    t = torch.tensor(700.0).expand(2) if alike else t
    plain, ours = both(made(torch.float64), fused, x, t, text)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_the_compiler_takes_it_whole(fused):
    """Its lists of outputs and optional arguments, without generating code."""
    model, inputs = made(torch.float32), given(torch.float32)
    calls = fused(True)
    options = model.options
    with torch.no_grad():
        plain = model.velocity(*inputs)
        options.block = torch.compile(block_forward, backend="aot_eager", dynamic=False, fullgraph=True)
        assert torch.equal(model.velocity(*inputs), plain)
    assert calls


def test_a_step_with_a_graph_or_with_timesteps_per_token_takes_the_eager_path(fused):
    model = made(torch.float32)
    x, _, text = given(torch.float32)
    calls = fused(True)
    model.velocity(x.requires_grad_(), torch.full((2,), 700.0), text).sum().backward()
    with torch.no_grad():
        model.velocity(x, torch.full((2, 3 * 3 * 4), 700.0), text)
    assert not calls


def test_in_fp8_it_rounds_where_the_eager_block_does(fused, monkeypatch):
    """Codes go from kernel to product; without a GPU the product is emulated."""
    monkeypatch.setattr("lapwan.wan.transformer.block.fp8_in_hardware", lambda device: True)
    model = made(torch.float32)
    transformer = model.transformer
    source = {n: lambda p=p: p.data.clone() for n, p in transformer.named_parameters()}
    fill(transformer, source, linears_of(transformer.blocks, "blocks"), Precision.FP8, lambda name, stored: stored,
         torch.device("cpu"), None)
    assert isinstance(transformer.blocks[0].ffn.net[2], LINEAR_CLASSES[Precision.FP8])
    exact = made(torch.float32)
    inputs = given(torch.float32)
    plain, ours = both(model, fused, *inputs)
    with torch.no_grad():
        fused(False)
        without = exact.velocity(*inputs)
    assert float((ours - plain).norm()) < 0.3 * float((plain - without).norm())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton may work")
def test_without_a_compiler_torchs_operations_run(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(kernels, "_TRIED", False)
    for _ in range(2):
        kernels.try_triton(torch.device("cuda"))
    assert not kernels.HAS_TRITON
    assert capsys.readouterr().err.count("Triton cannot build kernels here (") == 1


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch's CUDA builds")
def test_the_kernels_are_their_torch_forms():
    program = Path(__file__).with_name("triton_parity.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "alike", done.stderr[-2000:]
